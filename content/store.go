package content

import (
	"cmp"
	"context"
	_ "crypto/sha256" // makes digest.SHA256 available
	_ "crypto/sha512" // makes digest.SHA384 and digest.SHA512 available
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const (
	blobFolder   = "blobs"
	ingestFolder = "ingest"
)

var _ ccontent.Store = (*Store)(nil)

// Fetcher takes the download of a blob over. Session.Status calls it, once per
// session at most.
type Fetcher interface {
	// Fetch joins or starts the transfer of a blob. It may wait for containerd's
	// API until ctx ends. errdefs.ErrNotFound: nobody but the client can fetch
	// this blob; any other error has the same effect and is logged.
	Fetch(ctx context.Context, req FetchRequest) (Transfer, error)
}

// FetchRequest says which blob a client is about to fetch, and for whom.
type FetchRequest struct {
	// Namespace is containerd's namespace of the request.
	Namespace string
	// Ref is the client's own ref, without containerd's "namespace/number/".
	Ref    string
	Digest digest.Digest
	// Size is the whole blob's, in bytes; always positive.
	Size int64
}

// ErrRefused is wrapped by an error of Transfer.Wait after which the client need
// not try by itself: no host has what it asks for. The STAT that waits fails
// with that error.
var ErrRefused = errors.New("the blob cannot be had as it is described")

// Transfer is one waiter of a blob that is being fetched. Every method but Close
// may be called at any time, Frontier also after Close.
type Transfer interface {
	// Wait returns nil when the blob is complete, verified and durable.
	Wait(ctx context.Context) error
	// Frontier is the number of contiguous bytes that are there.
	Frontier() int64
	// LinkTo makes path a hard link to the finished file.
	LinkTo(path string) error
	// CloneTo gives f the bytes from off to the frontier, at the same offsets, and
	// returns how many of them are there, also with an error. The error wraps
	// errdefs.ErrAborted, and none are there, if they turned out wrong meanwhile.
	CloneTo(ctx context.Context, f *os.File, off int64) (int64, error)
	// Close drops the waiter; whether the transfer goes on is not its business.
	Close() error
}

// Discarding is a Transfer that may give the bytes up as they are used.
type Discarding interface {
	// Record is what is left of the blob when Wait has returned nil; nil if the
	// bytes are there. LinkTo fails where there is a Record.
	Record() *Record
}

// Observer is told what happens to blobs. Its methods must not block: containerd
// may hold its database's lock. None of the Store's locks is held when they are
// called, so they may use the Store.
type Observer interface {
	// Committed: namespace has committed a blob, also when the store showed it
	// already (for another namespace).
	Committed(namespace string, d digest.Digest, size int64)
	// Ingesting: a client writes the blob d itself. Called at the first WRITE of
	// a session, and again at the first WRITE after a truncation. size is 0 when
	// the client has declared none. The observer closes g when it needs it no more.
	Ingesting(namespace string, d digest.Digest, size int64, g *Growing)
	// Mismatched: namespace's client went on where a failed transfer had stopped,
	// and all bytes together are not the blob d. The transfer's may be to blame.
	Mismatched(namespace string, d digest.Digest)
	// Deleted: the blob is no longer shown.
	Deleted(d digest.Digest)
}

// Options of a Store. All members may be left out.
type Options struct {
	Fetcher  Fetcher
	Observer Observer
	// Refetcher brings discarded blobs back. Without one they cannot be read.
	Refetcher Refetcher
	// ReadOnly opens a store that nobody uses to look at its files: nothing is made or tidied, and only Files, Uses,
	// CheckRecord, Strays, Info, Discarded, ReaderAt, Path and Close may be called.
	ReadOnly bool
	// Isolated is containerd's content sharing policy "isolated": a client follows
	// only clients of its own namespace.
	Isolated bool
	// GiveUp is how long a client that fetches for others may write nothing before
	// another one takes over. Default 2m.
	GiveUp time.Duration
}

// Store is containerd's content.Store on disk. See the package's documentation.
type Store struct {
	root     string
	fetcher  Fetcher
	observer Observer
	refetch  refetches
	isolated bool
	giveUp   time.Duration
	onSync   func(path string) // tests see here what is made durable, and when
	onClear  func(dir string)  // tests see here which ingest's folder is about to be removed

	readOnly bool
	freeing  sync.WaitGroup // what is removed in the background

	// files serialises changes of blobs/. It comes before mu.
	files sync.Mutex

	making sync.Mutex
	made   map[string]bool // the folders in blobs/ whose names are durable; guarded by making

	mu       sync.Mutex
	blobs    map[digest.Digest]*blob
	ingests  map[string]*ingest
	clearing map[string]chan struct{} // the folders of ingests that have ended, until they are removed
	leads    map[leadKey]*lead
	wrote    map[string]time.Time // when a leader of this namespace has written last
}

// NewStore opens the store at root, and makes the folders that are missing. All
// blobs it finds are visible; ingests are kept for their clients to resume.
// The folder above root outlives a power loss if the caller has seen to it.
func NewStore(root string, o Options) (*Store, error) {
	s := &Store{
		root:     root,
		fetcher:  o.Fetcher,
		observer: o.Observer,
		refetch:  refetches{from: o.Refetcher, running: map[digest.Digest]*refetch{}},
		isolated: o.Isolated,
		giveUp:   cmp.Or(o.GiveUp, giveUp),
		blobs:    map[digest.Digest]*blob{},
		ingests:  map[string]*ingest{},
		clearing: map[string]chan struct{}{},
		made:     map[string]bool{},
		leads:    map[leadKey]*lead{},
		wrote:    map[string]time.Time{},
	}
	if o.ReadOnly {
		s.readOnly = true
		return s, s.load()
	}
	for _, dir := range []string{filepath.Join(blobFolder, digest.Canonical.String()), ingestFolder, discardedFolder} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return nil, fmt.Errorf("content store: %w", err)
		}
	}
	if err := errors.Join(s.syncFolder(filepath.Join(root, blobFolder)), s.syncFolder(root), s.syncFolder(filepath.Dir(root))); err != nil {
		return nil, fmt.Errorf("content store: %w", err)
	}
	return s, s.load()
}

