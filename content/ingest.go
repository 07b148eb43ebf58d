package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
)

// The files of an ingest's folder.
const (
	refFile     = "ref"
	dataFile    = "data"
	startedFile = "startedat"
	updatedFile = "updatedat"
	totalFile   = "total"
	// claimedFile is a finished transfer on its way to blobs/. It is never there
	// when nothing runs.
	claimedFile = "claimed"
)

// progress is what a session waits for.
type progress interface{ Frontier() int64 }

// Status describes an ingest. Offset is the number of bytes that are there,
// while a session waits for a transfer or another client how far that has come.
type Status = ccontent.Status

// ingest is what is known of one ref. It outlives the sessions that write it,
// until COMMIT or Abort.
type ingest struct {
	ref, dir string

	// Guarded by Store.mu. While a session holds the ingest nobody else changes
	// offset, total and staged, so it reads them without the lock.
	open     bool // a session holds it
	dead     bool // aborted, but a session has yet to notice
	opened   time.Time
	started  time.Time
	updated  time.Time
	offset   int64
	total    int64         // 0: unknown
	staged   digest.Digest // the blob in blobs/ that this ingest holds; then there is no data file
	waits    progress      // what the session waits for
	lead     *lead         // the turn its session has at fetching for all
	salvaged bool          // bytes of a failed transfer or of another ingest are in it
	alone    bool          // they were not the blob's: no more of them
	found    bool          // it has bytes of an earlier process, which a power loss may have spoiled
	cancel   context.CancelCauseFunc

	// Owned by the session. The digester has seen the first hashed bytes; it is
	// kept between sessions, so that only a restart costs a second reading.
	digester digest.Digester
	alg      digest.Algorithm
	hashed   int64
	made     bool // the folder is there
}

func (ing *ingest) path(name string) string { return filepath.Join(ing.dir, name) }

func (ing *ingest) aborted() error {
	return fmt.Errorf("ref %q was aborted while it was written: %w", ing.ref, errdefs.ErrAborted)
}

// rehash starts the digest over with another algorithm, if it is another.
func (ing *ingest) rehash(alg digest.Algorithm) {
	if ing.digester == nil || ing.alg != alg {
		ing.digester, ing.alg, ing.hashed = alg.Digester(), alg, 0
	}
}

func (s *Store) loadIngests() error {
	entries, err := os.ReadDir(filepath.Join(s.root, ingestFolder))
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(s.root, ingestFolder, e.Name())
		ing, err := readIngest(dir)
		if err != nil && s.readOnly {
			continue // it is found as a stray
		}
		if err == nil && !s.readOnly {
			err = removeFile(ing.path(claimedFile))
		}
		if err != nil {
			// Without its ref nobody could resume or abort it.
			log.L.WithError(err).WithField("path", dir).Warn("removing an ingest that cannot be resumed")
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			continue
		}
		s.ingests[ing.ref] = ing
	}
	return nil
}

// readIngest reads what a crash (or another content store) left in dir.
func readIngest(dir string) (*ingest, error) {
	ref, err := readSmall(filepath.Join(dir, refFile))
	if err != nil {
		return nil, err
	}
	if digest.FromBytes(ref).Encoded() != filepath.Base(dir) {
		return nil, fmt.Errorf("the folder's name is not the hash of its ref: %w", errdefs.ErrDataLoss)
	}
	ing := &ingest{ref: string(ref), dir: dir, made: true}
	fi, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	ing.started = readTime(ing.path(startedFile), fi.ModTime())
	ing.updated = readTime(ing.path(updatedFile), ing.started)
	if text, err := readSmall(ing.path(totalFile)); err == nil {
		if n, err := strconv.ParseInt(string(text), 10, 64); err == nil && n > 0 {
			ing.total = n
		}
	}
	return ing, ing.readData()
}

func (ing *ingest) readData() error {
	fi, err := os.Lstat(ing.path(dataFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("the data of an ingest is not a regular file: %w", errdefs.ErrDataLoss)
	}
	ing.offset, ing.found = fi.Size(), fi.Size() > 0
	if fi.ModTime().After(ing.updated) {
		ing.updated = fi.ModTime()
	}
	return nil
}

func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	p, err := io.ReadAll(io.LimitReader(f, maxRef+1))
	return p, errors.Join(err, f.Close())
}

func readTime(path string, otherwise time.Time) time.Time {
	var t time.Time
	text, err := readSmall(path)
	if err != nil || t.UnmarshalText(text) != nil {
		return otherwise
	}
	return t
}

// Status describes the ingest of ref, or answers ErrNotFound.
func (s *Store) Status(_ context.Context, ref string) (Status, error) {
	s.mu.Lock()
	ing := s.ingests[ref]
	if ing == nil || ing.dead {
		s.mu.Unlock()
		return Status{}, fmt.Errorf("ingest %q: %w", ref, errdefs.ErrNotFound)
	}
	st, waits := ing.status()
	s.mu.Unlock()
	return withFrontier(st, waits), nil
}

