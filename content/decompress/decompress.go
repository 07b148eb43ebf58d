// Package decompress turns the bytes of a layer blob into its tar stream.
//
// The format is found by its magic bytes; a media type is never asked, because
// it is only a claim. A gzip source is read ahead by package deflate. In all other
// formats it is read by whoever reads the stream, and never while there is output
// to return; what can be decoded on its own (zstd frames, independent LZ4 blocks)
// is decoded on workers meanwhile, which only compute.
//
// Memory is bounded by a [Budget] that any number of readers share.
//
// Bytes that were read are not verified until Read or Next has returned io.EOF,
// which also means that the source itself has ended.
package decompress

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"

	"github.com/containerd/errdefs"
)

// ErrCorrupt says that the compressed bytes are damaged, end too early, or ask
// for more memory than [MaxWindow] allows. It is also errdefs.ErrInvalidArgument.
// A stream that ends too early is io.ErrUnexpectedEOF as well.
var ErrCorrupt = fmt.Errorf("compressed data is corrupt: %w", errdefs.ErrInvalidArgument)

// MaxWindow is the largest zstd window that is accepted, in bytes: what
// `zstd --ultra -22` writes. Larger ones (`--long=28` and up) are refused.
// The decoder holds up to twice the window, and touches only what it fills.
const MaxWindow = 128 << 20

// inputBuffer is how much compressed data is asked of the source at once.
const inputBuffer = 128 << 10

// block is a piece of output, and what gives it back.
type block struct {
	data    []byte
	release func()
}

// decoder makes blocks of the input, none of them empty.
type decoder interface {
	next() (block, error)
	// close ends the goroutines. Blocks that were returned stay valid.
	close()
}

// Option is an option of NewReader.
type Option func(*options)

type options struct {
	budget  *Budget
	workers int
	idle    idleFunc
}

// WithBudget has the reader share b with others. Without it a reader has
// [DefaultBudget] for itself.
func WithBudget(b *Budget) Option { return func(o *options) { o.budget = b } }

// WithIdle has each wait of the reader for memory that other readers hold run by
// idle, with the context of NewReader and on the goroutine that called NewReader
// or reads. If those readers need something that the caller has (a place among
// the readers that may work), idle lends it to them meanwhile: otherwise they
// would wait for each other.
func WithIdle(idle func(ctx context.Context, wait func() error) error) Option {
	return func(o *options) { o.idle = idle }
}

func newOptions(opts []Option) options {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	if o.budget == nil {
		o.budget = NewBudget(DefaultBudget)
	}
	if o.workers < 1 {
		o.workers = runtime.GOMAXPROCS(0)
	}
	if o.idle == nil {
		o.idle = idleHere
	}
	return o
}

// Reader is the uncompressed stream. It is not safe for concurrent use.
type Reader struct {
	format  Format
	dec     decoder
	src     *source
	mem     *memory
	current block // what Read has not returned all of
	err     error // sticky: what ended the stream
}

var (
	_ io.ReadCloser = (*Reader)(nil)
	_ io.WriterTo   = (*Reader)(nil)
)

// NewReader waits for a share of the budget, reads the first bytes of r, waiting
// for them, and returns a Reader of what r holds uncompressed. Whatever is in
// none of the known formats, an empty stream included, is given back as it is.
//
// Every later read of r is preceded by a check of ctx; whoever lets a read of r
// block must make it end with ctx himself. Errors of r are returned as they
// are, never as ErrCorrupt. Close does not close r, but must be called.
func NewReader(ctx context.Context, r io.Reader, opts ...Option) (*Reader, error) {
	o := newOptions(opts)
	mem, err := newMemory(ctx, o.budget, o.idle)
	if err != nil {
		return nil, err
	}
	d := &Reader{src: newSource(ctx, r), mem: mem}
	br := bufio.NewReaderSize(d.src, inputBuffer)
	if d.format, err = sniff(br); err != nil {
		mem.close()
		return nil, d.classify(err)
	}
	if d.dec, err = newDecoder(d.format, br, d.src, mem, o.workers); err != nil {
		mem.close()
		return nil, fmt.Errorf("prepare %s decoder: %w", d.format, err)
	}
	return d, nil
}

