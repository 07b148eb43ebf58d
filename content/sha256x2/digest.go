package sha256x2

import (
	"crypto/fips140"
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"fmt"
	"hash"
	"time"
)

const (
	// worthwhile is from how many bytes on a Write looks for company.
	worthwhile = 16 << 10

	magic     = "sha\x03"
	stateSize = len(magic) + 8*4 + sha256.BlockSize + 8
)

// standard is what crypto/sha256 is known to return.
type standard interface {
	hash.Hash
	encoding.BinaryAppender
	encoding.BinaryUnmarshaler
}

// digest is a hash.Hash. Between two writes all of its state is in std.
type digest struct {
	std      standard
	pool     *Pool
	buffered int // bytes of a block that is not full yet

	// While a Write is under way: whoever does the work owns rest and std: the
	// writer, or who took it out of pool.waiting, until that sends to wake.
	rest []byte // whole blocks
	wake chan struct{}

	// For how long the writer may wait for a partner, and since when it does. Whoever ends the wait sees to both, with
	// pool.mu held.
	credit  time.Duration
	lingers time.Time

	// The writer's alone.
	began time.Time // when the last Write did
	timer *time.Timer
}

// Write implements hash.Hash. It never fails.
func (d *digest) Write(p []byte) (int, error) {
	n := len(p)
	if d.buffered > 0 {
		p = d.feed(p, min(len(p), sha256.BlockSize-d.buffered))
	}
	if len(p) >= worthwhile {
		whole := len(p) - len(p)%sha256.BlockSize
		d.pool.hash(d, p[:whole])
		p = p[whole:]
	}
	d.feed(p, len(p))
	d.buffered = (d.buffered + n) % sha256.BlockSize
	return n, nil
}

// feed hashes the first n bytes of p alone and returns the others.
func (d *digest) feed(p []byte, n int) []byte {
	_, _ = d.std.Write(p[:n]) // never fails
	return p[n:]
}

// Sum implements hash.Hash.
func (d *digest) Sum(b []byte) []byte {
	d.pool.left(d)
	return d.std.Sum(b)
}

// Reset implements hash.Hash.
func (d *digest) Reset() {
	d.std.Reset()
	d.buffered = 0
}

// Size implements hash.Hash.
func (d *digest) Size() int { return sha256.Size }

// BlockSize implements hash.Hash.
func (d *digest) BlockSize() int { return sha256.BlockSize }

// state is what crypto/sha256 knows of a stream of whole blocks.
type state struct {
	h      [8]uint32
	length uint64
}

// take reads the state out of std.
func take(std standard) (state, error) {
	var (
		s   state
		buf [stateSize]byte
	)
	b, err := std.AppendBinary(buf[:0])
	if err != nil {
		return s, err
	}
	if len(b) != stateSize || string(b[:len(magic)]) != magic {
		return s, fmt.Errorf("a state of %d bytes that begins with %q", len(b), b[:min(len(b), len(magic))])
	}
	b = b[len(magic):]
	for i := range s.h {
		s.h[i] = binary.BigEndian.Uint32(b[4*i:])
	}
	s.length = binary.BigEndian.Uint64(b[4*len(s.h)+sha256.BlockSize:])
	return s, nil
}

// put is the opposite of take.
func (s state) put(std standard) error {
	var buf [stateSize]byte
	b := append(buf[:0], magic...)
	for _, h := range s.h {
		b = binary.BigEndian.AppendUint32(b, h)
	}
	b = binary.BigEndian.AppendUint64(b[:len(b)+sha256.BlockSize], s.length)
	return std.UnmarshalBinary(b)
}

// pair hashes the first n bytes, whole blocks, of both rests.
func pair(a, b *digest, n int) error {
	sa, err := take(a.std)
	if err != nil {
		return err
	}
	sb, err := take(b.std)
	if err != nil {
		return err
	}
	for done := 0; done < n; done += slice {
		blocks2(&sa.h, &sb.h, &a.rest[done], &b.rest[done], min(slice, n-done)/sha256.BlockSize)
	}
	sa.length += uint64(n)
	sb.length += uint64(n)
	if err := sa.put(a.std); err != nil {
		return err
	}
	if err := sb.put(b.std); err != nil {
		return err
	}
	a.rest, b.rest = a.rest[n:], b.rest[n:]
	return nil
}

// lanes says whether pair is used at all: not where the processor cannot, where only the validated
// module may hash, or where crypto/sha256 is not what is expected here.
var lanes = hasLanes() && !fips140.Enabled() && pairsRight()

// pairsRight hashes two streams in a pair that begins and ends in the middle, and compares.
func pairsRight() bool {
	const before, paired, after = 2 * sha256.BlockSize, 5 * sha256.BlockSize, sha256.BlockSize + 7
	var (
		data [2][before + paired + after]byte
		d    [2]*digest
	)
	for i := range d {
		std, ok := sha256.New().(standard)
		if !ok {
			return false
		}
		for j := range data[i] {
			data[i][j] = byte(j*(2*i+5) + j>>6)
		}
		d[i] = &digest{std: std, rest: data[i][before : before+paired]}
		d[i].feed(data[i][:], before)
	}
	if pair(d[0], d[1], paired) != nil {
		return false
	}
	for i := range d {
		d[i].feed(data[i][before+paired:], after)
		if [sha256.Size]byte(d[i].std.Sum(nil)) != sha256.Sum256(data[i][:]) {
			return false
		}
	}
	return true
}
