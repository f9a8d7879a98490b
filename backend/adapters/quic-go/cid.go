// Package quiclb makes a quic-go server routable by a QUIC-LB balancer: it reads the file that `quiclb server-config`
// writes, and gives quic-go's Transport the connection IDs and the stateless reset key that the balancer knows.
package quiclb

import (
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
)

// From draft-ietf-quic-load-balancers; section numbers are those of its editors' copy after -21.
const (
	keyLength        = 16
	unroutable       = 0b111 // config ID of CIDs that carry no server ID, section 3.2
	minNonceLength   = 4
	maxRoutingBlock  = 19
	maxCIDLength     = 20
	lengthBits       = 0b0001_1111
	minUnroutableCID = 8
)

// CIDConfig says how connection IDs carry a server ID (section 5.3). Key is nil (plaintext) or 16 octets.
type CIDConfig struct {
	ConfigID       uint8
	ServerIDLength int
	NonceLength    int
	Key            []byte
	EncodesLength  bool
	AppendedLength int
}

// CIDLength is the length of a whole connection ID.
func (c CIDConfig) CIDLength() int {
	return 1 + c.ServerIDLength + c.NonceLength + c.AppendedLength
}

func (c CIDConfig) check() error {
	block := c.ServerIDLength + c.NonceLength
	switch {
	case c.ConfigID >= unroutable:
		return fmt.Errorf("config ID %d: expected 0 to 6 (0b111 marks unroutable CIDs)", c.ConfigID)
	case c.ServerIDLength < 1:
		return fmt.Errorf("server ID length %d: expected at least 1 octet", c.ServerIDLength)
	case c.NonceLength < minNonceLength:
		return fmt.Errorf("nonce length %d: expected at least 4 octets", c.NonceLength)
	case block > maxRoutingBlock:
		return fmt.Errorf("server ID and nonce take %d octets together: expected at most 19", block)
	case c.AppendedLength < 0 || c.CIDLength() > maxCIDLength:
		return fmt.Errorf("%d appended octets: a CID holds at most 20 octets in all", c.AppendedLength)
	case c.Key != nil && len(c.Key) != keyLength:
		return fmt.Errorf("key of %d octets: expected 16", len(c.Key))
	}
	return nil
}

// Codec encodes and decodes the connection IDs of one CIDConfig. It may be shared between goroutines.
type Codec struct {
	config CIDConfig
	aes    cipher.Block // nil for plaintext
}

// NewCodec fails for a configuration that section 5.3 does not allow.
func NewCodec(config CIDConfig) (*Codec, error) {
	if err := config.check(); err != nil {
		return nil, err
	}
	codec := &Codec{config: config}
	if config.Key != nil {
		block, err := aes.NewCipher(config.Key)
		if err != nil {
			return nil, err
		}
		codec.aes = block
	}
	return codec, nil
}

// Encode makes the connection ID of a server ID and a nonce. lowBits fills the first octet of one that does not encode
// its length; appended is what the server adds for its own use. All have the configured lengths.
func (c *Codec) Encode(serverID, nonce []byte, lowBits byte, appended []byte) ([]byte, error) {
	config := c.config
	if len(serverID) != config.ServerIDLength || len(nonce) != config.NonceLength || len(appended) != config.AppendedLength {
		return nil, errors.New("server ID, nonce or appended octets of another length than configured")
	}
	if config.EncodesLength {
		lowBits = byte(config.CIDLength() - 1)
	}
	cid := make([]byte, 0, config.CIDLength())
	cid = append(cid, config.ConfigID<<5|lowBits&lengthBits)
	cid = append(append(append(cid, serverID...), nonce...), appended...)
	block := cid[1 : 1+len(serverID)+len(nonce)]
	switch {
	case c.aes == nil:
	case len(block) == aes.BlockSize:
		c.aes.Encrypt(block, block)
	default:
		fourPassEncrypt(c.aes, block)
	}
	return cid, nil
}

// Decode gets server ID and nonce out of a connection ID; false if it is too short or has another config ID.
func (c *Codec) Decode(cid []byte) (serverID, nonce []byte, ok bool) {
	end := 1 + c.config.ServerIDLength + c.config.NonceLength
	if len(cid) < end || cid[0]>>5 != c.config.ConfigID {
		return nil, nil, false
	}
	block := append([]byte(nil), cid[1:end]...)
	switch {
	case c.aes == nil:
	case len(block) == aes.BlockSize:
		c.aes.Decrypt(block, block)
	default:
		fourPassDecrypt(c.aes, block)
	}
	return block[:c.config.ServerIDLength], block[c.config.ServerIDLength:], true
}

// Section 5.4.2: a Feistel network of four passes over the two halves of block, in place.
func fourPassEncrypt(aes cipher.Block, block []byte) {
	for pass := byte(1); pass <= 4; pass++ {
		fourPass(aes, block, pass)
	}
}

func fourPassDecrypt(aes cipher.Block, block []byte) {
	for pass := byte(4); pass >= 1; pass-- {
		fourPass(aes, block, pass)
	}
}

// One pass changes the right half by the left one if its number is odd, else the left half by the right one.
// Halves of an odd number of octets share the middle octet: its high bits belong to the left half.
func fourPass(block cipher.Block, text []byte, pass byte) {
	half := (len(text) + 1) / 2
	left, right := text[:half], text[len(text)-half:]
	var expanded, mask [aes.BlockSize]byte
	expanded[14], expanded[15] = byte(len(text)), pass
	from, to := left, right
	if pass%2 == 0 {
		from, to = right, left
	}
	copy(expanded[:], from)
	shared := len(text)%2 == 1
	if shared && pass%2 == 1 {
		expanded[half-1] &= 0xf0
	} else if shared {
		expanded[0] &= 0x0f
	}
	block.Encrypt(mask[:], expanded[:])
	if shared && pass%2 == 1 {
		mask[0] &= 0x0f
	} else if shared {
		mask[half-1] &= 0xf0
	}
	for i := range to {
		to[i] ^= mask[i]
	}
}