// ListStatuses describes what clients write, and nothing else: transfers without
// a client are not containerd's business.
func (s *Store) ListStatuses(_ context.Context, fs ...string) ([]Status, error) {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return nil, err
	}
	var (
		all   []Status
		waits []progress
	)
	s.mu.Lock()
	for _, ing := range s.ingests {
		if !ing.dead {
			st, w := ing.status()
			all, waits = append(all, st), append(waits, w)
		}
	}
	s.mu.Unlock()

	list := make([]Status, 0, len(all))
	for i, st := range all {
		if filter.Match(refAdaptor(st.Ref)) {
			list = append(list, withFrontier(st, waits[i]))
		}
	}
	slices.SortFunc(list, func(a, b Status) int { return strings.Compare(a.Ref, b.Ref) })
	return list, nil
}

func refAdaptor(ref string) filters.Adaptor {
	return filters.AdapterFunc(func(fieldpath []string) (string, bool) {
		return ref, len(fieldpath) == 1 && fieldpath[0] == "ref"
	})
}

// status returns the ingest's own state and what to ask for a newer offset once mu,
// which the caller holds, is free.
func (ing *ingest) status() (Status, progress) {
	expected, _ := digestFromRef(ing.ref)
	return Status{
		Ref:       ing.ref,
		Offset:    ing.offset,
		Total:     ing.total,
		Expected:  expected,
		StartedAt: ing.started,
		UpdatedAt: ing.updated,
	}, ing.waits
}

func withFrontier(st Status, waits progress) Status {
	if waits == nil {
		return st
	}
	if n := waits.Frontier(); n > st.Offset {
		st.Offset = n
		st.UpdatedAt = time.Now()
	}
	return st
}

// Abort ends the ingest of ref and removes what it has written. A session that
// holds it stops waiting, fails with its next call and removes the rest when it
// is closed; a transfer it waits for only loses a waiter. An unknown ref is
// ErrNotFound.
func (s *Store) Abort(ctx context.Context, ref string) error {
	s.mu.Lock()
	ing := s.ingests[ref]
	if ing == nil || ing.dead {
		s.mu.Unlock()
		return fmt.Errorf("ingest %q: %w", ref, errdefs.ErrNotFound)
	}
	ing.dead = true
	cancel, open := ing.cancel, ing.open
	s.mu.Unlock()
	s.resign(ing, ing.aborted())
	log.G(ctx).WithField("ref", ref).Debug("ingest aborted")

	if cancel != nil {
		cancel(ing.aborted())
	}
	if open {
		// The folder goes with the session: from the moment that ends, another
		// one may have made the folder anew.
		return s.release(ing)
	}
	return s.forget(ing)
}

// forget drops an ingest that nobody writes.
func (s *Store) forget(ing *ingest) error {
	defer s.remove(ing)
	return s.release(ing)
}

// acquire locks ref for one session. fresh: nothing was known of it.
func (s *Store) acquire(ref string, expected digest.Digest) (ing *ingest, fresh bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if expected != "" {
		if _, err := s.shown(expected); err == nil {
			return nil, false, fmt.Errorf("content %s: %w", expected, errdefs.ErrAlreadyExists)
		}
	}
	now := time.Now()
	ing = s.ingests[ref]
	if ing == nil {
		ing, fresh = &ingest{ref: ref, dir: s.ingestDir(ref), started: now, updated: now}, true
		s.ingests[ref] = ing
	}
	if ing.open || ing.dead {
		return nil, false, fmt.Errorf("ref %q has had a writer for %s, try again when it is done: %w",
			ref, now.Sub(ing.opened).Round(time.Millisecond), errdefs.ErrUnavailable)
	}
	ing.open, ing.opened = true, now
	return ing, fresh, nil
}

// yield ends a session's hold of its ref.
func (s *Store) yield(ing *ingest) error {
	s.mu.Lock()
	ing.open = false
	dead := ing.dead
	s.mu.Unlock()
	if dead {
		return s.forget(ing)
	}
	return nil
}

// advance publishes a new offset.
func (s *Store) advance(ing *ingest, offset int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ing.offset, ing.updated = offset, time.Now()
	ing.lead.moved(ing.updated)
}

// watch makes Abort cancel the wait of the session that holds ing.
func (s *Store) watch(ing *ingest, cancel context.CancelCauseFunc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ing.dead {
		return ing.aborted()
	}
	ing.cancel = cancel
	return nil
}

// waiting shows in the ingest's status how far p has come.
func (s *Store) waiting(ing *ingest, p progress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ing.waits = p
}

// unwatch ends what watch and waiting began.
func (s *Store) unwatch(ing *ingest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ing.waits, ing.cancel = nil, nil
}

func (s *Store) alive(ing *ingest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ing.dead {
		return ing.aborted()
	}
	return nil
}
