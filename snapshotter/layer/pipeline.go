package layer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	chunkSize = 1 << 20
	// chunksPerWrite bounds the memory of one Write, in chunks.
	chunksPerWrite = 8
	pageSize       = 4096
	// writeBackEvery is how much is written before the kernel is told to begin
	// putting it on disk, in bytes.
	writeBackEvery = 8 << 20
)

var zeroPage [pageSize]byte

var chunkPool = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// Timings say where the time of a Write went. The steps overlap, so their sum
// is more than Total.
type Timings struct {
	Read  time.Duration // waiting for the stream
	Hash  time.Duration
	Write time.Duration // into the page cache, starting write-back included
	Scan  time.Duration
	Sync  time.Duration // making the file durable once all was written
	Total time.Duration
}

// chunk is a part of the stream that all steps look at; the last one to release
// it gives it back to the reader.
type chunk struct {
	buf  *[chunkSize]byte
	data []byte
	off  int64
	refs atomic.Int32
	free chan<- *chunk
}

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 {
		c.free <- c // has room for every chunk there is
	}
}

// pipeline takes one stream through hash, file and scan at the same time, each
// step on its own goroutine.
type pipeline struct {
	in       io.Reader
	file     *os.File
	progress func(int64)
	prefix   int

	free              chan *chunk
	hash, write, scan chan *chunk

	size    int64
	diffID  digest.Digest
	table   *Table
	timings Timings
}

// run returns when all steps have ended. A Read of the stream that blocks must
// end with ctx: nothing else can end it.
func (p *pipeline) run(ctx context.Context) error {
	p.free = make(chan *chunk, chunksPerWrite)
	for _, ch := range []*chan *chunk{&p.hash, &p.write, &p.scan} {
		*ch = make(chan *chunk, chunksPerWrite)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.readAll(ctx) })
	g.Go(func() error { return p.hashAll(ctx) })
	g.Go(func() error { return p.writeAll(ctx) })
	g.Go(func() error { return p.scanAll(ctx) })
	err := g.Wait()
	if err == nil {
		p.giveBack()
	}
	return err
}

// giveBack returns the buffers; after an error some are still in channels and
// left to the garbage collector.
func (p *pipeline) giveBack() {
	for {
		select {
		case c := <-p.free:
			chunkPool.Put(c.buf)
		default:
			return
		}
	}
}

func (p *pipeline) readAll(ctx context.Context) error {
	defer close(p.hash)
	defer close(p.write)
	defer close(p.scan)
	made := 0
	for {
		c, err := p.nextChunk(ctx, &made)
		if err != nil {
			return err
		}
		n, err := p.fill(ctx, c.buf[:])
		if n > 0 {
			c.data, c.off = c.buf[:n], p.size
			p.size += int64(n)
			c.refs.Store(3)
			p.hash <- c // all three have room for every chunk there is
			p.write <- c
			p.scan <- c
		} else {
			p.free <- c
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("layer stream after %d bytes: %w", p.size, err)
		}
	}
}

func (p *pipeline) nextChunk(ctx context.Context, made *int) (*chunk, error) {
	select {
	case c := <-p.free:
		return c, nil
	default:
	}
	if *made < chunksPerWrite {
		*made++
		return &chunk{buf: chunkPool.Get().(*[chunkSize]byte), free: p.free}, nil
	}
	select {
	case c := <-p.free:
		return c, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// fill reads until buf is full, so that every chunk but the last begins on a
// multiple of its size.
func (p *pipeline) fill(ctx context.Context, buf []byte) (n int, err error) {
	empty := 0
	for n < len(buf) && err == nil {
		if ctx.Err() != nil {
			return n, context.Cause(ctx)
		}
		start := time.Now()
		var m int
		m, err = p.in.Read(buf[n:])
		p.timings.Read += time.Since(start)
		n += m
		if m > 0 {
			empty = 0
		} else if empty++; empty == 100 && err == nil {
			err = io.ErrNoProgress
		}
	}
	return n, err
}

// each hands the chunks of ch to step, in order.
func each(ctx context.Context, ch <-chan *chunk, step func(*chunk) error) error {
	for {
		select {
		case c, ok := <-ch:
			if !ok {
				return nil
			}
			err := step(c)
			c.release()
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (p *pipeline) hashAll(ctx context.Context) error {
	h := sha256.New()
	err := each(ctx, p.hash, func(c *chunk) error {
		start := time.Now()
		h.Write(c.data)
		p.timings.Hash += time.Since(start)
		return nil
	})
	p.diffID = digest.NewDigest(digest.SHA256, h)
	return err
}

func (p *pipeline) writeAll(ctx context.Context) error {
	var done, flushed int64
	err := each(ctx, p.write, func(c *chunk) error {
		start := time.Now()
		defer func() { p.timings.Write += time.Since(start) }()
		if err := writeSparse(p.file, c.data, c.off); err != nil {
			return fmt.Errorf("write layer file: %w", err)
		}
		done = c.off + int64(len(c.data))
		if done-flushed >= writeBackEvery {
			// Only a hint: what goes wrong here, fsync reports.
			_ = unix.SyncFileRange(int(p.file.Fd()), flushed, done-flushed, unix.SYNC_FILE_RANGE_WRITE)
			flushed = done
		}
		if p.progress != nil {
			p.progress(done)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := p.file.Truncate(done); err != nil {
		return fmt.Errorf("size of layer file: %w", err)
	}
	return nil
}

// writeSparse writes data at off, a multiple of the page size, and leaves out
// the pages that are all zeros.
func writeSparse(f io.WriterAt, data []byte, off int64) error {
	for at := 0; at < len(data); {
		end := at
		for end < len(data) && !isZero(data[end:min(end+pageSize, len(data))]) {
			end += pageSize
		}
		end = min(end, len(data))
		if end > at {
			if _, err := f.WriteAt(data[at:end], off+int64(at)); err != nil {
				return err
			}
		}
		at = end + pageSize // the page at end is zeros, or there is none
	}
	return nil
}

func isZero(page []byte) bool { return bytes.Equal(page, zeroPage[:len(page)]) }

func (p *pipeline) scanAll(ctx context.Context) error {
	src := &chunkSource{done: ctx.Done(), cause: func() error { return context.Cause(ctx) }, ch: p.scan}
	start := time.Now()
	t, err := scan(ctx, src, p.prefix)
	p.timings.Scan = time.Since(start) - src.waited
	if err != nil {
		return err
	}
	p.table = t
	src.drop()
	// What follows the end of the archive is the file's, but nobody's tree.
	return each(ctx, p.scan, func(*chunk) error { return nil })
}

// chunkSource is the tar scan's end of the pipeline.
type chunkSource struct {
	ch     <-chan *chunk
	done   <-chan struct{}
	cause  func() error
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
	defer func() { s.waited += time.Since(start) }()
	select {
	case c, ok := <-s.ch:
		if !ok {
			return io.EOF
		}
		s.cur, s.rest = c, c.data
		return nil
	case <-s.done:
		return s.cause()
	}
}

func (s *chunkSource) drop() {
	if s.cur != nil {
		s.cur.release()
	}
	s.cur, s.rest = nil, nil
}
