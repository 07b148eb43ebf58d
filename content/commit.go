package content

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
)

// written is called when the client has written all of the declared bytes.
func (s *Session) written(ctx context.Context) error {
	s.store.busy(s.ing, true)
	err := s.complete(ctx)
	// Still leading means that it did not bring the blob.
	s.store.end(s.store.leadOf(s.ing), func(l *lead) {
		l.err = err
		if err == nil {
			l.have, l.spoil = 0, s.ing.salvaged
			l.err = fmt.Errorf("the client of ref %q wrote something else than %s: %w", s.ing.ref, s.named, errdefs.ErrDataLoss)
		}
	})
	return err
}

// complete stages an ingest that has all of its declared bytes. When they are
// not what the ref names, they stay where they are and COMMIT says so.
func (s *Session) complete(ctx context.Context) error {
	d := s.ing.digester.Digest()
	if s.want != "" && s.want != d {
		log.G(ctx).WithField("ref", s.ing.ref).WithField("digest", d).Warn("the client wrote something else than its ref names")
		return nil
	}
	if err := s.stage(d); err != nil {
		return err
	}
	if s.named == d {
		s.store.brought(s.ing, s.key())
	}
	return nil
}

// stage puts the ingest's data into blobs/, hidden and durable.
func (s *Session) stage(d digest.Digest) error {
	f, err := s.data()
	if err != nil {
		return err
	}
	size := s.ing.offset
	held := false
	if !s.store.Discarded(d) { // what a client has written is kept
		if held, err = s.store.hold(s.ing, d); err != nil {
			return err
		}
	}
	if !held {
		if err := errors.Join(s.syncing(func() error { return s.store.syncFile(f) }), f.Chmod(0o444)); err != nil {
			return fmt.Errorf("blob %s: %w", d, err)
		}
	}
	if err := s.closeData(); err != nil {
		return fmt.Errorf("blob %s: %w", d, err)
	}
	if held {
		err = removeFile(s.ing.path(dataFile))
	} else {
		err = s.store.place(s.ing, d, s.ing.path(dataFile), size, false)
	}
	if err != nil {
		return fmt.Errorf("blob %s: %w", d, err)
	}
	s.unsynced = 0
	return s.settleFolder(d)
}

func (s *Session) settleFolder(d digest.Digest) error {
	return s.syncing(func() error { return s.store.settleFolder(d) })
}

// Commit makes the blob visible and ends the session, whatever comes of it. It
// returns the blob's size. For a blob that a transfer brought or whose declared
// size is complete, that is a change in memory.
//
// off is the client's own count, or 0 when total and expected describe what is
// there; total is 0 when the client does not say. Errors: ErrFailedPrecondition
// for a wrong size or digest; ErrAlreadyExists if the store shows the blob
// already, then the ingest is gone, Digest is the blob's and the size is
// returned; ErrOutOfRange; ErrAborted.
func (s *Session) Commit(ctx context.Context, off, total int64, expected digest.Digest, labels map[string]string) (int64, error) {
	return s.commit(ctx, total, expected, labels, func() error { return s.checkCount(off, total, expected) })
}

// commit is Commit with another way to check the client's count.
func (s *Session) commit(ctx context.Context, total int64, expected digest.Digest, labels map[string]string, check func() error) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return 0, err
	}
	d, err := s.checked(ctx, total, expected, check)
	if err == nil {
		err = s.durable(d)
	}
	size := s.ing.offset
	if err != nil {
		s.growing.fail(fmt.Errorf("the commit of ref %q failed: %w: %w", s.ing.ref, errdefs.ErrAborted, err))
		return 0, errors.Join(s.reason(fmt.Errorf("commit: %w", err)), s.end(), s.store.yield(s.ing))
	}
	closeErr := s.end()
	already, err := s.store.show(s.ing, labels)
	if err != nil {
		s.growing.fail(err)
		return 0, errors.Join(err, closeErr, s.store.yield(s.ing))
	}
	if s.named == "" || s.named == d {
		s.growing.commit()
	}
	s.growing.fail(fmt.Errorf("ref %q was committed as %s: %w", s.ing.ref, d, errdefs.ErrAborted))
	if closeErr != nil {
		log.G(ctx).WithError(closeErr).WithField("ref", s.ing.ref).Warn("the data of a committed ingest")
	}
	s.store.remove(s.ing)
	s.store.committed(s.namespace, d, size)
	if already {
		return size, fmt.Errorf("content %s: %w", d, errdefs.ErrAlreadyExists)
	}
	return size, nil
}

// durable is where COMMIT finds nothing to do unless no size was declared.
func (s *Session) durable(d digest.Digest) error {
	if s.ing.staged == "" {
		return s.stage(d)
	}
	return s.settleFolder(d)
}

func (s *Session) checkCount(off, total int64, expected digest.Digest) error {
	count := s.ing.offset - s.shift
	switch {
	case off == count:
		return nil
	case off != 0:
		return fmt.Errorf("ref %q: commit at %d, the next byte is %d: %w", s.ing.ref, off, count, errdefs.ErrOutOfRange)
	case total > 0 && total == s.ing.offset && expected == s.digest():
		return nil
	case total > 0:
		return fmt.Errorf("ref %q: a client that wrote nothing commits %d bytes as %s, but %d bytes of %s are there: %w",
			s.ing.ref, total, expected, s.ing.offset, s.digest(), errdefs.ErrFailedPrecondition)
	}
	return s.startOver() // the client truncated and wrote nothing more
}

// checked returns the digest of what is there, if that is what the client means.
func (s *Session) checked(ctx context.Context, total int64, expected digest.Digest, check func() error) (digest.Digest, error) {
	if expected != "" {
		if err := expected.Validate(); err != nil {
			return "", fmt.Errorf("expected digest %q: %w: %w", expected, errdefs.ErrInvalidArgument, err)
		}
	}
	if err := s.catchUp(ctx); err != nil {
		return "", err
	}
	if err := check(); err != nil {
		return "", err
	}
	if total <= 0 {
		total = s.declared
	}
	if total > 0 && total != s.ing.offset {
		return "", fmt.Errorf("ref %q has %d bytes, the client commits %d: %w", s.ing.ref, s.ing.offset, total, errdefs.ErrFailedPrecondition)
	}
	if expected == "" {
		return s.digest(), nil
	}
	return s.matching(ctx, expected)
}

func (s *Session) matching(ctx context.Context, expected digest.Digest) (digest.Digest, error) {
	d := s.digest()
	if d.Algorithm() != expected.Algorithm() {
		if err := s.sumAgain(ctx, expected.Algorithm()); err != nil {
			return "", err
		}
		d = s.digest()
	}
	if d == expected {
		return d, nil
	}
	err := fmt.Errorf("the %d bytes of ref %q are %s, not %s: %w", s.ing.offset, s.ing.ref, d, expected, errdefs.ErrFailedPrecondition)
	if s.ing.found || expected == s.named && s.ing.offset == s.ing.total {
		// They never can become what the ref names: let the next try begin anew.
		return "", errors.Join(err, s.spoiled())
	}
	return "", err
}

// sumAgain hashes all of it with another algorithm, which a client that names
// its digest only at COMMIT makes necessary.
func (s *Session) sumAgain(ctx context.Context, alg digest.Algorithm) error {
	if s.ing.staged != "" {
		if err := s.unstage(ctx); err != nil {
			return err
		}
	}
	s.ing.rehash(alg)
	return s.catchUp(ctx)
}