// load reads what is there.
func (s *Store) load() error {
	for _, part := range []func() error{s.loadBlobs, s.loadRecords, s.loadIngests} {
		err := part()
		if s.readOnly && errors.Is(err, os.ErrNotExist) {
			continue // nothing was ever stored
		}
		if err != nil {
			return fmt.Errorf("content store: %w", err)
		}
	}
	return nil
}

func (s *Store) committed(namespace string, d digest.Digest, size int64) {
	if s.observer != nil {
		s.observer.Committed(namespace, d, size)
	}
}

// syncFile makes the data of f durable.
func (s *Store) syncFile(f *os.File) error {
	if s.onSync != nil {
		s.onSync(f.Name())
	}
	return f.Sync()
}

// syncFolder makes the entries of a folder durable.
func (s *Store) syncFolder(path string) error {
	if s.onSync != nil {
		s.onSync(path)
	}
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// plain says a full disk in words for the person who reads the pod's events.
func (s *Store) plain(err error) error {
	if full(err) {
		return fmt.Errorf("the disk of %s is full, free some space and pull again: %w: %w",
			s.root, errdefs.ErrResourceExhausted, err)
	}
	return err
}

// full says whether it is the disk that has no room.
func full(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// removeFile treats a file that is not there as removed.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func writeTime(path string, t time.Time) error {
	text, err := t.MarshalText()
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

// Close lets go of the blobs that were brought back to be read, and waits until what
// was deleted and aborted has freed its space. Readers go on until they are closed.
func (s *Store) Close() error {
	err := s.refetch.close()
	s.freeing.Wait()
	return err
}
