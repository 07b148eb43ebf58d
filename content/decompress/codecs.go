package decompress

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// gzipReader decodes members one after the other. It drives the library
// member by member, because the library takes whatever follows a member for a
// damaged one, while gzip(1) stops there: zero padding and other bytes that do
// not start with the magic are not part of the stream.
type gzipReader struct {
	br *bufio.Reader
	zr *gzip.Reader // nil until the first read
}

func newGzipReader(br *bufio.Reader) *gzipReader { return &gzipReader{br: br} }

// member opens the next member. io.EOF says that there is none.
func (g *gzipReader) member() error {
	if g.zr == nil {
		g.zr = new(gzip.Reader)
	} else if err := g.more(); err != nil {
		return err
	}
	if err := g.zr.Reset(g.br); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // the magic was there: the header is cut short
		}
		return err
	}
	g.zr.Multistream(false)
	return nil
}

// more returns nil if another member follows. Otherwise it reads what is left
// to the source's end and returns io.EOF.
func (g *gzipReader) more() error {
	head, err := g.br.Peek(2)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if isGzip(head) {
		return nil
	}
	if _, err := io.Copy(io.Discard, g.br); err != nil {
		return err
	}
	return io.EOF
}

func (g *gzipReader) Read(p []byte) (int, error) {
	if g.zr == nil {
		if err := g.member(); err != nil {
			return 0, err
		}
	}
	for {
		n, err := g.zr.Read(p)
		if err == nil || !errors.Is(err, io.EOF) {
			return n, err
		}
		// Also taken with n > 0: the next member is opened now or never.
		if err := g.member(); err != nil || n > 0 {
			return n, err
		}
	}
}

func (g *gzipReader) WriteTo(w io.Writer) (total int64, err error) {
	if g.zr == nil {
		if err := g.member(); err != nil {
			return 0, err
		}
	}
	for {
		n, err := g.zr.WriteTo(w)
		total += n
		if err != nil {
			return total, err
		}
		if err := g.member(); err != nil {
			if errors.Is(err, io.EOF) {
				return total, nil
			}
			return total, err
		}
	}
}

// newZstdReader decodes in the caller's goroutine: measured faster as a stream
// than the library's pipeline, and nothing is decoded ahead of the caller. The
// library's low-memory mode moves the whole window for every MiB of output: 1.06
// GB/s instead of 1.62 here, for 10 MB instead of 17. It stays off. The bound on "memory" is needed beside that on the window: a
// frame of one segment has no window but its whole size.
func newZstdReader(br *bufio.Reader) (decoder, func(), error) {
	zr, err := zstd.NewReader(br,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(false),
		zstd.WithDecoderMaxWindow(MaxWindow),
		zstd.WithDecoderMaxMemory(MaxWindow),
		zstd.WithDecodeBuffersBelow(0),
	)
	if err != nil {
		return nil, nil, err
	}
	return zstdReader{zr}, zr.Close, nil
}

// zstdReader puts words to the refusals that are about memory, not damage.
type zstdReader struct{ *zstd.Decoder }

func (z zstdReader) Read(p []byte) (int, error) {
	n, err := z.Decoder.Read(p)
	return n, explainZstd(err)
}

func (z zstdReader) WriteTo(w io.Writer) (int64, error) {
	n, err := z.Decoder.WriteTo(w)
	return n, explainZstd(err)
}

func explainZstd(err error) error {
	if errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded) {
		return fmt.Errorf("zstd window of more than %d MiB is not supported, compress the layer without --long: %w: %w", MaxWindow>>20, ErrCorrupt, err)
	}
	return err
}

// newLZ4Reader decodes in the caller's goroutine; the library's parallel mode
// leaves goroutines behind when a stream is given up halfway.
func newLZ4Reader(br *bufio.Reader) (decoder, error) {
	zr := lz4.NewReader(br)
	if err := zr.Apply(lz4.ConcurrencyOption(1)); err != nil {
		return nil, err
	}
	return zr, nil
}
