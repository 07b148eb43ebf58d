package pull

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/gantryd/gantry/content/transfer"
)

// briefly is how long a worker waits for bytes before it serves another layer.
const briefly = 200 * time.Millisecond

// errRestart means that bytes already read turned out not to be the blob's.
var errRestart = errors.New("bytes below the reader were fetched anew")

// errEnded is why the reading of an unpack ends that needs no more bytes. It
// hides no other reason.
var errEnded = errors.New("the unpack needs no more bytes")

// follower reads the compressed bytes of an unpack in order, from one source: a
// transfer or, after it failed, the ingest of the client that goes on where the
// transfer stopped, which has the transfer's bytes too.
//
// One goroutine at a time reads it, which need not be the one that unpacks: that
// one looks at the members only after the decompressor is closed.
type follower struct {
	u *unpack
	*lease
	off  int64
	err  error // why the bytes ended early, for explain
	lost error // why the last source failed
}

// reader binds the follower to a context: decompressors know only io.Reader.
func (f *follower) reader(ctx context.Context) io.Reader {
	return readerFunc(func(p []byte) (int, error) { return f.read(ctx, p) })
}

type readerFunc func([]byte) (int, error)

func (r readerFunc) Read(p []byte) (int, error) { return r(p) }

func (f *follower) read(ctx context.Context, p []byte) (int, error) {
	f.u.clock.input(1)
	defer f.u.clock.input(-1)
	for {
		source, err := f.source(ctx)
		if err != nil {
			return 0, f.fail(err)
		}
		if end, ok := source.End(); ok && f.off >= end {
			// Whether they are the blob's own bytes is asked later, while the layer
			// file is made durable.
			return 0, io.EOF
		}
		n, err := f.readAt(ctx, source, p)
		if n > 0 {
			f.off += int64(n)
			f.u.read.Store(f.off)
			if d, ok := source.(discarder); ok {
				d.Discard(f.off)
			}
			return n, nil
		}
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err := f.give(ctx, source, err); err != nil {
			return 0, f.fail(err)
		}
	}
}

// readAt reads from the source. A worker is for decompressing: after a moment
// without bytes the follower waits without one, so that a registry that stalls
// does not hold up the layers of another.
func (f *follower) readAt(ctx context.Context, source byteSource, p []byte) (int, error) {
	soon, cancel := context.WithTimeout(ctx, briefly)
	n, err := source.ReadAt(soon, p, f.off)
	cancel()
	if n > 0 || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return n, err
	}
	err = f.idle(ctx, func() error {
		n, err = source.ReadAt(ctx, p, f.off)
		return err
	})
	return n, err
}

func (f *follower) fail(err error) error {
	if !errors.Is(err, errEnded) {
		f.err = err
	}
	return err
}

// explain prefers the reason why the bytes ended to what a decompressor or the
// tar scanner made of their end.
func (f *follower) explain(err error) error {
	if f.err != nil {
		return f.err
	}
	return err
}

// source returns where to read. It waits, with patience, where there is none.
func (f *follower) source(ctx context.Context) (byteSource, error) {
	source, changed := f.u.current()
	if source != nil {
		return source, nil
	}
	err := f.idle(ctx, func() error {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		select {
		case <-changed:
			source, _ = f.u.current()
		case <-timer.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if source == nil {
		return nil, errors.Join(errNoBytes, f.lost)
	}
	return source, nil
}

// give deals with the error of a source. Only nil lets the follower read on; bytes
// of two sources are never put together, for the one that is verified in the end
// vouches for its own bytes only.
func (f *follower) give(ctx context.Context, source byteSource, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, transfer.ErrRestarted):
		return errRestart
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	f.lost = err
	f.u.drop(source)
	if f.off > 0 {
		return errRestart
	}
	return nil
}

// verified waits until a source vouches for the digest of the bytes.
func (f *follower) verified(ctx context.Context) error {
	for {
		source, err := f.source(ctx)
		if err != nil {
			return err
		}
		if err = source.Verified(ctx); err == nil {
			return nil
		}
		if err := f.give(ctx, source, err); err != nil {
			return err
		}
	}
}
