package content

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// returned notes that a blob has a file now, which has yet to become durable. The caller holds Store.mu and has put the
// file in its place.
func (b *blob) returned() {
	if b.discarded {
		b.discarded, b.stale, b.durable = false, true, false
	}
}

// unlink removes a blob's file and record, as far as it has them. The caller holds files.
func (s *Store) unlink(d digest.Digest, b *blob) error {
	s.mu.Lock()
	discarded, stale := b.discarded, b.stale
	s.mu.Unlock()
	var err error
	if discarded || stale {
		err = removeFile(s.recordPath(d))
	}
	if discarded {
		return err
	}
	return errors.Join(err, s.free(s.blobPath(d)))
}

// free removes a file, and has its blocks freed in the background: that takes its
// time for a large one, and containerd's garbage collection waits for Delete.
func (s *Store) free(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return removeFile(path) // all the same
	}
	err = removeFile(path)
	s.freeing.Go(func() { _ = f.Close() }) // the last name is gone: this frees
	return err
}

// settled notes that the name of a blob's file, or of its record, is durable. A record beside a file goes only now.
func (s *Store) settled(d digest.Digest, b *blob, discarded bool) error {
	s.files.Lock()
	defer s.files.Unlock()
	s.mu.Lock()
	if b.discarded != discarded { // it became a file meanwhile, whose name has yet to become durable
		s.mu.Unlock()
		return nil
	}
	b.durable = true
	stale := b.stale && s.blobs[d] == b
	b.stale = false
	s.mu.Unlock()
	if stale {
		return removeFile(s.recordPath(d))
	}
	return nil
}

// Discarded reports whether the store answers for the blob without having its bytes.
func (s *Store) Discarded(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobs[d]
	return b != nil && b.discarded
}

// DiscardedBlobs describes all blobs that the store has no bytes of, those that were not committed yet too.
func (s *Store) DiscardedBlobs() []ccontent.Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	var infos []ccontent.Info
	for d, b := range s.blobs {
		if b.discarded {
			infos = append(infos, b.info(d))
		}
	}
	slices.SortFunc(infos, func(a, b ccontent.Info) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return infos
}

// Restore brings a discarded blob back for good: its file is in blobs/, verified and durable, when this returns nil. It
// does nothing to a blob that is there. What was fetched is kept if it fails or ctx ends, and the next call goes on from
// there. errdefs.ErrNotFound: the blob was deleted, also meanwhile.
func (s *Store) Restore(ctx context.Context, d digest.Digest) error {
	if !s.Discarded(d) {
		s.mu.Lock()
		defer s.mu.Unlock()
		_, err := s.shown(d)
		return err
	}
	r, err := s.refetch.join(ctx, s, d)
	if err != nil {
		return err
	}
	defer s.refetch.leave(r)
	if err := r.complete(ctx); err != nil {
		return err
	}
	if err := s.giveBack(r); err != nil {
		return s.plain(fmt.Errorf("content %s: %w", d, err))
	}
	return s.settleFolder(d)
}

// giveBack links a complete blob into blobs/.
func (s *Store) giveBack(r *refetch) error {
	d := r.record.Digest
	path := s.blobPath(d)
	if err := s.algorithmFolder(filepath.Dir(path)); err != nil {
		return err
	}
	s.files.Lock()
	defer s.files.Unlock()
	s.mu.Lock()
	b := s.blobs[d]
	discarded := b != nil && b.discarded
	s.mu.Unlock()
	if b == nil {
		return fmt.Errorf("it was deleted meanwhile: %w", errdefs.ErrNotFound)
	}
	if !discarded {
		return nil
	}
	if err := r.transfer.LinkTo(path); err != nil {
		return err
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != r.record.Size {
		return errors.Join(fmt.Errorf("the file that came back has another size: %w", errdefs.ErrDataLoss), err, removeFile(path))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b.returned()
	return nil
}
