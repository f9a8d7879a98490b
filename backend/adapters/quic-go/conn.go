package quiclb

import (
	"net"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// Conn is a UDP socket for a quic.Transport that keeps from it the short header packets that can be of no connection.
//
// quic-go answers every one of them with a stateless reset, if it is longer than 42 octets. But clients that have
// nothing to say send shorter ones, and whoever is sent another server's packets by mistake has no business to answer:
// a client must never lose a connection that is alive elsewhere. So here packets with the server IDs of others are
// ignored, and those with nonces of an earlier process are answered by the book (RFC 9000, section 10.3).
type Conn struct {
	*net.UDPConn
	generator *Generator
	batches   *ipv4.PacketConn
	resets    limiter
}

// NewConn wraps a socket. Reading stays in batches, and sending in segments.
func NewConn(socket *net.UDPConn, generator *Generator) *Conn {
	return &Conn{UDPConn: socket, generator: generator, batches: ipv4.NewPacketConn(socket)}
}

// ReadBatch is what quic-go reads by.
func (c *Conn) ReadBatch(messages []ipv4.Message, flags int) (int, error) {
	count, err := c.batches.ReadBatch(messages, flags)
	for i := range max(count, 0) {
		message := &messages[i]
		if !c.wants(message) {
			message.N = 0 // quic-go ignores empty datagrams; others cannot move up, each has a buffer of its own
		}
	}
	return count, err
}

func (c *Conn) wants(message *ipv4.Message) bool {
	datagram := message.Buffers[0][:message.N]
	length := c.generator.ConnectionIDLen()
	if len(datagram) <= length || datagram[0]&0x80 != 0 {
		return true
	}
	cid := datagram[1 : 1+length]
	origin, key := c.generator.origin(cid)
	if origin == forgotten && key != nil && c.resets.allows(time.Now()) {
		if reset := resetFor(key, cid, len(datagram)); reset != nil {
			// It may be lost on its way as well.
			_, _, _ = c.WriteMsgUDP(reset, sourceOf(message.OOB[:message.NN]), message.Addr.(*net.UDPAddr))
		}
	}
	return origin == possible
}

// sourceOf makes an answer leave from the address that a datagram came to, if the socket listens at all of them: then
// quic-go has the kernel tell.
func sourceOf(oob []byte) []byte {
	var four ipv4.ControlMessage
	if four.Parse(oob) == nil && four.Dst != nil {
		return (&ipv4.ControlMessage{Src: four.Dst}).Marshal()
	}
	var six ipv6.ControlMessage
	if six.Parse(oob) == nil && six.Dst != nil {
		return (&ipv6.ControlMessage{Src: six.Dst}).Marshal()
	}
	return nil
}
