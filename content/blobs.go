package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blob is one file in blobs/. All fields are guarded by Store.mu.
type blob struct {
	size    int64
	created time.Time
	updated time.Time
	labels  map[string]string
	// visible: containerd has committed it.
	visible bool
	// durable: the folder was synced after the file came into it.
	durable bool
	// discarded: there is a record in place of the file.
	discarded bool
	// stale: there is a record beside the file, to be removed when the file's name is durable.
	stale bool
	// holders are the ingests that may yet commit it.
	holders map[*ingest]struct{}
}

func (b *blob) info(d digest.Digest) ccontent.Info {
	return ccontent.Info{
		Digest:    d,
		Size:      b.size,
		CreatedAt: b.created,
		UpdatedAt: b.updated,
		Labels:    maps.Clone(b.labels),
	}
}

func (s *Store) blobPath(d digest.Digest) string {
	return filepath.Join(s.root, blobFolder, d.Algorithm().String(), d.Encoded())
}

func (s *Store) loadBlobs() error {
	algorithms, err := os.ReadDir(filepath.Join(s.root, blobFolder))
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		alg := digest.Algorithm(a.Name())
		if !a.IsDir() || !alg.Available() {
			continue
		}
		s.made[filepath.Join(s.root, blobFolder, a.Name())] = true // NewStore has synced blobs/
		files, err := os.ReadDir(filepath.Join(s.root, blobFolder, a.Name()))
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := s.loadBlob(digest.NewDigestFromEncoded(alg, f.Name()), f); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) loadBlob(d digest.Digest, f os.DirEntry) error {
	if err := d.Validate(); err != nil || !f.Type().IsRegular() {
		log.L.WithError(err).WithField("name", f.Name()).Warn("not a blob, ignored in the content store's blobs folder")
		return nil
	}
	fi, err := f.Info()
	if err != nil {
		return err
	}
	s.blobs[d] = &blob{
		size:    fi.Size(),
		created: fi.ModTime(),
		updated: fi.ModTime(),
		visible: true,
		durable: true,
		holders: map[*ingest]struct{}{},
	}
	return nil
}

// shown returns the blob if it is visible. The caller holds mu.
func (s *Store) shown(d digest.Digest) (*blob, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("content %q: %w: %w", d, errdefs.ErrInvalidArgument, err)
	}
	b := s.blobs[d]
	if b == nil || !b.visible {
		return nil, fmt.Errorf("content %s: %w", d, errdefs.ErrNotFound)
	}
	return b, nil
}

// Info describes a committed blob, without touching the disk.
func (s *Store) Info(_ context.Context, d digest.Digest) (ccontent.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := s.shown(d)
	if err != nil {
		return ccontent.Info{}, err
	}
	return b.info(d), nil
}

// Update changes a blob's labels, which live in memory only: containerd's
// metadata store keeps them. An empty value in a named field removes the label.
func (s *Store) Update(_ context.Context, info ccontent.Info, fieldpaths ...string) (ccontent.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := s.shown(info.Digest)
	if err != nil {
		return ccontent.Info{}, err
	}
	labels, err := updatedLabels(b.labels, info.Labels, fieldpaths)
	if err != nil {
		return ccontent.Info{}, fmt.Errorf("content %s: %w", info.Digest, err)
	}
	b.labels = labels
	b.updated = time.Now()
	return b.info(info.Digest), nil
}

func updatedLabels(old, wanted map[string]string, fieldpaths []string) (map[string]string, error) {
	if len(fieldpaths) == 0 || slices.Contains(fieldpaths, "labels") {
		old = wanted
	}
	labels := maps.Clone(old)
	for _, path := range fieldpaths {
		key, ok := strings.CutPrefix(path, "labels.")
		switch {
		case path == "labels":
		case !ok:
			return nil, fmt.Errorf("only labels can be updated, not %q: %w", path, errdefs.ErrInvalidArgument)
		case wanted[key] == "":
			delete(labels, key)
		default:
			if labels == nil {
				labels = map[string]string{}
			}
			labels[key] = wanted[key]
		}
	}
	return labels, nil
}

// Walk calls fn for every committed blob that matches one of the filters. The
// list is taken before the first call and no lock is held, so fn may call Delete.
func (s *Store) Walk(ctx context.Context, fn ccontent.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	infos := s.infos()
	slices.SortFunc(infos, func(a, b ccontent.Info) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	for _, info := range infos {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !filter.Match(ccontent.AdaptInfo(info)) {
			continue
		}
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) infos() []ccontent.Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	infos := make([]ccontent.Info, 0, len(s.blobs))
	for d, b := range s.blobs {
		if b.visible {
			infos = append(infos, b.info(d))
		}
	}
	return infos
}

// Delete removes a committed blob. Where another client has staged the same
// blob and not yet committed it, the file stays, hidden, until that is decided.
func (s *Store) Delete(_ context.Context, d digest.Digest) error {
	if err := s.delete(d); err != nil {
		return err
	}
	if s.observer != nil {
		s.observer.Deleted(d)
	}
	return nil
}

func (s *Store) delete(d digest.Digest) error {
	s.files.Lock()
	defer s.files.Unlock()

	s.mu.Lock()
	b, err := s.shown(d)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	b.visible, b.labels = false, nil
	held := len(b.holders) > 0
	if !held {
		// Nobody can find it to hold it again: that takes files.
		delete(s.blobs, d)
	}
	s.mu.Unlock()
	if held {
		return nil
	}
	if err := s.unlink(d, b); err != nil {
		s.mu.Lock()
		b.visible = true
		s.blobs[d] = b
		s.mu.Unlock()
		return fmt.Errorf("delete content %s: %w", d, err)
	}
	return nil
}

// ReaderAt opens a committed blob. A reader outlives a Delete. The bytes of a
// discarded blob are fetched again as they are read, for as long as ctx lasts.
func (s *Store) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ccontent.ReaderAt, error) {
	s.mu.Lock()
	_, err := s.shown(desc.Digest)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return s.open(ctx, desc.Digest)
}

