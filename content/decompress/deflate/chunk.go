package deflate

import (
	"errors"
	"sync/atomic"
)

// stage is what may be done with a chunk.
type stage uint8

const (
	fresh   stage = iota // a guess that has not begun
	ready                // verified, and can be decoded
	running              // a worker is at it
	paused               // a guess that has made all the output it may
	useless              // a guess without a result: no block found, or damage
	done                 // decoded, to end
)

// start is where a chunk begins, with the window before it.
type start struct {
	mark
	win *window
}

// signals to a worker.
const (
	carryOn  = iota
	verified // the window is known
	callBack // the result is not wanted, or not from there
)

// chunk is a stretch of the input that is decoded by one worker at a time, from
// the first block at or behind lo to the first at or behind hi. Its fields are
// guarded by the engine's mutex.
type chunk struct {
	e      *engine
	lo, hi int64 // bytes
	seg    *segment
	last   *segment // behind which the next chunk begins
	next   *chunk
	stage  stage

	began    bool // begin is set
	begin    mark
	verified bool
	sure     bool    // the decoder knows that it is verified: no restart can follow
	win      *window // before begin; nil unless verified
	given    *start  // where it must begin again, once the worker gives it back
	signal   atomic.Int32
	dead     bool
	freed    bool

	end   mark
	final bool  // the stream ends here
	err   error // why, with final: io.EOF if all is well

	dec        *decoder
	carry      *window  // behind end
	syms       []uint16 // instead, if the chunk was a guess to its end
	pieces     []piece
	taken      int // pieces that were delivered
	unresolved int // pieces that have markers; they are the first ones
	resolving  bool
	held       int // slabs
	made       int // bytes
	settled    bool
}

// piece is output: slab.b[lo:hi], or symbols while it is marked. head is the sum
// of its bytes up to the end of a member, if there is one in it, tail that of
// the bytes behind the last member end. Members in between are checked already.
type piece struct {
	slab   *slab
	lo, hi int
	marked bool
	head   sum
	ends   bool
	want   trailer
	tail   sum

	unsummed int // so many bytes at the end are in none of the sums yet
}

// sum brings the sums to the piece's end.
func (p *piece) sum() {
	rest := sumOf(p.slab.b[p.hi-p.unsummed : p.hi])
	if p.ends {
		p.tail = p.tail.then(rest)
	} else {
		p.head = p.head.then(rest)
	}
	p.unsummed = 0
}

// verify tells a chunk that it begins at the right place.
func (c *chunk) verify(win *window) {
	c.verified, c.win = true, win
	c.signal.Store(verified)
}

// window returns the window behind a chunk that is done, once that before it is known.
func (c *chunk) window() *window {
	if c.end.member {
		return new(window)
	}
	if c.syms != nil {
		c.carry = new(window)
		c.carry.setResolved(c.syms, c.win)
		c.syms = nil
	}
	return c.carry
}

// readable says whether pieces may be taken. The pieces of a guess that has just
// been verified may still be dropped by its worker. e.mu is held.
func (c *chunk) readable() bool { return c.verified && (c.sure || c.stage != running) }

// awaited says that whoever reads the pieces has taken all there are, and so has
// time to sum up what the worker copies.
func (c *chunk) awaited() bool {
	if c.e.serial {
		return false
	}
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	return c.sure && c == c.e.front && len(c.pieces) == c.taken
}

// errNotYet stops a guess that would need more of the input than it may hold.
var errNotYet = errors.New("deflate: not verified yet")

// copyStretch is how many stored bytes are copied between two boundaries that matter.
const copyStretch = 64 << 10

// boundary decides what c does at a block or member boundary: end there, or go
// on until stop. copying says that all since the last one was only copied: then
// the next stretch is left to this worker as well, because a guess would cost more.
func (e *engine) boundary(c *chunk, at mark, copying bool) (end bool, stop int64, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.sure {
		e.setCopying(copying)
	}
	for {
		n := c.next
		switch {
		case at.bit < c.hi*8:
			return false, max(c.hi*8-8, at.bit+1), nil
		case e.serial:
			return false, -1, nil
		case n == nil && copying && c.sure:
			return false, at.bit + copyStretch*8, nil
		case n == nil:
			return true, 0, nil
		case at.bit >= n.hi*8 && !c.sure:
			return false, 0, errNotYet
		case at.bit >= n.hi*8:
			e.absorb(c, n)
		case n.began && at.bit < n.begin.bit:
			return false, max(n.begin.bit-8, at.bit+1), nil
		default:
			return true, 0, nil
		}
	}
}

// found notes where a guess begins. ok is false if it was called back.
func (e *engine) found(c *chunk, m mark) (ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.dead || c.given != nil {
		return false
	}
	c.began, c.begin = true, m
	return true
}
