package registry

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
)

// body is a reply's body, held to its announced length and watched while it is
// read. Time in which nobody reads does not count.
type body struct {
	r           *reply
	total, left int64
	chunked     bool // the reply did not tell its length
	stall       time.Duration
	timer       *time.Timer
}

func newBody(r *reply, n int64, stall time.Duration) *body {
	b := &body{r: r, total: n, left: n, chunked: r.resp.ContentLength < 0, stall: stall}
	b.timer = time.AfterFunc(stall, func() { r.cancel(errStalled) })
	b.timer.Stop()
	return b
}

func (b *body) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if b.left == 0 {
		return 0, b.end()
	}
	n, err := b.read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, io.EOF) && b.left == 0:
		return n, io.EOF
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return n, b.explain(err)
}

// read lets the request be cancelled when the host sends nothing.
func (b *body) read(p []byte) (int, error) {
	b.timer.Reset(b.stall)
	defer b.timer.Stop()
	return b.r.resp.Body.Read(p)
}

// end is asked after the last byte. Only a reply of unknown length can go on.
func (b *body) end() error {
	if !b.chunked {
		return io.EOF
	}
	n, err := b.read(make([]byte, 1))
	if n > 0 {
		return b.r.named(fmt.Errorf("more than the announced %d bytes: %w", b.total, errdefs.ErrFailedPrecondition))
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.EOF
	}
	return b.explain(err)
}

func (b *body) explain(err error) error {
	after := b.total - b.left
	switch cause := b.r.cause(); {
	case errors.Is(cause, errStalled):
		err = fmt.Errorf("no byte for %s after %d of %d: %w", b.stall, after, b.total, errdefs.ErrUnavailable)
	case errors.Is(cause, errClosed):
		return fmt.Errorf("read of a closed body: %w", io.ErrClosedPipe)
	case cause != nil:
		err = cause
	default:
		err = fmt.Errorf("broke off after %d of %d bytes: %w: %w", after, b.total, errdefs.ErrUnavailable, quiet{err})
	}
	return b.r.named(err)
}

// Close may be called while a Read waits, and ends it.
func (b *body) Close() error {
	b.timer.Stop()
	b.r.abandon()
	return nil
}
