package layer

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

const (
	// ahead bounds the bytes between the stream and the slowest step. Only a
	// single block may be longer.
	ahead = 16 << 20
	// chunksAhead is how many chunks may lie between two steps.
	chunksAhead = 256
)

// Timings say where the time of a Write went. The steps overlap, so their sum
// is more than Total.
type Timings struct {
	Read  time.Duration // waiting for the stream
	Hash  time.Duration
	Write time.Duration // into the page cache; waiting for the disk to keep up is in it
	Scan  time.Duration
	Sync  time.Duration // making file and name durable once all was written
	Tail  time.Duration // from the stream's end until file and name were durable
	Total time.Duration
}

// chunk is a part of the stream that all steps look at; the last one to release
// it gives it back to where it came from.
type chunk struct {
	data []byte
	off  int64
	refs atomic.Int32
	back func()
}

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 {
		c.back()
	}
}

// pipeline takes one stream through hash, file and scan at the same time, each
// step on its own goroutine over the same buffers. Nothing is copied but what the
// kernel copies, and the part of a page between two blocks.
type pipeline struct {
	file     *os.File
	progress func(int64)
	prefix   int
	hash     hash.Hash
	flush    flushFunc
	makeRoom func() bool // on the disk; see Options
	syncing  func(path string)

	held atomic.Int64  // bytes in chunks
	room chan struct{} // has a token after held became less

	size    int64
	diffID  digest.Digest
	table   *Table
	ended   time.Time // when the stream had ended
	timings Timings
}

// run returns when all steps have ended. Without an error the file is complete
// and durable, but for its name. All chunks are released in any case. A Next of
// the stream that blocks must end with ctx: nothing else can end it.
func (p *pipeline) run(ctx context.Context, r io.Reader) error {
	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	in, ok := r.(Blocks)
	if !ok {
		b := newReaderBlocks(r, func() error { return context.Cause(ctx) })
		defer b.close()
		in = b
	}
	p.room = make(chan struct{}, 1)
	var g errgroup.Group
	end := func(err error) error {
		if err != nil && outer.Err() != nil {
			err = context.Cause(outer) // not what the stream made of it, which may be here before
		}
		if err != nil {
			cancel(err) // the first of all is what Cause returns from now on
		}
		return err
	}
	step := func(do func(context.Context, <-chan *chunk) error) chan<- *chunk {
		ch := make(chan *chunk, chunksAhead)
		g.Go(func() error {
			err := end(do(ctx, ch))
			for c := range ch {
				c.release() // the stream may wait for it
			}
			return err
		})
		return ch
	}
	steps := []chan<- *chunk{step(p.hashAll), step(p.writeAll), step(p.scanAll)}
	g.Go(func() error {
		err := end(p.readAll(ctx, in, steps))
		for _, ch := range steps {
			close(ch)
		}
		return err
	})
	if g.Wait() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (p *pipeline) readAll(ctx context.Context, in Blocks, steps []chan<- *chunk) error {
	for {
		if err := p.waitForRoom(ctx); err != nil {
			return err
		}
		start := time.Now()
		data, release, err := in.Next()
		p.timings.Read += time.Since(start)
		if errors.Is(err, io.EOF) {
			p.ended = time.Now()
			return nil
		}
		if err != nil {
			return fmt.Errorf("layer stream after %d bytes: %w", p.size, err)
		}
		c := &chunk{data: data, off: p.size, back: func() { p.give(int64(len(data)), release) }}
		c.refs.Store(int32(len(steps)))
		p.held.Add(int64(len(data)))
		p.size += int64(len(data))
		if err := pass(ctx, c, steps); err != nil {
			return err
		}
	}
}

// pass hands c to all steps; those that it does not reach any more are counted
// out of it.
func pass(ctx context.Context, c *chunk, steps []chan<- *chunk) error {
	for i, ch := range steps {
		select {
		case ch <- c:
		case <-ctx.Done():
			for range steps[i:] {
				c.release()
			}
			return context.Cause(ctx)
		}
	}
	return nil
}

// waitForRoom bounds what is held, so that what Next takes is the stream's time
// and not that of the steps.
func (p *pipeline) waitForRoom(ctx context.Context) error {
	for p.held.Load() >= ahead && ctx.Err() == nil {
		select {
		case <-p.room:
		case <-ctx.Done():
		}
	}
	return context.Cause(ctx)
}

func (p *pipeline) give(n int64, release func()) {
	release()
	p.held.Add(-n)
	select {
	case p.room <- struct{}{}:
	default:
	}
}

// next returns the next chunk of ch; ok is false at the stream's end.
func next(ctx context.Context, ch <-chan *chunk) (c *chunk, ok bool, err error) {
	select {
	case c, ok = <-ch:
	case <-ctx.Done():
		return nil, false, context.Cause(ctx)
	}
	if !ok && ctx.Err() != nil { // closed because the stream failed
		return nil, false, context.Cause(ctx)
	}
	return c, ok, nil
}

// each hands the chunks of ch to do, in order.
func each(ctx context.Context, ch <-chan *chunk, do func(data []byte)) error {
	for {
		c, ok, err := next(ctx, ch)
		if !ok {
			return err
		}
		do(c.data)
		c.release()
	}
}

func (p *pipeline) hashAll(ctx context.Context, ch <-chan *chunk) error {
	err := each(ctx, ch, func(data []byte) {
		start := time.Now()
		_, _ = p.hash.Write(data) // never fails
		p.timings.Hash += time.Since(start)
	})
	p.diffID = digest.NewDigest(digest.SHA256, p.hash)
	return err
}

func (p *pipeline) scanAll(ctx context.Context, ch <-chan *chunk) error {
	src := &chunkSource{next: func() (*chunk, bool, error) { return next(ctx, ch) }}
	defer src.drop()
	start := time.Now()
	t, err := scan(ctx, src, p.prefix)
	p.timings.Scan = time.Since(start) - src.waited
	if err != nil {
		return err
	}
	p.table = t
	src.drop()
	// What follows the end of the archive is the file's, but nobody's tree.
	return each(ctx, ch, func([]byte) {})
}

// chunkSource is the tar scan's end of the pipeline.
type chunkSource struct {
	next   func() (c *chunk, ok bool, err error)
	cur    *chunk
	rest   []byte
	waited time.Duration
}

// Read implements io.Reader.
func (s *chunkSource) Read(b []byte) (int, error) {
	if err := s.fill(); err != nil {
		return 0, err
	}
	n := copy(b, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// Skip implements source.
func (s *chunkSource) Skip(n int64) error {
	for n > 0 {
		if err := s.fill(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		m := min(n, int64(len(s.rest)))
		s.rest = s.rest[m:]
		n -= m
	}
	return nil
}

// fill sees to it that rest is not empty.
func (s *chunkSource) fill() error {
	if len(s.rest) > 0 {
		return nil
	}
	s.drop()
	start := time.Now()
	c, ok, err := s.next()
	s.waited += time.Since(start)
	switch {
	case err != nil:
		return err
	case !ok:
		return io.EOF
	}
	s.cur, s.rest = c, c.data
	return nil
}

func (s *chunkSource) drop() {
	if s.cur != nil {
		s.cur.release()
	}
	s.cur, s.rest = nil, nil
}
