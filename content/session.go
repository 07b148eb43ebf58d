package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
)

// syncEvery is how many bytes an ingest of unknown size may be ahead of the disk.
const syncEvery = 8 << 20

// Session is one client's turn at writing a ref, from the first STAT of a Write
// stream to its end. There is one per ref at a time. Its methods may be called
// from several goroutines, but wait for each other.
//
// Offsets are the client's own count: containerd's proxy writer counts from what
// the first STAT answered, and never looks at the answers to later ones. When a
// transfer brought the ingest from M to N bytes in between, the client's M means
// byte N.
type Session struct {
	store     *Store
	ing       *ingest
	namespace string
	declared  int64         // Open's total
	named     digest.Digest // the digest at the ref's tail, if any
	want      digest.Digest // what the content must be: Open's expected, or named

	mu       sync.Mutex
	file     *os.File // nil until needed, and while the blob is staged
	base     int64    // what the first STAT answered
	shift    int64    // absolute offset minus the client's count
	unsynced int64
	asked    bool // the call that may wait has been
	closed   bool
	final    digest.Digest // once closed
	growing  *Growing
	synced   time.Duration
}

// Open starts or resumes the ingest of ref and locks the ref until Close. It is
// the first STAT: containerd's whole database waits for it, so it never waits,
// and touches neither network nor containerd, nor the disk for a new ref: making
// a file waits for the file system's journal.
//
// total is the blob's size in bytes, 0 or less when unknown; expected its digest
// or "". Errors: ErrInvalidArgument; ErrAlreadyExists if expected is committed;
// ErrUnavailable while another session has the ref.
func (s *Store) Open(ctx context.Context, ref string, total int64, expected digest.Digest) (*Session, error) {
	if ref == "" || len(ref) > maxRef {
		return nil, fmt.Errorf("a ref must have 1 to %d bytes, not %d: %w", maxRef, len(ref), errdefs.ErrInvalidArgument)
	}
	if expected != "" {
		if err := expected.Validate(); err != nil {
			return nil, fmt.Errorf("expected digest %q: %w: %w", expected, errdefs.ErrInvalidArgument, err)
		}
	}
	named, _ := digestFromRef(ref)
	sess := &Session{store: s, declared: max(total, 0), named: named, want: expected}
	if expected == "" {
		sess.want = named
	}
	prefix, _ := splitRef(ref)
	if ns, ok := namespaces.Namespace(ctx); ok {
		sess.namespace = ns
	} else {
		sess.namespace = prefix
	}

	ing, fresh, err := s.acquire(ref, expected)
	if err != nil {
		return nil, err
	}
	sess.ing = ing
	if err := sess.prepare(); err != nil {
		err = fmt.Errorf("open ref %q: %w", ref, s.plain(err))
		if fresh {
			return nil, errors.Join(err, s.forget(ing))
		}
		return nil, errors.Join(err, s.yield(ing))
	}
	sess.base = ing.offset
	sess.shift = 0
	return sess, nil
}

// prepare brings the ingest's folder, if there is one, and what is known of it in
// line with what the client declares now.
func (s *Session) prepare() error {
	s.ing.rehash(s.algorithm())
	switch {
	case s.declared == 0 || s.declared == s.ing.total:
		return nil
	case s.ing.total > 0 || (s.want != "" && s.ing.offset > s.declared):
		// Another size is another blob: what is there cannot be resumed.
		if err := s.startOver(); err != nil {
			return err
		}
	}
	s.store.mu.Lock()
	s.ing.total = s.declared
	s.store.mu.Unlock()
	if !s.ing.made {
		return nil
	}
	return s.writeTotal()
}

func (s *Session) algorithm() digest.Algorithm {
	if s.want != "" {
		return s.want.Algorithm()
	}
	return digest.Canonical
}

// usable is asked first by every method that does something. The caller holds mu.
func (s *Session) usable() error {
	if s.closed {
		return fmt.Errorf("the writer of ref %q is closed: %w", s.ing.ref, errdefs.ErrFailedPrecondition)
	}
	return s.store.alive(s.ing)
}

// reason replaces what an abort in the middle looks like by the abort itself, and
// says a full disk plainly. Every exported method's errors go through it.
func (s *Session) reason(err error) error {
	if err == nil {
		return nil
	}
	if dead := s.store.alive(s.ing); dead != nil {
		return dead
	}
	return s.store.plain(err)
}

