package deflate

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// outcome is how a decoder's run ended.
type outcome uint8

const (
	going    outcome = iota
	finished         // chunk.end is set
	pausing          // no slab is to be had
	failed           // a guess that led nowhere
	called           // back
)

// phase is what stands next in a chunk's input.
type phase uint8

const (
	atHeader phase = iota
	atBlocks
	atStored // read directly
	atTrailer
)

// pollEvery is how many bytes or symbols are decoded between two looks at the
// signal of the chunk.
const pollEvery = 64 << 10

// decoder decodes one chunk. It keeps its state over pauses.
type decoder struct {
	member
	inf inflater
	out output

	started bool
	sure    bool // begins at the right place, and the window is known
	phase   phase
	off     int64 // in the source, while atStored
	stop    int64 // from where on block boundaries matter; from the start of the stream

	seen  int64 // the last boundary that mattered
	plain int   // stored bytes since then, up to this member
}

var decoders = sync.Pool{New: func() any { return new(decoder) }}

func (e *engine) takeDecoder(c *chunk) *decoder {
	d := decoders.Get().(*decoder)
	d.c, d.started, d.seg = c, false, nil
	return d
}

// putDecoder takes the decoder of c away. e.mu is held.
func (e *engine) putDecoder(c *chunk) {
	d := c.dec
	c.dec = nil
	if d.seg != nil {
		e.unref(d.seg)
	}
	d.feed = feed{joint: d.joint[:0]}
	d.inf.in = nil
	d.out = output{syms: d.out.syms}
	decoders.Put(d)
}

// run decodes until there is an outcome.
func (d *decoder) run() outcome {
	if !d.started {
		if v := d.open(); v != going {
			return v
		}
	}
	for {
		switch sig := d.c.signal.Load(); {
		case sig == callBack, d.c.e.stopped.Load():
			return called
		case sig == verified && !d.sure:
			d.trust()
		}
		v, err := d.step()
		if err != nil {
			return d.fail(err)
		}
		if v != going {
			return v
		}
	}
}

// open goes to where the chunk begins, and looks for it in a guess.
func (d *decoder) open() outcome {
	c := d.c
	d.start(c.seg)
	c.e.loaded(c.seg)
	if v := d.search(); v != going {
		return v
	}
	at, win := c.e.origin(c)
	bit := at.bit - d.base*8
	d.started, d.sure, d.stop = true, win != nil, c.e.firstStop(c)
	d.out.reset(d.c, win)
	d.seen, d.plain, d.inf.plain = at.bit, 0, 0
	if at.member {
		d.phase, d.pos, d.out.marked = atHeader, int(bit>>3), false
		return going
	}
	d.phase = atBlocks
	d.inf.reset(d.in, bit)
	return going
}

// search looks for the begin of a guess.
func (d *decoder) search() outcome {
	c := d.c
	if c.e.begun(c) {
		return going
	}
	m, ok := find(d.in, func() bool { return c.signal.Load() == carryOn && !c.e.stopped.Load() })
	m.bit += d.base * 8
	switch {
	case !ok:
		return failed
	case !c.e.found(c, m):
		return called
	}
	return going
}

// trust is told that the chunk is verified: the window is known from here on. What
// has markers is published before the pieces may be read: resolve takes all of it
// at once.
func (d *decoder) trust() {
	e := d.c.e
	e.mu.Lock()
	win := d.c.win
	if d.out.marked {
		e.counts.late++
	}
	e.mu.Unlock()
	d.sure = true
	d.out.learn(win)
	e.mu.Lock()
	defer e.mu.Unlock()
	d.c.sure = true
	e.work.Broadcast()
	e.data.Broadcast()
}

// fail ends the stream with err, after all that was decoded before, or gives up
// a guess.
func (d *decoder) fail(err error) outcome {
	if !d.sure {
		return failed
	}
	return d.last(err)
}

