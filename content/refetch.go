package content

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// A discarded blob that is read is transferred again as a whole, as any blob is: from all its hosts, in parallel and
// resumable, once for all who read it. What is read is compared with the record chunk by chunk, before a byte of it is
// handed out and long before the transfer knows the blob's digest. The bytes do not come back for good: when nobody has
// read for a while the transfer is removed, because whoever discards wants the space, and a push reads a layer once.
const (
	// refetchIdle is how long a blob that came back stays when nobody reads it: containerd opens it anew for each
	// piece it reads.
	refetchIdle = 30 * time.Second
	// refetchChunks bounds the checked chunks that are kept in memory, for all blobs together.
	refetchChunks = 16
	// maxRestarts bounds how often a read begins again because the bytes turned out wrong.
	maxRestarts = 8
)

// Refetcher brings back the bytes of blobs that were discarded.
type Refetcher interface {
	// Refetch joins or starts the transfer of a blob from where it once came from. It waits for nothing.
	Refetch(ctx context.Context, r *Record) (Refetch, error)
}

// Refetch is a transfer of a blob that was discarded. Its methods may be called at the same time.
type Refetch interface {
	// ReadAt waits until at least one byte at off is there and reads what there is. errdefs.ErrAborted: bytes read so
	// far may have been wrong and are fetched again, and reading has to begin at 0.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	// Wait returns nil when the blob is complete, verified and durable, and errors as ReadAt does.
	Wait(ctx context.Context) error
	// LinkTo makes path a hard link to the finished file; one that is there is fine.
	LinkTo(path string) error
	// Close ends the interest in the bytes. What is complete and has no link is removed when nobody else wants it.
	Close() error
}

// refetches are the discarded blobs that are being read.
type refetches struct {
	from Refetcher

	mu      sync.Mutex // comes before Store.mu; held while Refetcher is asked
	closed  bool
	running map[digest.Digest]*refetch

	cacheMu sync.Mutex
	cache   []cachedChunk // the latest used last
}

type cachedChunk struct {
	digest digest.Digest
	index  int64
	data   []byte
}

// refetch is one blob that is being read.
type refetch struct {
	all      *refetches
	record   *Record
	transfer Refetch
	checking sync.Mutex // held while a chunk is read and checked: each is checked once

	// Guarded by refetches.mu.
	users int
	idle  *time.Timer
}

// join counts one more in who reads the blob.
func (f *refetches) join(ctx context.Context, s *Store, d digest.Digest) (*refetch, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.running[d]; r != nil {
		r.users++
		if r.idle != nil {
			r.idle.Stop()
			r.idle = nil
		}
		return r, nil
	}
	if f.closed {
		return nil, fmt.Errorf("content %s: gantryd is shutting down: %w", d, errdefs.ErrUnavailable)
	}
	record, err := s.readRecord(d)
	if err != nil {
		return nil, err
	}
	r := &refetch{all: f, record: record, users: 1}
	if f.from == nil {
		return nil, r.gone(ctx, errdefs.ErrNotImplemented)
	}
	if r.transfer, err = f.from.Refetch(context.WithoutCancel(ctx), record); err != nil {
		return nil, r.gone(ctx, err)
	}
	f.running[d] = r
	return r, nil
}

// leave counts one out. The last one leaves the bytes there for a while.
func (f *refetches) leave(r *refetch) {
	f.mu.Lock()
	r.users--
	last := r.users == 0
	known := !f.closed && f.running[r.record.Digest] == r
	if last && known {
		r.idle = time.AfterFunc(refetchIdle, func() { f.expire(r) })
	}
	f.mu.Unlock()
	if last && !known {
		_ = r.transfer.Close() // nobody to tell
	}
}

func (f *refetches) expire(r *refetch) {
	f.mu.Lock()
	over := r.users == 0 && f.running[r.record.Digest] == r
	if over {
		delete(f.running, r.record.Digest)
	}
	f.mu.Unlock()
	if over {
		_ = r.transfer.Close() // nobody to tell
	}
}

// fail has the next reader begin anew.
func (f *refetches) fail(r *refetch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.running[r.record.Digest] == r {
		delete(f.running, r.record.Digest)
	}
}

// close ends what nobody reads; what is being read ends with its reader.
func (f *refetches) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	var errs []error
	for d, r := range f.running {
		if r.users == 0 {
			r.idle.Stop()
			errs = append(errs, r.transfer.Close())
		}
		delete(f.running, d)
	}
	return errors.Join(errs...)
}

func (f *refetches) cached(d digest.Digest, index int64) []byte {
	f.cacheMu.Lock()
	defer f.cacheMu.Unlock()
	for i, c := range f.cache {
		if c.index == index && c.digest == d {
			copy(f.cache[i:], f.cache[i+1:])
			f.cache[len(f.cache)-1] = c
			return c.data
		}
	}
	return nil
}

func (f *refetches) keep(d digest.Digest, index int64, p []byte) {
	f.cacheMu.Lock()
	defer f.cacheMu.Unlock()
	if len(f.cache) == refetchChunks {
		copy(f.cache, f.cache[1:])
		f.cache = f.cache[:refetchChunks-1]
	}
	f.cache = append(f.cache, cachedChunk{d, index, p})
}

