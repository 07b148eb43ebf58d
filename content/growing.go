package content

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Growing follows an ingest while a client writes it. Its methods may be called
// at the same time, by several readers.
//
// It ends with the session: a COMMIT under the digest makes the bytes final;
// after an abort or a disconnect the bytes that were there stay readable and
// waiting for more fails; after a truncation nothing is readable. When the same
// ref goes on in a new session, or after a truncation, there is a new Growing.
type Growing struct {
	digest digest.Digest
	file   *os.File

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at every change
	n       int64
	done    bool  // committed
	gone    bool  // truncated: what was read may not be what is committed
	err     error // why it will not grow any more
}

func newGrowing(d digest.Digest, path string, n int64) (*Growing, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &Growing{digest: d, file: f, changed: make(chan struct{}), n: n}, nil
}

// ReadAt reads bytes from off and waits until at least one is there. Like a pipe
// it returns what there is, which may be less than asked. io.EOF comes at the
// blob's end, after COMMIT; the error of an ingest that ended otherwise wraps
// errdefs.ErrAborted. A wait ends with ctx.
func (g *Growing) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read of %s at %d: %w", g.digest, off, errdefs.ErrInvalidArgument)
	}
	if len(p) == 0 {
		return 0, nil
	}
	for {
		n, changed, err := g.state(off)
		if err != nil {
			return 0, err
		}
		if n > 0 {
			return g.read(p[:min(n, int64(len(p)))], off)
		}
		if err := wait(ctx, changed); err != nil {
			return 0, err
		}
	}
}

// state says how many bytes there are from off on; if none, either why there
// will be none, or what to wait for.
func (g *Growing) state(off int64) (n int64, changed <-chan struct{}, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.gone:
		return 0, nil, g.err
	case off < g.n:
		return g.n - off, nil, nil
	case g.done:
		return 0, nil, io.EOF
	}
	return 0, g.changed, g.err
}

func (g *Growing) read(p []byte, off int64) (int, error) {
	n, err := g.file.ReadAt(p, off)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.gone { // it may have happened between the look and the reading
		return 0, g.err
	}
	return n, err
}

// Verified waits for the COMMIT under the digest; nil says that every byte that
// was read belongs to the blob. A wait ends with ctx.
func (g *Growing) Verified(ctx context.Context) error {
	for {
		g.mu.Lock()
		done, changed, err := g.done, g.changed, g.err
		g.mu.Unlock()
		if done || err != nil {
			return err
		}
		if err := wait(ctx, changed); err != nil {
			return err
		}
	}
}

// Close frees the file. It may be called at any time and more than once; reads
// fail afterwards. A Growing that is only dropped is closed when it is collected.
func (g *Growing) Close() error {
	_ = g.file.Close() // read-only: nothing to lose, and a second call is allowed
	return nil
}

func wait(ctx context.Context, changed <-chan struct{}) error {
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// change applies f unless the Growing has ended, and wakes all who wait. A nil
// Growing is one that nobody asked for.
func (g *Growing) change(f func()) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.done || g.err != nil {
		return
	}
	f()
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *Growing) advance(n int64) { g.change(func() { g.n = n }) }

func (g *Growing) commit() { g.change(func() { g.done = true }) }

// fail ends it; bytes that are there stay readable.
func (g *Growing) fail(err error) { g.change(func() { g.err = err }) }

// truncate ends it and takes the bytes back. It is called before the file changes.
func (g *Growing) truncate() {
	g.change(func() {
		g.gone = true
		g.err = fmt.Errorf("the client started %s over: %w", g.digest, errdefs.ErrAborted)
	})
}
