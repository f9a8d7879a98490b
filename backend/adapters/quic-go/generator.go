package quiclb

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"

	"github.com/quic-go/quic-go"
)

const (
	block      = 1 << 16 // nonces per reservation: one durable write, and at most as many lost in a crash
	retryEvery = 64      // CIDs between two attempts to write a mark after one failed
)

// Generator issues connection IDs whose nonces never repeat: it is quic-go's ConnectionIDGenerator.
// Every method may be called from any goroutine. Share one between all Transports of a process, and give every process
// a server ID of its own.
//
// All its connection IDs are of one length, because quic-go reads them by one length.
// Without a configuration, and when its nonces are used up, it issues 0b111 ones, which balancers route by address.
type Generator struct {
	mutex       sync.Mutex
	length      int
	marks       *marksFile // nil: counters last as long as the process
	counters    map[string]*counter
	source      *source               // nil: 0b111
	unroutables bool                  // whether it has ever issued one
	known       [unroutable][]*source // by config ID: what connection IDs of this server may be made of, the newest last
}

// source is a configuration to issue under. Those that share key and server ID share a counter.
type source struct {
	codec    *Codec
	serverID []byte
	resetKey []byte // nil: none
	counter  *counter
}

// NewGenerator fails if the nonce file cannot be used: another process has it, it is damaged, or open to others.
func NewGenerator(config *ServerConfig) (*Generator, error) {
	generator := &Generator{length: minUnroutableCID, counters: map[string]*counter{}}
	if config.CID != nil {
		generator.length = config.CID.CIDLength()
	}
	if config.NonceFile != "" {
		marks, err := openMarks(config.NonceFile)
		if err != nil {
			return nil, err
		}
		generator.marks = marks
	}
	if err := generator.Switch(config); err != nil {
		return nil, errors.Join(err, generator.Close())
	}
	return generator, nil
}

// Switch issues under another configuration from the next connection ID on. If it fails nothing has changed.
func (g *Generator) Switch(config *ServerConfig) error {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	if file := config.NonceFile; (g.marks == nil) != (file == "") || g.marks != nil && g.marks.path != file {
		return errors.New("nonce-file: another one than before: that takes a restart")
	}
	if config.CID == nil {
		g.source = nil
		return nil
	}
	if length := config.CID.CIDLength(); length != g.length {
		return fmt.Errorf("cid-config: CIDs of %d octets instead of %d: that takes a restart, quic-go reads them by one length",
			length, g.length)
	}
	codec, err := NewCodec(*config.CID)
	if err != nil {
		return err
	}
	if len(config.ServerID) != config.CID.ServerIDLength {
		return fmt.Errorf("server ID of %d octets: expected %d", len(config.ServerID), config.CID.ServerIDLength)
	}
	identity := Identity(*config.CID, config.ServerID)
	if g.counters[identity] == nil {
		counter, err := g.newCounter(identity, config.CID)
		if err != nil {
			return err
		}
		g.counters[identity] = counter
	}
	g.source = &source{codec, config.ServerID, config.ResetKey, g.counters[identity]}
	known := &g.known[config.CID.ConfigID]
	*known = slices.DeleteFunc(*known, func(each *source) bool {
		return each.counter == g.source.counter && each.codec.config.AppendedLength == config.CID.AppendedLength
	})
	*known = append(*known, g.source)
	return nil
}

// GenerateConnectionID makes a connection ID that was never issued before.
func (g *Generator) GenerateConnectionID() (quic.ConnectionID, error) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	if g.source == nil || !g.reserve(g.source.counter) {
		g.unroutables = true
		cid := random(g.length)
		cid[0] = unroutable<<5 | byte(g.length-1)
		return quic.ConnectionIDFromBytes(cid), nil
	}
	spare := random(1 + g.source.codec.config.AppendedLength)
	cid, err := g.source.codec.Encode(g.source.serverID, g.source.counter.take(), spare[0], spare[1:])
	if err != nil {
		return quic.ConnectionID{}, err
	}
	return quic.ConnectionIDFromBytes(cid), nil
}

// origin is where a connection ID comes from, as far as its octets tell.
type origin int

const (
	foreign   origin = iota // it has nobody's server ID, or that of another server
	forgotten               // it has this server's, but not a nonce that this process has used
	possible                // this process may have issued it
)

// origin is that of a connection ID of at least one octet, and its reset key if it is forgotten, nil if there is none.
func (g *Generator) origin(cid []byte) (origin, []byte) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	if cid[0]>>5 == unroutable {
		if g.unroutables {
			return possible, nil
		}
		return foreign, nil
	}
	from, resetKey := foreign, []byte(nil)
	for _, source := range g.known[cid[0]>>5] {
		serverID, nonce, ok := source.codec.Decode(cid)
		if !ok || !bytes.Equal(serverID, source.serverID) {
			continue
		}
		if source.counter.has(nonce) {
			return possible, nil
		}
		from, resetKey = forgotten, source.resetKey
	}
	return from, resetKey
}