// last ends the stream: io.EOF if all is well.
func (d *decoder) last(err error) outcome {
	d.out.flush()
	d.c.e.endStream(d.c, err)
	return finished
}

// arrive ends the chunk at a boundary.
func (d *decoder) arrive(at mark) outcome {
	d.out.flush()
	d.out.handOver(at)
	return finished
}

// step decodes what stands next.
func (d *decoder) step() (outcome, error) {
	switch d.phase {
	case atHeader:
		return d.beginMember()
	case atBlocks:
		return d.blocks()
	case atStored:
		return d.stored()
	}
	t, err := d.trailer()
	if err != nil {
		return going, err
	}
	if err := d.out.endMember(t); err != nil {
		return going, err
	}
	d.phase = atHeader
	return d.between(mark{d.base*8 + int64(d.pos)*8, true})
}

// between decides at a boundary whether the chunk ends there.
func (d *decoder) between(at mark) (outcome, error) {
	if d.stop < 0 || at.bit < d.stop {
		return going, nil
	}
	end, stop, err := d.c.e.boundary(d.c, at, d.copying(at))
	if err != nil {
		return going, err
	}
	if end {
		return d.arrive(at), nil
	}
	d.stop = stop
	return going, nil
}

// copying says whether what was decoded since the last boundary that mattered is
// little but stored blocks.
func (d *decoder) copying(at mark) bool {
	n, all := d.plain+d.inf.plain, (at.bit-d.seen)>>3
	d.plain, d.inf.plain, d.seen = 0, 0, at.bit
	return int64(n) > all-all/16
}

// beginMember reads a header, or finds the end of the stream.
func (d *decoder) beginMember() (outcome, error) {
	if first := d.base+int64(d.pos) == 0; !first {
		yes, padded, err := d.another()
		switch {
		case err != nil:
			return going, err
		case padded && !d.sure:
			return going, errNotYet // the rest is read by somebody who knows that it is padding
		case padded:
			d.out.flush() // nobody should wait for these bytes until the padding ends
			if err := d.c.e.drain(d.seg); err != nil {
				return going, err
			}
		}
		if !yes {
			return d.last(io.EOF), nil
		}
	}
	if err := d.header(); err != nil {
		return going, err
	}
	d.phase = atBlocks
	d.plain += d.inf.plain
	d.inf.reset(d.in, int64(d.pos)*8)
	d.inf.extend(d.in, 0, d.eof)
	return going, nil
}

// blocks decodes up to the next reason to stop.
func (d *decoder) blocks() (outcome, error) {
	if !d.out.room() {
		return pausing, nil
	}
	stop := d.stop
	if stop >= 0 {
		stop = max(0, stop-d.base*8)
	}
	st, err := d.out.decode(&d.inf, stop)
	switch {
	case errors.Is(err, errUnexpectedEOF):
		return going, d.cut()
	case err != nil:
		return going, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	switch st {
	case needInput:
		if d.direct() {
			d.phase, d.off = atStored, d.seg.end()
			return going, nil
		}
		return going, d.feedMore()
	case atBlock:
		return d.atBlock()
	case ended:
		d.pos = int((d.inf.bit() + 7) >> 3)
		d.phase = atTrailer
	}
	return going, nil
}

// cut is the error of an input that ends within a member.
func (d *decoder) cut() error {
	if d.err != nil {
		return d.err
	}
	return errTruncated
}

func (d *decoder) feedMore() error {
	if d.eof {
		return d.cut()
	}
	drop, err := d.more(int(d.inf.bit() >> 3))
	if err != nil {
		return err
	}
	d.inf.extend(d.in, drop, d.eof)
	return nil
}

func (d *decoder) atBlock() (outcome, error) {
	at, ok := blockStart(d.in, d.inf.bit())
	if !ok && !d.eof {
		return going, d.feedMore() // and then here again
	}
	return d.between(mark{bit: d.base*8 + at})
}
