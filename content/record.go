package content

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
)

// Record is what is kept of a blob whose bytes were discarded: enough to answer for it, to fetch it again and to know
// each part of it again.
//
// It lies in discarded/<algorithm>/<hex> below the store's root, beside blobs/, where containerd's own store does not
// look. The file is a line of text, recordMagic; a line of JSON, the Record without its Sums; the Sums, 32 bytes each;
// and the SHA-256 of all that. It gets its name when it is durable, and is never changed.
type Record struct {
	Digest digest.Digest `json:"digest"`
	// Size is the blob's, in bytes.
	Size int64 `json:"size"`
	// Chunk is how many bytes each of Sums is over; the last one is over what is left.
	Chunk int64 `json:"chunk"`
	// Namespace is that of the client for which the blob was fetched.
	Namespace string `json:"namespace,omitempty"`
	// Origins are where it was fetched from, at least one.
	Origins []Origin `json:"origins"`
	// Sums are the SHA-256 of the chunks, in order.
	Sums [][sha256.Size]byte `json:"-"`
}

// Origin is a repository that has the blob.
type Origin struct {
	Host       string `json:"host"` // with its port, as an image's name has it
	Repository string `json:"repository"`
}

func (o Origin) String() string { return o.Host + "/" + o.Repository }

const (
	discardedFolder = "discarded"
	recordMagic     = "gantry discarded blob 1\n"
	// maxChunk bounds what is read into memory to check a part of a blob.
	maxChunk = 16 << 20
)

func (r *Record) validate() error {
	if err := r.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %.100q: %w: %w", string(r.Digest), errdefs.ErrInvalidArgument, err)
	}
	switch {
	case r.Size <= 0, r.Chunk <= 0, r.Chunk > maxChunk, len(r.Origins) == 0:
		return fmt.Errorf("record of %s: size %d, chunks of %d, %d origins: %w", r.Digest, r.Size, r.Chunk, len(r.Origins), errdefs.ErrInvalidArgument)
	case int64(len(r.Sums)) != r.chunks():
		return fmt.Errorf("record of %s: %d checksums, want %d: %w", r.Digest, len(r.Sums), r.chunks(), errdefs.ErrInvalidArgument)
	}
	return nil
}

func (r *Record) chunks() int64 { return (r.Size-1)/r.Chunk + 1 }

func (r *Record) encode() ([]byte, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	head, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, len(recordMagic)+len(head)+1+(len(r.Sums)+1)*sha256.Size)
	b = append(b, recordMagic...)
	b = append(append(b, head...), '\n')
	for _, s := range r.Sums {
		b = append(b, s[:]...)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...), nil
}

// decodeRecord is the opposite of encode. Whatever is not exactly what that wrote is errdefs.ErrDataLoss.
func decodeRecord(b []byte) (*Record, error) {
	n := len(b) - sha256.Size
	if n < 0 || sha256.Sum256(b[:n]) != [sha256.Size]byte(b[n:]) {
		return nil, fmt.Errorf("a record of a discarded blob is damaged: %w", errdefs.ErrDataLoss)
	}
	rest, ok := bytes.CutPrefix(b[:n], []byte(recordMagic))
	head, sums, cut := bytes.Cut(rest, []byte{'\n'})
	if !ok || !cut || len(sums)%sha256.Size != 0 {
		return nil, fmt.Errorf("not a record of a discarded blob: %w", errdefs.ErrDataLoss)
	}
	r := &Record{}
	if err := json.Unmarshal(head, r); err != nil {
		return nil, fmt.Errorf("record of a discarded blob: %w: %w", err, errdefs.ErrDataLoss)
	}
	for ; len(sums) > 0; sums = sums[sha256.Size:] {
		r.Sums = append(r.Sums, [sha256.Size]byte(sums[:sha256.Size]))
	}
	if err := r.validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	return r, nil
}

func (s *Store) recordPath(d digest.Digest) string {
	return filepath.Join(s.root, discardedFolder, d.Algorithm().String(), d.Encoded())
}

func (s *Store) readRecord(d digest.Digest) (*Record, error) {
	path := s.recordPath(d)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("content %s: its record was removed, pull again: %w", d, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	r, err := decodeRecord(b)
	if err == nil && r.Digest != d {
		err = fmt.Errorf("it is that of %s: %w", r.Digest, errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// stageRecord writes a record and makes its bytes durable. It gets its name from place.
func (s *Store) stageRecord(r *Record) (tmp string, err error) {
	b, err := r.encode()
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp(filepath.Join(s.root, discardedFolder), "new-")
	if err != nil {
		return "", err
	}
	_, err = f.Write(b)
	if err == nil {
		err = errors.Join(s.syncFile(f), f.Chmod(0o444))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, removeFile(f.Name()))
	}
	return f.Name(), nil
}

// loadRecords finds the discarded blobs. One that has a file too was brought back when the process ended.
func (s *Store) loadRecords() error {
	top := filepath.Join(s.root, discardedFolder)
	entries, err := os.ReadDir(top)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, a := range entries {
		if !a.IsDir() { // a record that a crash cut short
			if s.readOnly {
				continue
			}
			if err := removeFile(filepath.Join(top, a.Name())); err != nil {
				return err
			}
			continue
		}
		files, err := os.ReadDir(filepath.Join(top, a.Name()))
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := s.loadRecord(digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), f.Name()), f); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) loadRecord(d digest.Digest, f os.DirEntry) error {
	if err := d.Validate(); err != nil {
		log.L.WithError(err).WithField("name", f.Name()).Warn("not a record, ignored in the content store's folder of discarded blobs")
		return nil
	}
	if b := s.blobs[d]; b != nil && s.readOnly {
		b.stale = true
		return nil
	} else if b != nil {
		return removeFile(s.recordPath(d))
	}
	r, err := s.readRecord(d)
	if err != nil {
		log.L.WithError(err).WithField("digest", d).Warn("a discarded blob is lost, remove its images and pull them again")
		return nil //nolint:nilerr // the others are there
	}
	fi, err := f.Info()
	if err != nil {
		return err
	}
	s.blobs[d] = &blob{
		size: r.Size, created: fi.ModTime(), updated: fi.ModTime(), visible: true, durable: true, discarded: true,
		holders: map[*ingest]struct{}{},
	}
	return nil
}