// gone says that a blob cannot be read for lack of its bytes, and what to do.
func (r *refetch) gone(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	from := make([]string, len(r.record.Origins))
	for i, o := range r.record.Origins {
		from[i] = o.String()
	}
	if errdefs.IsResourceExhausted(err) { // the registry is not to blame
		return fmt.Errorf(`blob %s: its compressed bytes were discarded after unpacking (content.retain = "none") and there is no room to fetch them again: %w`,
			r.record.Digest, err)
	}
	// The kind of the cause is not the kind of this: what is not found is not the content.
	return fmt.Errorf(`blob %s: its compressed bytes were discarded after unpacking (content.retain = "none") and cannot be had again from %s: %s; `+
		`once that registry serves the blob again, repeat this, or remove the image and pull it from another one: %w`,
		r.record.Digest, strings.Join(from, " or "), err.Error(), errdefs.ErrUnavailable)
}

// again makes the first bytes readable after ErrAborted.
func (r *refetch) again(ctx context.Context) error {
	var p [1]byte
	_, err := r.transfer.ReadAt(ctx, p[:], 0)
	return err
}

// complete waits until all bytes are there and verified.
func (r *refetch) complete(ctx context.Context) error {
	for n := 1; ; n++ {
		err := r.transfer.Wait(ctx)
		if err == nil {
			return nil
		}
		if err := r.survive(ctx, err, n); err != nil {
			return err
		}
	}
}

// survive returns nil if err, the nth one, can be helped by beginning again.
func (r *refetch) survive(ctx context.Context, err error, n int) error {
	if errdefs.IsAborted(err) {
		err = r.again(ctx)
	}
	if err == nil || errdefs.IsAborted(err) && n < maxRestarts {
		return nil
	}
	if ctx.Err() == nil {
		r.all.fail(r)
	}
	return r.gone(ctx, err)
}

// chunk returns a chunk that matches the record. It waits until it is there.
func (r *refetch) chunk(ctx context.Context, index int64) ([]byte, error) {
	for n := 1; ; n++ {
		p, err := r.try(ctx, index)
		if err == nil {
			return p, nil
		}
		if errors.Is(err, errOtherBytes) {
			// The transfer will find out, ask other hosts, and begin again.
			if werr := r.transfer.Wait(ctx); werr == nil {
				if p, err = r.try(ctx, index); err == nil {
					return p, nil
				}
			} else {
				err = fmt.Errorf("%w: %w", err, werr)
			}
		}
		if err == nil {
			return p, nil
		}
		if err := r.survive(ctx, err, n); err != nil {
			return nil, err
		}
	}
}

// errOtherBytes: what came back is not what was discarded.
var errOtherBytes = errors.New("other bytes came than those that were discarded")

// try reads a chunk once.
func (r *refetch) try(ctx context.Context, index int64) ([]byte, error) {
	off := index * r.record.Chunk
	n := min(r.record.Chunk, r.record.Size-off)
	if p := r.all.cached(r.record.Digest, index); p != nil {
		return p, nil
	}
	var last [1]byte // no memory is held while this waits
	if _, err := r.transfer.ReadAt(ctx, last[:], off+n-1); err != nil {
		return nil, err
	}
	r.checking.Lock()
	defer r.checking.Unlock()
	if p := r.all.cached(r.record.Digest, index); p != nil {
		return p, nil
	}
	p := make([]byte, n)
	for have := int64(0); have < n; {
		m, err := r.transfer.ReadAt(ctx, p[have:], off+have)
		if err != nil {
			return nil, err
		}
		have += int64(m)
	}
	if sha256.Sum256(p) != r.record.Sums[index] {
		return nil, fmt.Errorf("%w, between %d and %d", errOtherBytes, off, off+n)
	}
	r.all.keep(r.record.Digest, index, p)
	return p, nil
}

// openDiscarded reads a blob that was discarded. ctx bounds the waiting of ReadAt, which knows none.
func (s *Store) openDiscarded(ctx context.Context, d digest.Digest) (ccontent.ReaderAt, error) {
	r, err := s.refetch.join(ctx, s, d)
	if err != nil {
		return nil, err
	}
	return &discardedReader{refetch: r, context: func() context.Context { return ctx }}, nil
}

// ContextReaderAt is what the readers of discarded blobs are beside a content.ReaderAt: a read that may have to wait for
// the network.
type ContextReaderAt interface {
	// ReadAtContext is ReadAt that ends with ctx and not with the one that the reader was opened with.
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
}

type discardedReader struct {
	refetch *refetch
	context func() context.Context
	once    sync.Once
}

var _ ContextReaderAt = (*discardedReader)(nil)

func (r *discardedReader) Size() int64 { return r.refetch.record.Size }

func (r *discardedReader) Close() error {
	r.once.Do(func() { r.refetch.all.leave(r.refetch) })
	return nil
}

func (r *discardedReader) ReadAt(p []byte, off int64) (int, error) {
	return r.ReadAtContext(r.context(), p, off)
}

func (r *discardedReader) ReadAtContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	record := r.refetch.record
	if off < 0 {
		return 0, fmt.Errorf("read of %s at %d: %w", record.Digest, off, errdefs.ErrInvalidArgument)
	}
	for n < len(p) {
		if off >= record.Size {
			return n, io.EOF
		}
		chunk, err := r.refetch.chunk(ctx, off/record.Chunk)
		if err != nil {
			return n, err
		}
		m := copy(p[n:], chunk[off%record.Chunk:])
		n, off = n+m, off+int64(m)
	}
	return n, nil
}
