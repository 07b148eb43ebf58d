package transfer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/gantryd/gantry/content/clone"
)

// CloneTo gives f the contiguous part from off on, as far as it reaches now, of a transfer that runs or failed; where
// the file system can, both files share the blocks. What f has below off is the caller's business. The bytes are not
// verified unless the transfer is complete. It returns how many bytes from off on are in f, also with an error;
// none after ErrRestarted: the bytes turned out wrong meanwhile, and so may be what f has got;
// and none where bytes were discarded.
func (h *Handle) CloneTo(ctx context.Context, f *os.File, off int64) (int64, error) {
	j := h.job
	j.mu.Lock()
	closed, end, generation := h.closed, j.frontier, j.generation
	var data *os.File
	if j.folder != nil {
		data = j.folder.data
	}
	if d := j.discard; d != nil && !d.durable {
		if d.gone > 0 {
			end = 0 // nothing to go on from
		}
		d.copies++
		defer func() {
			j.mu.Lock()
			defer j.mu.Unlock()
			d.copies--
			d.wake()
		}()
	}
	j.mu.Unlock()
	if closed {
		return 0, fmt.Errorf("blob %s: %w", j.blob.Digest, fs.ErrClosed)
	}
	if off >= end || data == nil {
		return 0, nil
	}
	n, err := clone.Range(ctx, f, data, off, end)
	if j.currentGeneration() != generation {
		return 0, fmt.Errorf("blob %s: %w", j.blob.Digest, ErrRestarted)
	}
	if errors.Is(err, os.ErrClosed) && h.moved(data) { // the same bytes are in another folder now
		m, err := h.CloneTo(ctx, f, off+n)
		if errors.Is(err, ErrRestarted) {
			return 0, err
		}
		return n + m, err
	}
	if err != nil && ctx.Err() == nil {
		return n, fmt.Errorf("blob %s: %w", j.blob.Digest, err)
	}
	return n, err
}

// moved reports whether the bytes are read from another file than before.
func (h *Handle) moved(data *os.File) bool {
	h.job.mu.Lock()
	defer h.job.mu.Unlock()
	return !h.closed && h.job.folder.data != data
}