// Stat describes the ingest without ever waiting. Offset is absolute.
func (s *Session) Stat() Status {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	st, _ := s.ing.status()
	return st
}

// Status describes the ingest; Offset is absolute. The first call, if nothing
// was written before, may wait: for a transfer that brings the blob, for the
// hash of what a crash left behind. It ends with ctx, and with an Abort.
func (s *Session) Status(ctx context.Context) (Status, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return Status{}, err
	}
	if !s.asked {
		s.asked = true
		if err := s.settle(ctx); err != nil {
			return Status{}, s.reason(err)
		}
	}
	return s.Stat(), nil
}

// Digest of the bytes so far, of the whole blob when a transfer brought it, and
// of what was committed after that. It is empty only for an ingest that a
// restart interrupted, until the first Status or Write has read it again.
func (s *Session) Digest() digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.digest()
}

func (s *Session) digest() digest.Digest {
	switch {
	case s.closed:
		return s.final
	case s.ing.staged != "":
		return s.ing.staged
	case s.ing.hashed == s.ing.offset:
		return s.ing.digester.Digest()
	}
	return ""
}

// catchUp hashes what the ingest has and the digester has not seen.
func (s *Session) catchUp(ctx context.Context) error {
	if s.ing.staged != "" || s.ing.hashed == s.ing.offset {
		return nil
	}
	f, err := s.data()
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for s.ing.hashed < s.ing.offset {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := f.ReadAt(buf[:min(int64(len(buf)), s.ing.offset-s.ing.hashed)], s.ing.hashed)
		_, _ = s.ing.digester.Hash().Write(buf[:n]) // a hash does not fail
		s.ing.hashed += int64(n)
		if err != nil && (n == 0 || !errors.Is(err, io.EOF)) {
			return fmt.Errorf("read back ref %q, abort it and pull again: %w", s.ing.ref, err)
		}
	}
	return nil
}

// data is the open data file, which is made if the ingest has none.
func (s *Session) data() (*os.File, error) {
	if s.file == nil {
		if err := s.folder(); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(s.ing.path(dataFile), os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return nil, err
		}
		s.file = f
	}
	return s.file, nil
}

func (s *Session) closeData() error {
	if s.file == nil {
		return nil
	}
	f := s.file
	s.file = nil
	return f.Close()
}

// Write appends p. off is the client's own count; 0 where the client has counted
// further starts the ingest over. It returns the client's new count, which has
// advanced by what was written also when there is an error. The WRITE that
// completes a declared size returns when the blob is durable.
//
// Errors: ErrOutOfRange for another offset; ErrFailedPrecondition for more bytes
// than the size of a blob named by its ref; ErrAborted; ErrResourceExhausted
// when the disk is full.
func (s *Session) Write(ctx context.Context, off int64, p []byte) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return 0, err
	}
	s.asked = true
	count := s.ing.offset - s.shift
	switch off {
	case count:
	case 0:
		if err := s.startOver(); err != nil {
			return count, s.reason(err)
		}
	default:
		return count, fmt.Errorf("ref %q: write at %d, the next byte is %d: %w", s.ing.ref, off, count, errdefs.ErrOutOfRange)
	}
	_, err := s.write(ctx, p)
	return s.ing.offset - s.shift, s.reason(err)
}

// write is append for a client: somebody may want to follow.
func (s *Session) write(ctx context.Context, p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.roomFor(ctx, len(p)); err != nil {
		return 0, err
	}
	if err := s.volunteer(); err != nil {
		return 0, err
	}
	if err := s.follow(ctx); err != nil {
		return 0, err
	}
	return s.append(ctx, p)
}

// follow tells the observer of the first WRITE.
func (s *Session) follow(ctx context.Context) error {
	if s.growing != nil || s.named == "" || s.store.observer == nil {
		return nil
	}
	if _, err := s.data(); err != nil {
		return err
	}
	g, err := newGrowing(s.named, s.ing.path(dataFile), s.ing.offset)
	if err != nil {
		return err
	}
	s.growing = g
	s.store.grows(s.ing, g)
	log.G(ctx).WithField("ref", s.ing.ref).WithField("digest", s.named).Debug("a client writes the blob itself")
	s.store.observer.Ingesting(s.namespace, s.named, s.ing.total, g)
	return nil
}

