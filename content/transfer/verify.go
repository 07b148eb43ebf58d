package transfer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"
)

const (
	hashStep      = 1 << 20
	writebackStep = 8 << 20
)

// digester hashes the blob in order, from wherever the bytes of one generation come.
type digester struct {
	hash.Hash
	off        int64 // what was hashed
	generation int
	buf        []byte
	chunks     *chunkSums // nil: nobody wants them
}

// add hashes p. With chunks, which cost as much again, it is at the same time: nobody waits longer for the digest.
func (d *digester) add(p []byte) {
	var both sync.WaitGroup
	if d.chunks != nil {
		both.Go(func() { d.chunks.add(p) })
	}
	_, _ = d.Write(p) // never fails
	both.Wait()
	d.off += int64(len(p))
}

// sums are the chunks' checksums so far.
func (d *digester) sums() [][sha256.Size]byte {
	if d.chunks == nil {
		return nil
	}
	return d.chunks.sums
}

func (d *digester) encoded() string { return hex.EncodeToString(d.Sum(nil)) }

func (d *digester) matches(b Blob) bool { return d.off == b.Size && d.encoded() == b.Digest.Encoded() }

// digester is what was hashed so far of the bytes that readers get now.
func (j *job) digester() *digester {
	generation := j.currentGeneration()
	if j.digest.Hash == nil || j.digest.generation != generation {
		j.digest = digester{Hash: j.opts.NewHash(), generation: generation}
		if j.discards() {
			j.digest.chunks = newChunkSums(j.blob.Size, j.opts.NewHash())
		}
	}
	return &j.digest
}

// hash reads the blob back in order as the frontier advances. At the end the digest must be right.
func (j *job) hash(ctx context.Context) error {
	d := j.digester()
	for d.off < j.blob.Size {
		frontier, err := j.below(ctx, d.off+1)
		if err != nil {
			return err
		}
		if err := j.hashUpTo(ctx, d, j.folder, frontier); err != nil {
			return err
		}
	}
	if !d.matches(j.blob) {
		return fmt.Errorf("%w: %s sent %d bytes that hash to sha256:%s", errMismatch, j.servedBy(), j.blob.Size, d.encoded())
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.verified = true
	j.wake()
	return nil
}

// hashUpTo hashes what is missing of the first end bytes.
func (j *job) hashUpTo(ctx context.Context, d *digester, f *folder, end int64) error {
	if d.buf == nil {
		d.buf = make([]byte, min(hashStep, max(j.blob.Size, 1)))
	}
	for d.off < end {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := f.data.ReadAt(d.buf[:min(int64(len(d.buf)), end-d.off)], d.off)
		if err != nil && !errors.Is(err, io.EOF) || n == 0 {
			return diskError(f.path, fmt.Errorf("read back at %d: %w", d.off, err))
		}
		d.add(d.buf[:n])
		j.hashedUpTo(d)
	}
	return nil
}

// below waits until the frontier is at least off and returns it.
func (j *job) below(ctx context.Context, off int64) (int64, error) {
	for {
		j.mu.Lock()
		frontier, changed := j.frontier, j.changed
		j.mu.Unlock()
		if frontier >= off {
			return frontier, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// servedBy names the hosts whose bytes are in the data.
func (j *job) servedBy() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.served.everybody()
}

// writeback starts writing to disk what lies below the frontier, so that the last fsync is short. It may be slowed
// down by a busy disk, so it has a goroutine of its own. What nobody needs any more is dropped from memory.
func (j *job) writeback(ctx context.Context) error {
	dropped := int64(0)
	for off := int64(0); off+writebackStep <= j.blob.Size; off += writebackStep {
		if _, err := j.below(ctx, off+writebackStep); err != nil {
			return err
		}
		startWriteback(j.folder.data, off, writebackStep)
		dropped = j.dropBehind(dropped, off+writebackStep)
	}
	return nil
}

// check is a run of recorded blocks that must be compared with the data before they count.
type check struct {
	span *span
	recs []record
}

// resume fills the ledger from the state file. Recorded blocks are live, claimed by the checks it returns; nobody
// fetches them until they are found wrong. Blocks that are there in part are few and checked at once; those that this
// process checked when it followed another one are not checked again.
func (j *job) resume() ([]*check, error) {
	l := newLedger(j.blob.Size)
	shown := j.shown()
	buf := make([]byte, blockSize)
	var checks []*check
	for _, r := range j.folder.recorded() {
		start := int64(r.block) * blockSize
		if int64(r.length) < blockLen(j.blob.Size, r.block) {
			ok, err := j.folder.holds(r, buf)
			if err != nil {
				return nil, err
			}
			if ok {
				s := l.take(start, blockEnd(start))
				l.landed(s, start+int64(r.length), r.crc)
				l.release(s)
				j.inherited(r.block)
			}
			continue
		}
		end := start + int64(r.length)
		j.inherited(r.block)
		if end <= shown {
			l.landed(l.take(start, end), end, 0)
			continue
		}
		if n := len(checks); n > 0 && checks[n-1].span.end == start {
			delete(l.live, l.take(start, end))
			checks[n-1].span.end = end
			checks[n-1].recs = append(checks[n-1].recs, r)
			continue
		}
		s := l.take(start, end)
		s.recorded = true
		checks = append(checks, &check{span: s, recs: []record{r}})
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ledger = l
	if l.frontier() < j.frontier { // readers have bytes that nobody vouches for
		j.generation++
		j.frontier, j.verified = 0, false
	}
	j.advance()
	return checks, nil
}

// inherited notes that a block was there before this attempt.
func (j *job) inherited(block uint32) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.served.inherit(block)
}

// recheck compares recorded blocks with the data, in order; what does not match is missing.
func (j *job) recheck(ctx context.Context, checks []*check) error {
	buf := make([]byte, blockSize)
	for _, c := range checks {
		for _, r := range c.recs {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			ok, err := j.folder.holds(r, buf)
			if err != nil {
				return diskError(j.folder.path, err)
			}
			j.checked(c.span, ok)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.wake() // who found no source waited for us
	return nil
}

// checked counts the next block of a live span, or gives it to those who fetch.
func (j *job) checked(s *span, ok bool) {
	j.touch()
	j.mu.Lock()
	defer j.mu.Unlock()
	off, end := s.off, min(blockEnd(s.off), s.end)
	if !ok {
		j.served.forget(uint32(off / blockSize))
		bad := &span{off: off, end: end}
		j.ledger.live[bad] = struct{}{}
		j.ledger.release(bad)
	}
	j.ledger.landed(s, end, 0)
	j.advance()
	if !ok {
		j.wake()
	}
}

// hashesTo reads a whole file and compares it with the blob's size and digest.
func hashesTo(ctx context.Context, f *os.File, b Blob) (bool, error) {
	st, err := f.Stat()
	if err != nil || st.Size() != b.Size {
		return false, err
	}
	h := sha256.New()
	buf := make([]byte, hashStep)
	for off := int64(0); off < b.Size; {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		n, err := f.ReadAt(buf[:min(hashStep, b.Size-off)], off)
		if n == 0 {
			return false, nil // cut short or unreadable: not the blob
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return false, nil
		}
		h.Write(buf[:n])
		off += int64(n)
	}
	return hex.EncodeToString(h.Sum(nil)) == b.Digest.Encoded(), nil
}
