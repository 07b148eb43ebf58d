package deflate

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
)

// Reader is the uncompressed stream. It is not safe for concurrent use, but the
// release functions that Next returns may be called from anywhere.
type Reader struct {
	e     *engine
	begun bool
	run   sum   // of the member at hand
	err   error // sticky

	rest    []byte // of the piece that Read is at
	release func()
	closed  bool
}

var (
	_ io.ReadCloser = (*Reader)(nil)
	_ io.WriterTo   = (*Reader)(nil)
)

// NewReader returns a Reader of the gzip stream that r holds. Nothing is read
// before the first Read, WriteTo or Next; from then on r is read ahead, from
// other goroutines, one at a time, and to its end.
func NewReader(r io.Reader, opts ...Option) (*Reader, error) {
	if r == nil {
		return nil, errors.New("deflate: no source")
	}
	return &Reader{e: newEngine(source{r: r}, opts)}, nil
}

// NewReaderAt is NewReader for a source that several workers may read at the same
// time. It may still grow: ReadAt waits until bytes are there and returns io.EOF at
// the end only. It may return less than asked, without an error.
func NewReaderAt(r io.ReaderAt, opts ...Option) (*Reader, error) {
	if r == nil {
		return nil, errors.New("deflate: no source")
	}
	return &Reader{e: newEngine(source{at: r}, opts)}, nil
}

// Next returns the next bytes of the stream without copying them: some, up to a
// MiB. They stay valid and unchanged until release is called, which must be done
// once; calls after the first do nothing. The Reader bounds what is handed out: Next
// may wait until earlier blocks have been released.
//
// io.EOF means that the CRC-32 and the length of all members matched and that the
// source has ended. Damage gives ErrCorrupt, after all bytes before it; an error
// of the source is returned as it is. Every error repeats.
func (r *Reader) Next() (data []byte, release func(), err error) {
	if r.rest != nil {
		data, release = r.rest, r.release
		r.rest, r.release = nil, nil
		return data, release, nil
	}
	for r.err == nil {
		c, p, err := r.e.next(!r.begun)
		r.begun = true
		if err != nil {
			r.err = err
			break
		}
		r.err = r.check(&p)
		if p.hi > p.lo {
			return p.slab.b[p.lo:p.hi:p.hi], r.e.releaser(c, p.slab), nil
		}
		if p.slab != nil {
			r.e.releaser(c, p.slab)()
		}
	}
	return nil, nil, r.err
}

// check compares the sum of a member that ends in p, and cuts off what stands
// behind it if it is wrong.
func (r *Reader) check(p *piece) error {
	if p.unsummed > 0 {
		p.sum()
	}
	r.run = r.run.then(p.head)
	if !p.ends {
		return nil
	}
	if err := p.want.check(r.run); err != nil {
		p.hi = p.lo + int(p.head.n)
		return err
	}
	r.run = p.tail
	return nil
}

// Read returns uncompressed bytes. For its errors see Next.
func (r *Reader) Read(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.rest == nil {
		if r.rest, r.release, err = r.Next(); err != nil {
			r.rest = nil
			return 0, err
		}
	}
	n = copy(p, r.rest)
	r.rest = r.rest[n:]
	if len(r.rest) == 0 {
		r.release()
		r.rest, r.release = nil, nil
	}
	return n, nil
}

// WriteTo writes all that is left to w. An error of w ends the stream.
func (r *Reader) WriteTo(w io.Writer) (total int64, err error) {
	for {
		data, release, err := r.Next()
		if err == io.EOF { //nolint:errorlint // a wrapped one is the source's
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(data)
		total += int64(n)
		if err == nil && n < len(data) {
			err = io.ErrShortWrite
		}
		release()
		if err != nil {
			r.err = err
			return total, err
		}
	}
}

// Close ends all goroutines and waits for them. They may be waiting for the
// source: whoever closes a Reader before its end must make a Read or ReadAt that
// is under way return first. Blocks that were handed out stay valid. Close can be
// called again; it does not close the source.
func (r *Reader) Close() error {
	if !r.closed { // r.err does not tell: that of a source or a writer may be os.ErrClosed too
		r.closed = true
		if r.release != nil {
			r.release()
		}
		r.rest, r.release = nil, nil
		r.e.close()
		r.err = fmt.Errorf("read of a closed gzip stream: %w", os.ErrClosed)
	}
	return nil
}

// next returns the next piece, or what ended the stream.
func (e *engine) next(first bool) (*chunk, piece, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if first && !e.serial {
		e.spawn()
	}
	for {
		c := e.front
		if c.readable() && c.taken < len(c.pieces) && !c.pieces[c.taken].marked {
			return c, e.take(c), nil
		}
		if c.verified && c.stage == done && c.taken == len(c.pieces) {
			e.settleMemory(c)
			if c.final {
				e.releaseFree()
				return nil, piece{}, c.err
			}
			if c.next != nil {
				e.front = c.next
				continue
			}
		}
		if !e.serial || !e.work1() {
			e.data.Wait()
		}
	}
}

// work1 does one job in the caller's goroutine. e.mu is held.
func (e *engine) work1() bool {
	j, c := e.pick()
	if j == decodeIt {
		e.decode(c)
	}
	return j != nothing
}

// take takes the next piece of c. e.mu is held.
func (e *engine) take(c *chunk) piece {
	p := c.pieces[c.taken]
	c.taken++
	if c.taken == len(c.pieces) {
		c.pieces, c.taken = c.pieces[:0], 0
	}
	return p
}

// releaser returns what gives a slab back.
func (e *engine) releaser(c *chunk, s *slab) func() {
	var released atomic.Bool
	return func() {
		if released.Swap(true) {
			return
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.putSlab(c, s)
		e.settleMemory(c)
		if c == e.head {
			e.work.Broadcast()
		}
		e.data.Broadcast()
	}
}

func (e *engine) close() {
	e.stopped.Store(true)
	e.mu.Lock()
	e.work.Broadcast()
	e.mu.Unlock()
	e.wg.Wait()
	e.mu.Lock()
	e.releaseFree()
	e.mu.Unlock()
}

// The rest is what decoders ask of the engine.

// begun says whether the begin of c is known.
func (e *engine) begun(c *chunk) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return c.began
}

// origin is where c begins, and the window there, nil if c is a guess.
func (e *engine) origin(c *chunk) (mark, *window) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !c.verified {
		return c.begin, nil
	}
	c.sure = true
	return c.begin, c.win
}

// firstStop is from where on the boundaries of c matter.
func (e *engine) firstStop(c *chunk) int64 {
	if e.serial {
		return -1
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return c.hi*8 - 8
}

// endStream ends the chain with c.
func (e *engine) endStream(c *chunk, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c.final, c.err = true, err
}