func newDecoder(format Format, br *bufio.Reader, src io.Reader, mem *memory, workers int) (decoder, error) {
	switch format {
	case Gzip:
		return newGzipDecoder(&unbuffered{br, src}, mem, workers)
	case Zstd:
		return newAhead(newZstdPlanner(br, mem, workers), workers), nil
	case LZ4:
		return newAhead(newLZ4Planner(br, mem), workers), nil
	case AppleLZ4:
		return newAhead(newApplePlanner(br, mem), workers), nil
	}
	return newAhead(&plainPlanner{br: br, mem: mem}, workers), nil
}

// Format says what the source holds.
func (d *Reader) Format() Format { return d.format }

// Next returns the next bytes of the stream, some KiB to a few MiB. They stay
// valid and unchanged until release is called, exactly once and from any
// goroutine, also after Close. io.EOF means that all checksums of the stream
// matched and that the source has ended; every error repeats.
//
// What is not released is bounded: Next may wait for earlier blocks, so who
// calls it must be able to release all of them without another Next.
func (d *Reader) Next() (data []byte, release func(), err error) {
	b, err := d.take()
	return b.data, b.release, err
}

// take returns what is left of the current block, or the next one.
func (d *Reader) take() (block, error) {
	if d.err != nil {
		return block{}, d.err
	}
	if b := d.current; b.release != nil {
		d.current = block{}
		return b, nil
	}
	b, err := d.dec.next()
	if err != nil {
		d.err = d.classify(err)
	}
	return b, d.err
}

// Read returns uncompressed bytes; errors are those of Next.
func (d *Reader) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	b, err := d.take()
	if err != nil {
		return 0, err
	}
	n := copy(p, b.data)
	if b.data = b.data[n:]; len(b.data) == 0 {
		b.release()
	} else {
		d.current = b
	}
	return n, nil
}

// WriteTo writes all that is left to w, sparing the copy that Read makes.
// An error of w is returned as it is and ends the stream.
func (d *Reader) WriteTo(w io.Writer) (total int64, err error) {
	for {
		b, err := d.take()
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(b.data)
		if err == nil && n < len(b.data) {
			err = io.ErrShortWrite
		}
		b.release()
		total += int64(n)
		if err != nil {
			d.err = err
			return total, err
		}
	}
}

// Close ends the workers and frees the memory that no block holds; Read and Next
// fail from then on. It can be called again. A read of a gzip source may be under
// way: Close waits for it, so who closes early ends the source's context before.
func (d *Reader) Close() error {
	if errors.Is(d.err, os.ErrClosed) {
		return nil
	}
	if d.current.release != nil {
		d.current.release()
		d.current = block{}
	}
	d.dec.close()
	d.mem.close()
	d.err = fmt.Errorf("read of a closed %s stream: %w", d.format, os.ErrClosed)
	return nil
}

// classify tells the source's errors, and those of waiting, from damage. The
// libraries hide errors of their input in different ways (klauspost zstd takes
// io.ErrUnexpectedEOF between frames for the end), so the source's own record
// goes first.
func (d *Reader) classify(err error) error {
	if err := d.src.failed(); err != nil {
		return err
	}
	if d.mem.err != nil {
		return d.mem.err
	}
	switch {
	case errors.Is(err, io.EOF):
		return io.EOF
	case errors.Is(err, io.ErrNoProgress), errors.Is(err, ErrCorrupt):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%s stream ends after %d bytes, before its own end: %w: %w", d.format, d.src.n.Load(), ErrCorrupt, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("%s stream, within its first %d bytes: %w: %w", d.format, d.src.n.Load(), ErrCorrupt, err)
}

// source counts what was read and keeps the error that ended it. One goroutine
// reads, another asks.
type source struct {
	read func([]byte) (int, error)
	n    atomic.Int64
	err  atomic.Pointer[error] // other than io.EOF
}

// newSource binds ctx in a closure, not in the struct: it is the ctx of one
// operation, the reading of this stream.
func newSource(ctx context.Context, r io.Reader) *source {
	return &source{read: func(p []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return r.Read(p)
	}}
}

func (s *source) Read(p []byte) (int, error) {
	if err := s.failed(); err != nil {
		return 0, err // a decoder that only looked ahead may not have kept it
	}
	n, err := s.read(p)
	s.n.Add(int64(n))
	// Compared by identity as readers do: a wrapped io.EOF is no end of file.
	if err != nil && err != io.EOF { //nolint:errorlint // see above
		s.err.Store(&err)
	}
	return n, err
}

func (s *source) failed() error {
	if err := s.err.Load(); err != nil {
		return *err
	}
	return nil
}
