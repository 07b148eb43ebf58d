// Package decompress turns the bytes of a layer blob into its tar stream.
//
// The format is found by its magic bytes; a media type is never asked, because
// it is only a claim. Everything is pulled: nothing is decoded before the
// caller reads, no goroutine is started, and memory is bounded by the input
// buffer and the largest window that is accepted (see [MaxWindow]).
//
// Bytes that were read are not verified until Read has returned io.EOF, which
// also means that the source itself has ended.
package decompress

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

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

// decoder is what the three libraries have in common, and a bufio.Reader too.
type decoder interface {
	io.Reader
	io.WriterTo
}

// Reader is the uncompressed stream. It is not safe for concurrent use.
type Reader struct {
	format Format
	dec    decoder
	src    *source
	buf    *bufio.Reader
	close  func()
	err    error // sticky: what ended the stream
}

var (
	_ io.ReadCloser = (*Reader)(nil)
	_ io.WriterTo   = (*Reader)(nil)
)

// NewReader reads the first bytes of r, waiting for them, and returns a Reader
// of what r holds uncompressed. Whatever is in none of the known formats, an
// empty stream included, is given back as it is.
//
// Every later read of r is preceded by a check of ctx; whoever lets a read of r
// block must make it end with ctx himself. Errors of r are returned as they
// are, never as ErrCorrupt. Close does not close r.
func NewReader(ctx context.Context, r io.Reader) (*Reader, error) {
	src := newSource(ctx, r)
	d := &Reader{src: src, buf: bufio.NewReaderSize(src, inputBuffer), close: func() {}}
	format, err := sniff(d.buf)
	if err != nil {
		return nil, d.classify(err)
	}
	d.format = format
	switch format {
	case Gzip:
		d.dec = newGzipReader(d.buf)
	case Zstd:
		d.dec, d.close, err = newZstdReader(d.buf)
	case LZ4:
		d.dec, err = newLZ4Reader(d.buf)
	default:
		d.dec = d.buf
	}
	if err != nil {
		return nil, fmt.Errorf("prepare %s decoder: %w", format, err)
	}
	return d, nil
}

// Format says what the source holds.
func (d *Reader) Format() Format { return d.format }

// Read returns uncompressed bytes. io.EOF means that all checksums of the
// stream matched and that the source has ended; every error repeats.
func (d *Reader) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := d.dec.Read(p)
	if err != nil {
		d.err = d.classify(err)
	}
	return n, d.err
}

// WriteTo writes all that is left to w, sparing the copy that Read makes.
// An error of w is returned as it is and ends the stream.
func (d *Reader) WriteTo(w io.Writer) (int64, error) {
	if errors.Is(d.err, io.EOF) {
		return 0, nil
	}
	if d.err != nil {
		return 0, d.err
	}
	out := &sink{w: w}
	_, err := d.dec.WriteTo(out)
	switch {
	case out.err != nil:
		d.err = out.err
	case err != nil:
		d.err = d.classify(err)
	default:
		d.err = d.classify(io.EOF)
	}
	if errors.Is(d.err, io.EOF) {
		return out.n, nil
	}
	return out.n, d.err
}

// Close frees the decoder's memory; Read fails from then on. It can be called
// again.
func (d *Reader) Close() error {
	if !errors.Is(d.err, os.ErrClosed) {
		d.close()
		d.err = fmt.Errorf("read of a closed %s stream: %w", d.format, os.ErrClosed)
	}
	return nil
}

// classify tells the source's errors from damage. The decoders hide errors of
// their input in different ways (klauspost zstd takes io.ErrUnexpectedEOF
// between frames for the end), so the source's own record goes first.
func (d *Reader) classify(err error) error {
	if d.src.err != nil {
		return d.src.err
	}
	switch {
	case errors.Is(err, io.EOF):
		return io.EOF
	case errors.Is(err, io.ErrNoProgress), errors.Is(err, ErrCorrupt):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%s stream ends after %d bytes, before its own end: %w: %w", d.format, d.src.n, ErrCorrupt, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("%s stream, within its first %d bytes: %w: %w", d.format, d.src.n, ErrCorrupt, err)
}

// source counts what was read and keeps the error that ended it.
type source struct {
	read func([]byte) (int, error)
	n    int64
	err  error // other than io.EOF
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
	n, err := s.read(p)
	s.n += int64(n)
	// Compared by identity as readers do: a wrapped io.EOF is no end of file.
	if err != nil && err != io.EOF { //nolint:errorlint // see above
		s.err = err
	}
	return n, err
}

// sink counts what was written and keeps the writer's error.
type sink struct {
	w   io.Writer
	n   int64
	err error
}

func (s *sink) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.n += int64(n)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		s.err = err
	}
	return n, err
}
