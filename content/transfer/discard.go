package transfer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// DiscardChunk is how many bytes of a discarded blob one of its checksums is over; of the last one, what is left.
const DiscardChunk = 1 << 20

// ErrDiscarded is what a read of bytes gets that were given up because everybody had read them.
var ErrDiscarded = fmt.Errorf("the bytes were read once and discarded: %w", errdefs.ErrFailedPrecondition)

// discarding belongs to a job that does not keep its bytes: what lies below every reader's mark, is hashed and has its
// checksum is punched out of the file at once, before the kernel writes it back. Nothing is given up before somebody
// calls Handle.Discard: a blob that nobody unpacks is there in full.
//
// What was given up cannot be read any more, not even as zeros: reads are for [gone, frontier). So a job that gave
// something up is good for nobody who comes later, and offers nothing to continue from when it fails. It works in a
// folder that no other process looks at (discardfolder.go), and nothing of it is left when it ends or its process dies. After
// a digest mismatch everything is fetched again and kept, because finding out who lied takes the bytes.
//
// Guarded by job.mu, but for keeping and blind.
type discarding struct {
	kick    chan struct{} // holds a token when there may be something to do
	stop    context.CancelFunc
	keeping sync.Mutex // held while the data is made durable

	readers map[*Handle]int64   // handles that read: what lies below is needed by them no more
	copies  int                 // who copies from the data just now
	final   bool                // nobody reads any more: the checksums are all that is wanted
	off     bool                // nothing more is given up
	durable bool                // the data is kept, as that of any other job
	hashed  int64               // bytes that the blob's digest was computed over so far
	sums    [][sha256.Size]byte // of the chunks that are hashed
	gone    int64               // bytes below may be punched out; at a border of a chunk
	blind   bool                // the file system cannot punch; only discardAll looks
	err     error               // why there are no more sums
}

func newDiscarding() *discarding {
	return &discarding{kick: make(chan struct{}, 1), stop: func() {}, readers: map[*Handle]int64{}}
}

func (d *discarding) wake() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// limit is up to where bytes may be given up. Called with job.mu held.
func (d *discarding) limit(size int64) int64 {
	if d.off || d.copies > 0 || len(d.readers) == 0 {
		return d.gone
	}
	n := min(size, d.hashed)
	for _, mark := range d.readers {
		n = min(n, mark)
	}
	if n < size {
		n -= n % DiscardChunk
	}
	return max(n, d.gone)
}