// roomFor checks n more bytes against the declared size. A ref that names no
// digest may outgrow it: containerd appends to shared content that way.
func (s *Session) roomFor(ctx context.Context, n int) error {
	if s.ing.total > 0 && s.ing.offset+int64(n) > s.ing.total && s.want != "" {
		return fmt.Errorf("blob %s: %d bytes at %d are more than its size of %d: %w",
			s.want, n, s.ing.offset, s.ing.total, errdefs.ErrFailedPrecondition)
	}
	if s.ing.staged != "" {
		return s.unstage(ctx)
	}
	return s.catchUp(ctx)
}

// append writes p at the end of the ingest and hashes what was written.
func (s *Session) append(ctx context.Context, p []byte) (int, error) {
	f, err := s.data()
	if err != nil {
		return 0, err
	}
	n, err := f.WriteAt(p, s.ing.offset)
	_, _ = s.ing.digester.Hash().Write(p[:n]) // a hash does not fail
	s.ing.hashed += int64(n)
	s.store.advance(s.ing, s.ing.offset+int64(n))
	s.growing.advance(s.ing.offset)
	if err != nil {
		return n, fmt.Errorf("write ref %q: %w", s.ing.ref, err)
	}
	if s.ing.offset == s.ing.total {
		return n, s.written(ctx)
	}
	if s.ing.total > 0 && s.ing.offset < s.ing.total {
		return n, nil
	}
	s.unsynced += int64(n)
	return n, s.syncAhead()
}

func (s *Session) syncAhead() error {
	if s.unsynced < syncEvery {
		return nil
	}
	return s.sync()
}

func (s *Session) sync() error {
	if s.file == nil || s.unsynced == 0 {
		return nil
	}
	if err := s.syncing(func() error { return s.store.syncFile(s.file) }); err != nil {
		return fmt.Errorf("write ref %q: %w", s.ing.ref, err)
	}
	s.unsynced = 0
	return nil
}

// syncing adds to what Synced answers how long f takes.
func (s *Session) syncing(f func() error) error {
	defer func(began time.Time) { s.synced += time.Since(began) }(time.Now())
	return f()
}

// Synced is how long the session has waited for the disk to have what was written.
func (s *Session) Synced() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.synced
}

// startOver empties the ingest.
func (s *Session) startOver() error {
	s.growing.truncate()
	s.growing = nil
	if err := errors.Join(s.closeData(), removeFile(s.ing.path(dataFile))); err != nil {
		return err
	}
	if err := s.dropStaged(); err != nil {
		return err
	}
	s.ing.digester, s.ing.salvaged, s.ing.found = nil, false, false
	s.ing.rehash(s.algorithm())
	s.shift, s.unsynced = 0, 0
	s.store.advance(s.ing, 0)
	if _, err := s.data(); err != nil {
		return err
	}
	return s.lend()
}

// unstage gives the ingest a copy of its own of what lies in blobs/, because a
// blob is immutable and more bytes are to come.
func (s *Session) unstage(ctx context.Context) error {
	src, err := s.store.open(ctx, s.ing.staged)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }() // read-only: nothing to lose
	f, err := s.data()
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, io.NewSectionReader(src, 0, s.ing.offset)); err != nil {
		return errors.Join(err, s.closeData(), removeFile(s.ing.path(dataFile)))
	}
	s.unsynced = s.ing.offset
	if err := s.dropStaged(); err != nil {
		return err
	}
	return s.catchUp(ctx)
}

// dropStaged lets go of the blob that this ingest had in blobs/, if any.
func (s *Session) dropStaged() error {
	if err := s.store.release(s.ing); err != nil {
		return err
	}
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	s.ing.staged = ""
	return nil
}

// Close ends the session and frees the ref; what was written stays, for another
// session to resume. A second call does nothing.
func (s *Session) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.growing.fail(fmt.Errorf("the client of ref %q left before its commit: %w", s.ing.ref, errdefs.ErrAborted))
	err := s.end()
	if s.ing.made && s.store.alive(s.ing) == nil {
		err = errors.Join(err, writeTime(s.ing.path(updatedFile), s.Stat().UpdatedAt))
	}
	return errors.Join(err, s.store.yield(s.ing))
}

// end closes the session but does not free its ref yet.
func (s *Session) end() error {
	s.store.resign(s.ing, fmt.Errorf("the client of ref %q left with %d bytes of %s: %w",
		s.ing.ref, s.ing.offset, s.named, errdefs.ErrAborted))
	s.final = s.digest()
	s.closed = true
	return s.closeData()
}
