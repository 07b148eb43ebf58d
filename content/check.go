package content

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// What follows is for `gantry check`. The store hands out what there is to be verified; whoever reads the files holds
// no lock meanwhile and asks afterwards whether what was read is still the store's.

// File is one blob as it lies on disk.
type File struct {
	Digest digest.Digest
	Size   int64 // in bytes
	// Path is that of the blob's file, or of its record.
	Path string
	// Discarded: there is a record in place of the file.
	Discarded bool
}

// Files lists the blobs that are there in full, hidden ones too, by digest.
func (s *Store) Files() []File {
	s.mu.Lock()
	defer s.mu.Unlock()
	files := make([]File, 0, len(s.blobs))
	for d, b := range s.blobs {
		f := File{Digest: d, Size: b.size, Path: s.blobPath(d), Discarded: b.discarded}
		if b.discarded {
			f.Path = s.recordPath(d)
		}
		files = append(files, f)
	}
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return files
}

// Uses says whether the store still answers for the blob with this very file; seen is nil for one that was missing.
func (s *Store) Uses(f File, seen fs.FileInfo) bool {
	s.files.Lock() // not between a rename and its note in the map
	defer s.files.Unlock()
	s.mu.Lock()
	b := s.blobs[f.Digest]
	same := b != nil && b.discarded == f.Discarded
	s.mu.Unlock()
	if !same {
		return false
	}
	now, err := os.Lstat(f.Path)
	if err != nil || seen == nil {
		return seen == nil && errors.Is(err, fs.ErrNotExist)
	}
	return os.SameFile(now, seen)
}

// CheckRecord reads what is left of a discarded blob. errdefs.ErrDataLoss: it is damaged; errdefs.ErrNotFound: it is gone.
func (s *Store) CheckRecord(f File) error {
	r, err := s.readRecord(f.Digest)
	if err == nil && r.Size != f.Size {
		err = fmt.Errorf("%s: the record says %d bytes, the store %d: %w", f.Path, r.Size, f.Size, errdefs.ErrDataLoss)
	}
	return err
}

// Strays lists files below the root that belong to no blob and no ingest, and were not touched for age.
func (s *Store) Strays(age time.Duration) ([]string, error) {
	var found []string
	for _, sub := range []string{filepath.Join(blobFolder, "*", "*"), filepath.Join(discardedFolder, "*", "*"), filepath.Join(ingestFolder, "*")} {
		names, err := filepath.Glob(filepath.Join(s.root, sub))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if !s.known(name) && older(name, age) && !s.known(name) { // it may have come or gone meanwhile
				found = append(found, name)
			}
		}
	}
	return found, nil
}

func (s *Store) known(name string) bool {
	s.files.Lock()
	defer s.files.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	dir := filepath.Dir(name)
	if dir == filepath.Join(s.root, ingestFolder) {
		if s.clearing[name] != nil {
			return true
		}
		for _, ing := range s.ingests {
			if ing.dir == name {
				return true
			}
		}
		return false
	}
	b := s.blobs[digest.NewDigestFromEncoded(digest.Algorithm(filepath.Base(dir)), filepath.Base(name))]
	if filepath.Dir(dir) == filepath.Join(s.root, discardedFolder) {
		return b != nil && (b.discarded || b.stale)
	}
	return b != nil && !b.discarded
}

func older(name string, age time.Duration) bool {
	fi, err := os.Lstat(name)
	return err == nil && time.Since(fi.ModTime()) >= age
}

// Replace puts a good file in the place of a blob whose file or record is broken or gone. link gives the file, which is
// verified and durable, one more name. The blob is shown afterwards, also if the store did not know it.
func (s *Store) Replace(namespace string, d digest.Digest, size int64, link func(path string) error) error {
	target := s.blobPath(d)
	if err := s.algorithmFolder(filepath.Dir(target)); err != nil {
		return err
	}
	tmp := filepath.Join(s.root, discardedFolder, "new-"+d.Encoded()) // a start removes what a crash leaves there
	if err := removeFile(tmp); err != nil {
		return err
	}
	if err := link(tmp); err != nil {
		return err
	}
	if err := s.swap(d, size, tmp, target); err != nil {
		return s.plain(errors.Join(fmt.Errorf("blob %s: %w", d, err), removeFile(tmp)))
	}
	if err := s.settleFolder(d); err != nil {
		return fmt.Errorf("blob %s: %w", d, err)
	}
	s.committed(namespace, d, size) // a manifest is read again
	return nil
}

func (s *Store) swap(d digest.Digest, size int64, tmp, target string) error {
	s.files.Lock()
	defer s.files.Unlock()
	if err := os.Rename(tmp, target); err != nil {
		return err
	}
	// Where both names were of one file the rename has done nothing.
	if err := removeFile(tmp); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobs[d]
	if b == nil {
		now := time.Now()
		b = &blob{created: now, updated: now, visible: true, holders: map[*ingest]struct{}{}}
		s.blobs[d] = b
	}
	b.returned()
	b.size, b.durable = size, false
	return nil
}

// Quarantine takes a file that belongs to nobody out of the store's folders, to <root>/stray, where nothing looks.
func (s *Store) Quarantine(ctx context.Context, name string) (string, error) {
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if s.known(name) {
		return "", fmt.Errorf("%s is in use: %w", name, errdefs.ErrFailedPrecondition)
	}
	dir := filepath.Join(s.root, "stray")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	to := filepath.Join(dir, fmt.Sprintf("%d-%s", time.Now().UnixNano(), filepath.Base(name)))
	return to, os.Rename(name, to)
}

// Path is where the file of a blob lies, or would lie.
func (s *Store) Path(d digest.Digest) string { return s.blobPath(d) }