// ConnectionIDLen is the length of every connection ID.
func (g *Generator) ConnectionIDLen() int {
	return g.length
}

// Close lets another process have the nonce file.
func (g *Generator) Close() error {
	if g.marks == nil {
		return nil
	}
	return g.marks.close()
}

func (g *Generator) newCounter(identity string, config *CIDConfig) (*counter, error) {
	space := new(big.Int).Lsh(big.NewInt(1), uint(8*config.NonceLength))
	from, known := mark{}, false
	if g.marks != nil {
		from, known = g.marks.marks[identity]
	}
	if !known {
		from = mark{new(big.Int).SetBytes(random(config.NonceLength)), new(big.Int), nil}
		if config.Key == nil {
			from.permutationKey = random(keyLength)
		}
	}
	if from.start.Sign() < 0 || from.start.Cmp(space) >= 0 || from.reserved.Sign() < 0 || from.reserved.Cmp(space) > 0 {
		return nil, fmt.Errorf("nonce mark %s: not one for nonces of %d octets", identity, config.NonceLength)
	}
	// What was reserved and not used by the process before us is skipped: nobody knows how much was.
	counter := &counter{identity: identity, length: config.NonceLength, space: space, mark: from,
		used: new(big.Int).Set(from.reserved), first: from.reserved}
	if g.marks == nil {
		counter.mark.reserved = space
	}
	if length := len(from.permutationKey); length != 0 && length != keyLength {
		return nil, fmt.Errorf("nonce mark %s: permutation key of the wrong length", identity)
	}
	return counter, nil
}

// reserve says whether the counter has a nonce that is certainly fresh.
func (g *Generator) reserve(counter *counter) bool {
	if counter.used.Cmp(counter.mark.reserved) < 0 {
		return true
	}
	if counter.used.Cmp(counter.space) >= 0 {
		return false
	}
	if counter.failed > 0 {
		// A full disk must not cost a write per packet.
		if counter.failed++; counter.failed%retryEvery != 0 {
			return false
		}
	}
	wanted := counter.mark
	wanted.reserved = new(big.Int).Add(counter.used, big.NewInt(block))
	if wanted.reserved.Cmp(counter.space) > 0 {
		wanted.reserved = counter.space
	}
	if g.marks.save(counter.identity, wanted) != nil {
		counter.failed = max(counter.failed, 1)
		return false
	}
	counter.failed = 0
	counter.mark = wanted
	return true
}

// counter is the nonces of one key and server ID: where they begin, how many were used, how many may be.
type counter struct {
	identity string
	length   int
	space    *big.Int
	mark     mark
	used     *big.Int
	first    *big.Int // what used was when this process began
	failed   int      // CIDs since a mark could not be written
}

func (c *counter) take() []byte {
	value := new(big.Int).Add(c.mark.start, c.used)
	if value.Cmp(c.space) >= 0 {
		value.Sub(value, c.space)
	}
	c.used.Add(c.used, big.NewInt(1))
	nonce := value.FillBytes(make([]byte, c.length))
	if len(c.mark.permutationKey) > 0 {
		return HideCounter(c.mark.permutationKey, nonce)
	}
	return nonce
}

// has says whether this process has used a nonce.
func (c *counter) has(nonce []byte) bool {
	if len(c.mark.permutationKey) > 0 {
		nonce = showCounter(c.mark.permutationKey, nonce)
	}
	used := new(big.Int).SetBytes(nonce)
	used.Sub(used, c.mark.start)
	if used.Sign() < 0 {
		used.Add(used, c.space)
	}
	return used.Cmp(c.first) >= 0 && used.Cmp(c.used) < 0
}

// HideCounter makes the nonce of a plaintext configuration: nonces must not be related to each other (section 5.4), and
// a permutation, the four passes under a key of the nonce file's, keeps them distinct.
func HideCounter(key, counter []byte) []byte {
	nonce := bytes.Clone(counter)
	fourPassEncrypt(mustAES(key), nonce)
	return nonce
}

func showCounter(key, nonce []byte) []byte {
	counter := bytes.Clone(nonce)
	fourPassDecrypt(mustAES(key), counter)
	return counter
}

func mustAES(key []byte) cipher.Block {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // of the key's length alone
	}
	return block
}

// Identity is the name of a nonce space in a nonce file. It does not tell the key.
func Identity(config CIDConfig, serverID []byte) string {
	space := append([]byte{byte(config.ServerIDLength), byte(config.NonceLength)}, serverID...)
	var digest []byte
	if config.Key != nil {
		mac := hmac.New(sha256.New, config.Key)
		mac.Write(append([]byte("quiclb nonces"), space...))
		digest = mac.Sum(nil)
	} else {
		sum := sha256.Sum256(append(append([]byte("quiclb plaintext nonces"), config.ConfigID), space...))
		digest = sum[:]
	}
	return hex.EncodeToString(digest[:16])
}

func random(length int) []byte {
	octets := make([]byte, length)
	_, _ = rand.Read(octets) // it never fails: it ends the program instead
	return octets
}
