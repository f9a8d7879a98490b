// A quic-go server that knows no connection: it answers short headers with the stateless resets of its key.
//
//	quic-go KEY LENGTH    the key in hex, octets of a CID; prints the address that it listens on
package main

import (
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"strconv"

	"crypto/tls"

	"github.com/quic-go/quic-go"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	octets, err := hex.DecodeString(os.Args[1])
	check(err)
	length, err := strconv.Atoi(os.Args[2])
	check(err)
	key := quic.StatelessResetKey(octets)
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(err)
	transport := &quic.Transport{Conn: socket, ConnectionIDLength: length, StatelessResetKey: &key}
	_, err = transport.Listen(&tls.Config{}, nil)
	check(err)
	fmt.Println(socket.LocalAddr())
	select {}
}