// open opens a blob that is in blobs/ or has a record, visible or not.
func (s *Store) open(ctx context.Context, d digest.Digest) (ccontent.ReaderAt, error) {
	if s.Discarded(d) {
		return s.openDiscarded(ctx, d)
	}
	f, err := os.Open(s.blobPath(d))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("content %s: its file was removed, pull again: %w", d, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &blobReader{File: f, size: fi.Size()}, nil
}

type blobReader struct {
	*os.File
	size int64
}

func (r *blobReader) Size() int64 { return r.size }

// Reader lets containerd's helpers read from the start without a copy of their own.
func (r *blobReader) Reader() io.Reader { return io.NewSectionReader(r.File, 0, r.size) }

// hold makes ing a holder of the blob if its file is there already, whoever
// brought it.
func (s *Store) hold(ing *ingest, d digest.Digest) (held bool, err error) {
	s.files.Lock() // not between a Delete's decision and its unlink
	defer s.files.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if ing.dead {
		return false, ing.aborted()
	}
	b := s.blobs[d]
	if b == nil {
		return false, nil
	}
	b.holders[ing] = struct{}{}
	ing.staged, ing.offset = d, b.size
	return true, nil
}

// place moves path into blobs/, hidden and held by ing. The caller has synced
// the file and has yet to call settleFolder. discarded: path is the blob's record
// and goes where records are. A record gives way to a file.
func (s *Store) place(ing *ingest, d digest.Digest, path string, size int64, discarded bool) error {
	target := s.blobPath(d)
	if discarded {
		target = s.recordPath(d)
	}
	if err := s.algorithmFolder(filepath.Dir(target)); err != nil {
		return err
	}
	s.files.Lock()
	defer s.files.Unlock()
	s.mu.Lock()
	b := s.blobs[d]
	dead, there := ing.dead, b != nil && (discarded || !b.discarded)
	s.mu.Unlock()
	if dead {
		return ing.aborted()
	}
	change := func() error { return os.Rename(path, target) }
	if there {
		change = func() error { return removeFile(path) }
	}
	if err := change(); err != nil {
		return err
	}
	if s.record(ing, d, size, discarded) {
		return nil
	}
	// Aborted meanwhile: record did nothing, so the file is nobody's unless it
	// was there before.
	if !there {
		return errors.Join(ing.aborted(), removeFile(target))
	}
	return ing.aborted()
}

// record enters a file that has just come into blobs/. It reports whether ing
// is still alive. The caller holds files.
func (s *Store) record(ing *ingest, d digest.Digest, size int64, discarded bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ing.dead {
		return false
	}
	b := s.blobs[d]
	if b == nil {
		now := time.Now()
		b = &blob{size: size, created: now, updated: now, discarded: discarded, holders: map[*ingest]struct{}{}}
		s.blobs[d] = b
	}
	if !discarded {
		b.returned()
	}
	b.holders[ing] = struct{}{}
	ing.staged, ing.offset = d, size
	return true
}

// algorithmFolder makes a folder of blobs/. On return its name is durable, also when another session has just made it.
func (s *Store) algorithmFolder(dir string) error {
	s.making.Lock()
	defer s.making.Unlock()
	if s.made[dir] {
		return nil
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := s.syncFolder(filepath.Dir(dir)); err != nil {
		return err
	}
	s.made[dir] = true
	return nil
}

// settleFolder makes the entry of a placed or held blob durable. It does nothing
// where that was done before.
func (s *Store) settleFolder(d digest.Digest) error {
	s.mu.Lock()
	b := s.blobs[d]
	done := b == nil || b.durable
	path := s.blobPath(d)
	if !done && b.discarded {
		path = s.recordPath(d)
	}
	s.mu.Unlock()
	if done {
		return nil
	}
	if err := s.syncFolder(filepath.Dir(path)); err != nil {
		return err
	}
	return s.settled(d, b, path == s.recordPath(d))
}

// release ends ing's hold. A hidden blob that nobody holds is unlinked. staged
// is left to the session, which reads it without a lock; a second call does nothing.
func (s *Store) release(ing *ingest) error {
	s.files.Lock()
	defer s.files.Unlock()
	s.mu.Lock()
	d := ing.staged
	b := s.blobs[d]
	if b == nil {
		s.mu.Unlock()
		return nil
	}
	delete(b.holders, ing)
	unlink := !b.visible && len(b.holders) == 0
	if unlink {
		delete(s.blobs, d)
	}
	s.mu.Unlock()
	if unlink {
		return s.unlink(d, b)
	}
	return nil
}

// show is what COMMIT does: the blob that ing holds becomes visible, in memory.
// It reports whether it was so before.
func (s *Store) show(ing *ingest, labels map[string]string) (already bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ing.dead {
		return false, ing.aborted()
	}
	b := s.blobs[ing.staged]
	delete(b.holders, ing)
	ing.staged = ""
	if b.visible {
		return true, nil
	}
	b.visible = true
	b.created = time.Now()
	b.updated = b.created
	b.labels = maps.Clone(labels)
	return false, nil
}
