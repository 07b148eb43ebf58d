package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// ErrRestarted says that bytes which were handed out turned out wrong and the blob is fetched again: what was made of
// them must be thrown away and reading starts at 0.
var ErrRestarted = fmt.Errorf("the bytes read so far were wrong and are fetched again: %w", errdefs.ErrAborted)

// Handle is one waiter of a transfer. Safe for concurrent use; every handle must be closed.
type Handle struct {
	m    *Manager
	job  *job
	once sync.Once

	// Guarded by job.mu.
	generation int  // which the bytes read belong to
	read       bool // something was read of that generation
	closed     bool
}

// Digest of the blob.
func (h *Handle) Digest() digest.Digest { return h.job.blob.Digest }

// Size of the blob in bytes, as asked for.
func (h *Handle) Size() int64 { return h.job.blob.Size }

// Frontier is the first missing byte. It falls only when the blob is fetched again after a digest mismatch.
func (h *Handle) Frontier() int64 {
	h.job.mu.Lock()
	defer h.job.mu.Unlock()
	return h.job.frontier
}

// Started is when the transfer began, which may be before this handle joined it.
func (h *Handle) Started() time.Time { return h.job.started }

// Fetched is how many bytes came over the network so far, those of broken and repeated requests too.
func (h *Handle) Fetched() int64 { return h.job.received.Load() }

// Timings says where the time went so far: until the first byte, from there to the last, and from there to verified
// and durable. Bytes that were on disk already count as received when they are needed: then wait is the whole time
// until all are there.
func (h *Handle) Timings() (wait, download, verify time.Duration) {
	j := h.job
	j.mu.Lock()
	defer j.mu.Unlock()
	end := j.finished
	if end.IsZero() {
		end = time.Now()
	}
	last := j.lastByte
	if last.IsZero() {
		last = end
	}
	first := j.firstByte
	if first.IsZero() {
		first = last
	}
	return first.Sub(j.started), last.Sub(first), end.Sub(last)
}

// Wait returns nil when the blob is complete, its digest verified and its data durable, unless it is Discarding. It returns ErrRestarted if this
// handle has read bytes that were wrong and has not started again, the transfer's error if it failed, and the cause of ctx.
func (h *Handle) Wait(ctx context.Context) error {
	j := h.job
	select {
	case <-j.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err != nil {
		return j.err
	}
	if h.read && h.generation != j.generation {
		return fmt.Errorf("blob %s: %w", j.blob.Digest, ErrRestarted)
	}
	return nil
}

// ReadAt waits until at least one byte at off is there and reads what is below the frontier; n may be less than
// len(p) without an error. io.EOF at the blob's size comes only when the digest is verified. When the transfer fails,
// bytes below the frontier stay readable and beyond it its error is returned. After ErrRestarted every read of this
// handle fails so until one at 0.
func (h *Handle) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("blob %s: read at %d: %w", h.job.blob.Digest, off, errdefs.ErrInvalidArgument)
	}
	if len(p) == 0 {
		return 0, nil
	}
	for {
		data, n, changed, err := h.look(off)
		if err != nil {
			return 0, err
		}
		if data != nil {
			n, err := data.ReadAt(p[:min(int64(len(p)), n)], off)
			if errors.Is(err, os.ErrClosed) { // a restart or our Close came between
				continue
			}
			if n > 0 {
				return n, nil
			}
			return 0, fmt.Errorf("blob %s: read back: %w", h.job.blob.Digest, err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// look says what a read at off gets now: n > 0 bytes of a file, an error, or nothing until the channel is closed.
func (h *Handle) look(off int64) (data *os.File, n int64, changed <-chan struct{}, err error) {
	j := h.job
	j.mu.Lock()
	defer j.mu.Unlock()
	if h.closed {
		return nil, 0, nil, fmt.Errorf("blob %s: %w", j.blob.Digest, fs.ErrClosed)
	}
	if h.generation != j.generation {
		if h.read && off > 0 {
			return nil, 0, nil, fmt.Errorf("blob %s: %w", j.blob.Digest, ErrRestarted)
		}
		h.generation, h.read = j.generation, false
		j.rereads(h)
	}
	switch {
	case off < j.frontier:
		if err := j.admit(h, off); err != nil {
			return nil, 0, nil, err
		}
		h.read = true
		j.reads(h)
		return j.folder.data, j.frontier - off, nil, nil
	case j.err != nil:
		return nil, 0, nil, j.err
	case off >= j.blob.Size && j.verified:
		return nil, 0, nil, io.EOF
	}
	return nil, 0, j.changed, nil
}

// LinkTo gives the finished, durable data file one more name; a file that is there already is fine. The caller makes
// the name durable by an fsync of its folder. errdefs.ErrFailedPrecondition while the transfer is not complete, and
// if it is Discarding.
func (h *Handle) LinkTo(path string) error {
	j := h.job
	j.mu.Lock()
	defer j.mu.Unlock()
	if h.closed {
		return fmt.Errorf("blob %s: %w", j.blob.Digest, fs.ErrClosed)
	}
	if j.phase != PhaseComplete || j.discard != nil && !j.discard.durable {
		return fmt.Errorf("blob %s is not complete, or not kept, link %s: %w", j.blob.Digest, path, errdefs.ErrFailedPrecondition)
	}
	if err := linkFile(j.folder.data, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("blob %s: %w", j.blob.Digest, err)
	}
	return nil
}

// Close gives up waiting. When the last waiter leaves, the transfer goes on for Options.Grace and then stops, resumable.
// A second call does nothing.
//
//nolint:contextcheck // leaving waits for nothing
func (h *Handle) Close() error {
	h.once.Do(func() {
		h.job.mu.Lock()
		h.closed = true
		h.job.dismiss(h)
		data := h.job.readThrough(h)
		h.job.mu.Unlock()
		if data != nil {
			h.job.shared.dropPages(data, 0, 0)
		}
		if h.m.leave(h.job) {
			h.m.retire(context.Background(), h.job)
		}
	})
	return nil
}