// discards says whether the data is not to be made durable.
func (j *job) discards() bool {
	if j.discard == nil {
		return false
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return !j.discard.durable
}

// spent says whether something was given up, so that nobody can read all of the blob.
func (j *job) spent() bool {
	if j.discard == nil {
		return false
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.discard.gone > 0 || j.discard.final
}

// notFarAhead is from where on running ahead counts: where somebody discards, it is from the reader that is last, because
// what lies unread for long is written to disk after all. Called with mu held.
func (j *job) notFarAhead(wanted int64) int64 {
	d := j.discard
	if d == nil || d.off || d.final {
		return wanted
	}
	for _, mark := range d.readers {
		if mark > 0 { // else it does not discard, and would wait for what it holds up
			wanted = min(wanted, mark)
		}
	}
	return wanted
}

// hashedUpTo notes how far the blob's digest has come, and its chunks' checksums.
func (j *job) hashedUpTo(h *digester) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.hashedBehind(h)
	if d := j.discard; d != nil {
		d.hashed, d.sums = h.off, h.sums()
		d.wake()
	}
}

// chunkSums computes the SHA-256 of each chunk of the bytes that it gets, in order.
type chunkSums struct {
	size, off int64
	cur       hash.Hash
	sums      [][sha256.Size]byte // of whole chunks, and of the last one once all size bytes came
}

func newChunkSums(size int64, h hash.Hash) *chunkSums {
	return &chunkSums{size: size, cur: h, sums: make([][sha256.Size]byte, 0, chunks(size))}
}

func (c *chunkSums) add(p []byte) {
	for len(p) > 0 {
		n := min(int64(len(p)), DiscardChunk-c.off%DiscardChunk)
		_, _ = c.cur.Write(p[:n]) // never fails
		p = p[n:]
		if c.off += n; c.off%DiscardChunk == 0 || c.off == c.size {
			c.sums = append(c.sums, [sha256.Size]byte(c.cur.Sum(nil)))
			c.cur.Reset()
		}
	}
}

// retain has the job keep all its bytes from now on. What it has is about to be fetched again.
func (j *job) retain() {
	if d := j.discard; d != nil {
		j.mu.Lock()
		defer j.mu.Unlock()
		d.off, d.durable = true, true
		d.stop()
	}
}

// forgetDiscarded is for when all is fetched again: there are no holes in a new file. Called with mu held.
func (j *job) forgetDiscarded() {
	if d := j.discard; d != nil {
		d.gone, d.hashed, d.sums = 0, 0, nil
	}
}

// stopDiscarding ends discardAll.
func (j *job) stopDiscarding() {
	if d := j.discard; d != nil {
		d.stop()
	}
}

// admit notes that a handle reads, and refuses what was given up. Called with mu held.
func (j *job) admit(h *Handle, off int64) error {
	d := j.discard
	if d == nil || d.durable {
		return nil
	}
	if off < d.gone || d.final {
		return fmt.Errorf("blob %s: read at %d: %w", j.blob.Digest, off, ErrDiscarded)
	}
	if _, ok := d.readers[h]; !ok {
		d.readers[h] = d.gone
	}
	return nil
}

// dismiss forgets a reader. What it alone had yet to read stays.
func (j *job) dismiss(h *Handle) {
	if d := j.discard; d != nil {
		delete(d.readers, h)
		d.wake()
		j.wake()
	}
}

// Discard says that this handle will not read the bytes below upTo again. Where all who read have said so, and the
// transfer was joined with JoinDiscarding, they are given up; else only the memory that holds them is.
func (h *Handle) Discard(upTo int64) {
	j := h.job
	d := j.discard
	if d == nil {
		j.mu.Lock()
		defer j.mu.Unlock()
		if r, ok := j.behind.readers[h]; ok && h.generation == j.generation && upTo > r.mark {
			j.behind.readers[h] = progress{mark: upTo, moved: time.Now()}
		}
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if h.closed || h.generation != j.generation || d.off || upTo <= d.readers[h] {
		return
	}
	more := upTo/DiscardChunk > d.readers[h]/DiscardChunk || upTo == j.blob.Size
	d.readers[h] = upTo
	if more {
		d.wake()
		j.touch() // the next request may have waited for this
		j.wake()
	}
}

// Discarding reports whether the bytes are not kept: then, after Wait, either Discarded or Keep settles what becomes of
// the blob, and LinkTo fails until Keep has returned nil.
func (h *Handle) Discarding() bool { return h.job.discards() }

// Discarded gives up what is left of a complete blob and returns the SHA-256 of each chunk of DiscardChunk bytes. Whoever
// calls it has made sure that nobody needs to read it any more. errdefs.ErrFailedPrecondition: the bytes are kept.
func (h *Handle) Discarded(ctx context.Context) ([][sha256.Size]byte, error) {
	j := h.job
	d := j.discard
	for {
		j.mu.Lock()
		if d == nil || d.off || j.phase != PhaseComplete {
			j.mu.Unlock()
			return nil, fmt.Errorf("blob %s is kept or not complete: %w", j.blob.Digest, errdefs.ErrFailedPrecondition)
		}
		d.final = true
		d.wake()
		sums, err, changed := d.sums, d.err, j.changed
		j.mu.Unlock()
		if int64(len(sums)) == chunks(j.blob.Size) {
			return sums, nil
		}
		if err != nil {
			return nil, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Keep makes a complete blob durable that nobody has begun to discard: LinkTo works from then on. ErrDiscarded: it is too
// late.
func (h *Handle) Keep() error {
	j := h.job
	d := j.discard
	if d == nil {
		return nil
	}
	d.keeping.Lock()
	defer d.keeping.Unlock()
	j.mu.Lock()
	late, kept, complete, f := d.gone > 0 || d.final, d.durable, j.phase == PhaseComplete, j.folder
	if complete && !late {
		d.off = true
	}
	j.mu.Unlock()
	switch {
	case kept:
		return nil
	case !complete:
		return fmt.Errorf("blob %s is not complete, keep it: %w", j.blob.Digest, errdefs.ErrFailedPrecondition)
	case late:
		return fmt.Errorf("blob %s: keep it: %w", j.blob.Digest, ErrDiscarded)
	}
	if err := errors.Join(f.data.Chmod(0o444), f.data.Sync()); err != nil {
		return diskError(f.path, err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	d.durable = true
	d.stop()
	return nil
}

// Spent reports whether bytes were given up: nobody who comes now can read all of the blob from this transfer.
func (h *Handle) Spent() bool { return h.job.spent() }

// Abandon makes sure that nobody joins this transfer any more: what was discarded of it is needed after all. The next
// Join starts from nothing.
func (h *Handle) Abandon() {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	h.m.drop(h.job)
	h.job.doom()
}

func chunks(size int64) int64 { return (size + DiscardChunk - 1) / DiscardChunk }

// punchStep is how much is punched out at once, in bytes, a multiple of DiscardChunk: while it lasts nobody can write to
// the file. What the kernel has not written back after a few seconds is what matters.
const punchStep = 4 * DiscardChunk

// discardAll gives up what nobody needs any more until ctx ends or nothing is left.
func (j *job) discardAll(ctx context.Context) {
	for {
		data, off, end, err := j.discardable(ctx)
		if err != nil {
			j.discardedNoMore(err)
			return
		}
		j.punch(ctx, data, off, end-off)
		if end == j.blob.Size {
			return
		}
	}
}

// discardable waits until there is something to give up, and books it: no read of it begins any more.
func (j *job) discardable(ctx context.Context) (data *os.File, off, end int64, err error) {
	d := j.discard
	for {
		j.mu.Lock()
		off, end = d.gone, d.limit(j.blob.Size)
		if d.final && j.verified && !d.off {
			end = j.blob.Size
		}
		if ready := end > off && (end-off >= punchStep || end == j.blob.Size); ready {
			d.gone, data = end, j.folder.data
		}
		j.mu.Unlock()
		if data != nil {
			return data, off, end, nil
		}
		select {
		case <-d.kick:
		case <-ctx.Done():
			return nil, 0, 0, context.Cause(ctx)
		}
	}
}

// discardedNoMore ends waiting in Discarded.
func (j *job) discardedNoMore(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.discard.err = fmt.Errorf("blob %s: %w", j.blob.Digest, err)
	j.wake()
}

// punch frees a range of the file. Where that cannot be done the file goes as a whole when the job ends.
func (j *job) punch(ctx context.Context, data *os.File, off, n int64) {
	if j.discard.blind {
		return
	}
	if err := punchHole(data, off, n); err != nil && !errors.Is(err, os.ErrClosed) {
		j.discard.blind = true
		log.G(ctx).WithField("digest", j.blob.Digest).WithError(err).
			Warn("the file system of transfer.root cannot punch holes: compressed bytes take space until their blob is unpacked")
	}
}
