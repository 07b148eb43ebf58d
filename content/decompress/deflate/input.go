package deflate

import (
	"errors"
	"io"
	"sync"
)

// source is where compressed bytes come from: one of the two.
type source struct {
	at io.ReaderAt
	r  io.Reader
}

// fill reads into p until it is full, or to the end or an error. Reads that
// return less than asked without an error are allowed, of a ReaderAt too.
func (s *source) fill(p []byte, off int64) (n int, err error) {
	for idle := 0; n < len(p); {
		var c int
		if s.at != nil {
			c, err = s.at.ReadAt(p[n:], off+int64(n))
		} else {
			c, err = s.r.Read(p[n:])
		}
		if c < 0 || c > len(p)-n {
			return n, errBadRead
		}
		n += c
		switch {
		case err != nil && n == len(p) && errors.Is(err, io.EOF):
			return n, nil // found again by the next read
		case err != nil:
			return n, err
		case c > 0:
			idle = 0
		default:
			if idle++; idle == 100 {
				return n, io.ErrNoProgress
			}
		}
	}
	return n, nil
}

var errBadRead = errors.New("deflate: source returned an impossible count")

// segment is a piece of the input in memory, in a list of them. The list is
// guarded by the engine's mutex, the bytes by load.
type segment struct {
	e     *engine
	lo    int64 // place in the stream, bytes
	size  int
	next  *segment
	refs  int
	owned bool // by a chunk, which has the first reference
	once  sync.Once
	prev  *segment // loaded before this one, if the source is a stream; nil then

	data []byte
	err  error // why data is less than size; io.EOF at the end
}

// load reads the segment unless that has been done. It may be called by several
// goroutines; all return when the bytes are there.
func (g *segment) load() {
	g.once.Do(func() {
		p := g.prev
		if p != nil {
			p.load()
			g.prev = nil
			if p.err != nil {
				g.err = p.err
				return
			}
		}
		buf := g.e.takeInput(g.size)
		n, err := g.e.src.fill(buf, g.lo)
		g.data, g.err = buf[:n], err
	})
}

// end is behind the last byte; only after load.
func (g *segment) end() int64 { return g.lo + int64(len(g.data)) }

// after is the segment behind g, made if there was none; it comes with the
// reference of its future owner. e.mu is held.
func (e *engine) after(g *segment) *segment {
	if g.next == nil {
		g.next = &segment{e: e, lo: g.lo + int64(g.size), size: e.chunkSize(), refs: 1}
		if e.src.r != nil {
			g.next.prev = g
		}
	}
	return g.next
}

// strict makes a reference that is dropped twice a panic; tests set it.
var strict bool

// unref drops a reference. e.mu is held.
func (e *engine) unref(g *segment) {
	g.refs--
	if strict && g.refs < 0 {
		panic("deflate: a segment was given back twice")
	}
	if g.refs == 0 && g.data != nil {
		e.inputs = append(e.inputs, g.data)
		g.data = nil
	}
}

// takeInput returns a buffer of size bytes.
func (e *engine) takeInput(size int) []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	for n := len(e.inputs); n > 0; n = len(e.inputs) {
		b := e.inputs[n-1]
		e.inputs = e.inputs[:n-1]
		if cap(b) >= size {
			return b[:size]
		}
	}
	return make([]byte, size)
}

// drain reads on to the end of the source, from behind g, which is loaded, or until
// the Reader is closed: padding may have no end. No more guesses are made: it
// gives back the segments that they would begin with.
func (e *engine) drain(g *segment) error {
	e.mu.Lock()
	e.ended = true
	e.mu.Unlock()
	for g.err == nil && !e.stopped.Load() {
		e.mu.Lock()
		next := e.after(g)
		next.refs++
		e.mu.Unlock()
		next.load()
		e.mu.Lock()
		e.unref(next)
		if !next.owned { // and will not be
			next.owned = true
			e.unref(next)
		}
		e.mu.Unlock()
		g = next
	}
	if errors.Is(g.err, io.EOF) {
		return nil
	}
	return g.err
}

// jointSize is how much of a segment is copied behind the rest of the one
// before. A block header is the most that a decoder leaves: below 400 bytes.
const jointSize = 1 << 10

// feed shows the input of one chunk as a slice that moves along.
type feed struct {
	c      *chunk
	seg    *segment // that in ends in; referenced
	in     []byte
	base   int64 // place of in[0] in the stream
	joined bool  // in is joint, which begins before seg
	joint  []byte
	eof    bool  // in ends where the source does
	err    error // of the source, with eof
}

// start shows the input from the segment g on.
func (f *feed) start(g *segment) {
	f.stopAt(g)
	g.load()
	f.in, f.base, f.joined, f.eof, f.err = g.data, g.lo, false, false, nil
}

// rest shows the input from the segment g on, which is loaded and comes with a reference.
func (f *feed) rest(g *segment) {
	f.stopAt(nil)
	f.seg, f.in, f.base, f.joined, f.eof, f.err = g, g.data, g.lo, false, false, nil
}

// stopAt moves the reference; g may be nil.
func (f *feed) stopAt(g *segment) {
	e := f.c.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if g != nil {
		g.refs++
	}
	if f.seg != nil {
		e.unref(f.seg)
	}
	f.seg = g
}

// more makes bytes behind f.in visible and forgets those before keep. drop is
// how far f.base has moved. If there are no more, f.eof is set.
func (f *feed) more(keep int) (drop int, err error) {
	old, at, end := f.base, f.base+int64(keep), f.base+int64(len(f.in))
	if f.joined && at >= f.seg.lo {
		f.in, f.base, f.joined = f.seg.data, f.seg.lo, false
		if end < f.seg.end() {
			return int(f.base - old), nil
		}
	}
	if end == f.seg.end() {
		if f.seg.err != nil { // kept in f.err
			f.finish()
			return int(f.base - old), nil //nolint:nilerr // see above
		}
		rest := f.in[at-f.base:]
		f.joint = append(f.joint[:0], rest...)
		if err := f.step(); err != nil {
			return int(f.base - old), err
		}
		f.in, f.base, f.joined = f.joint, at, true
	} else {
		f.joint = append(f.joint[:0], f.in[keep:]...)
		f.base = at
	}
	f.joint = append(f.joint, f.seg.data[end-f.seg.lo:min(end-f.seg.lo+jointSize, int64(len(f.seg.data)))]...)
	f.in = f.joint
	if len(f.seg.data) == 0 {
		f.finish()
	}
	return int(f.base - old), nil
}

// finish notes that the source has no more.
func (f *feed) finish() {
	f.eof = true
	if !errors.Is(f.seg.err, io.EOF) {
		f.err = f.seg.err
	}
}

// step goes on to the next segment, which the chunk may not be allowed to.
func (f *feed) step() error {
	next, err := f.c.e.overflow(f.c, f.seg)
	if err != nil {
		return err
	}
	f.stopAt(nil)
	f.seg = next
	next.load()
	return nil
}
