package quiclb

import (
	"crypto/hmac"
	"crypto/sha256"
	"math/rand/v2"
	"sync"
	"time"
)

// From RFC 9000, section 10.3.
const (
	tokenLength       = 16
	minReset          = 21 // octets of a datagram
	oneShorterUpTo    = 43 // a trigger of at most this many octets gets a reset exactly one octet shorter
	inconspicuous     = 42 // below this a reset can be told from a data packet
	maxReset          = 100
	resetsPerSecond   = 1000
	resetsAtOneMoment = 100
)

// ResetToken is the stateless reset token of a connection ID, the first 16 octets of HMAC-SHA256(key, cid).
// It is what quic-go computes of its StatelessResetKey.
func ResetToken(key, cid []byte) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write(cid)
	return mac.Sum(nil)[:tokenLength]
}

// resetFor is the datagram that answers one of trigger octets; nil if none may, because it could not be shorter.
func resetFor(key, cid []byte, trigger int) []byte {
	if trigger <= minReset {
		return nil
	}
	size := trigger - 1
	if trigger > oneShorterUpTo {
		size = inconspicuous + rand.IntN(min(size, maxReset)-inconspicuous+1)
	}
	datagram := random(size - tokenLength)
	datagram[0] = 0b0100_0000 | datagram[0]&0b0011_1111
	return append(datagram, ResetToken(key, cid)...)
}

// limiter lets a bounded number of resets through, so that nobody can have them sent without end.
type limiter struct {
	mutex  sync.Mutex
	tokens float64
	last   time.Time
}

func (l *limiter) allows(now time.Time) bool {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	l.tokens = min(l.tokens+now.Sub(l.last).Seconds()*resetsPerSecond, resetsAtOneMoment)
	l.last = now
	if l.tokens < 1 {
		return false
	}
	l.tokens--
	return true
}
