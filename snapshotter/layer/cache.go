// Package layer turns the uncompressed tar of an image layer into one sparse
// file, and knows the tree of files that the tar describes.
//
// A layer file is the tar itself, byte for byte, named by its DiffID: sha256sum
// of the file prints its name. Runs of zero pages are never written. While it is
// written it is hashed and scanned, so that when the stream ends the file is
// verified and its Table is complete; no data is read twice or moved.
//
// A Table is what containerd's archive.Apply would have made of the tar in the
// upper directory of an overlay, as nodes in memory that point into the tar. It
// is derived data and is made again from the file when it is not in memory.
//
// On disk, below the root of a Cache:
//
//	sha256/<hex of the DiffID>       layer files; more than one link: in use; mode 0400: was in use, or retired
//	blobs/<algorithm>/<hex>          of a compressed blob: symlink to its layer file
//	tmp/                             files being written; removed by Open
//
// One process owns a root at a time.
package layer

import (
	"context"
	"crypto/sha256"
	_ "crypto/sha512" // blobs may have such digests
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Options of a Cache. Zero values are the defaults.
type Options struct {
	// TableBytes is how much memory the tables that are kept may take together
	// (default 128 MiB, room for about 650,000 files). A single table above it is
	// not kept.
	TableBytes int64
	// NewHash makes what DiffIDs are computed with, a SHA-256 (default crypto/sha256's).
	NewHash func() hash.Hash
	// MakeRoom is called by Write when the disk is full, by several at once. True says that there is more room than
	// before: Write goes on. Without it, or when it returns false, Write fails.
	MakeRoom func() bool
	// ReadOnly opens a cache that nobody uses to look at it: nothing is made or tidied, and only Files, Path, Get, Verify,
	// Lookup and Blobs may be called.
	ReadOnly bool
}

const defaultTableBytes = 128 << 20

// Layer is one layer file.
type Layer struct {
	// DiffID is the SHA-256 of the file.
	DiffID digest.Digest
	// Size is the length of the file in bytes, holes included.
	Size int64
	// Path is where the cache has the file. It may be swept unless pinned.
	Path string
	// Table is the tree that the tar describes.
	Table *Table
	// Existed says that Write found the layer in the cache already.
	Existed bool
	// Timings are those of Write, zero for a layer from Get.
	Timings Timings
}

// Cache holds the layer files of one folder. It is safe for concurrent use.
type Cache struct {
	root   string
	tables *tableCache
	prefix int
	hasher func() hash.Hash
	room   func() bool
	onSync func(path string) // tests see here what is made durable, and when
	flush  flushFunc         // sync_file_range, but in tests

	mu     sync.Mutex // held while a layer file gets its name or loses it
	pins   map[digest.Digest]int
	wanted map[digest.Digest]time.Time // since when; see Want
}

// Open opens the cache in root, creating it if needed, and removes what an
// earlier process left unfinished. The folder above root outlives a power loss if
// the caller has seen to it.
func Open(root string, o Options) (*Cache, error) {
	if o.TableBytes == 0 {
		o.TableBytes = defaultTableBytes
	}
	if o.NewHash == nil {
		o.NewHash = sha256.New
	}
	if o.MakeRoom == nil {
		o.MakeRoom = func() bool { return false }
	}
	if o.TableBytes < 0 {
		return nil, fmt.Errorf("%d bytes of tables: %w", o.TableBytes, errdefs.ErrInvalidArgument)
	}
	c := &Cache{
		root:   root,
		tables: newTableCache(o.TableBytes),
		prefix: len(defaultPrefix),
		hasher: o.NewHash,
		room:   o.MakeRoom,
		pins:   make(map[digest.Digest]int),
		wanted: make(map[digest.Digest]time.Time),
		flush:  unix.SyncFileRange,
	}
	if o.ReadOnly {
		return c, nil
	}
	if err := os.RemoveAll(c.tmpDir()); err != nil {
		return nil, fmt.Errorf("unfinished layer files: %w", err)
	}
	for _, dir := range []string{c.layerDir(), c.blobDir(digest.SHA256), c.tmpDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("layer cache: %w", err)
		}
	}
	if err := errors.Join(syncDir(filepath.Dir(c.blobDir(digest.SHA256))), syncDir(root), syncDir(filepath.Dir(root))); err != nil {
		return nil, fmt.Errorf("layer cache: %w", err)
	}
	return c, nil
}

func (c *Cache) layerDir() string { return filepath.Join(c.root, "sha256") }
func (c *Cache) tmpDir() string   { return filepath.Join(c.root, "tmp") }

// path names the file of a DiffID, which is valid afterwards. Only SHA-256 has
// layer files.
func (c *Cache) path(diffID digest.Digest) (string, error) {
	if err := diffID.Validate(); err != nil {
		return "", fmt.Errorf("DiffID %q: %w: %w", diffID, err, errdefs.ErrInvalidArgument)
	}
	if diffID.Algorithm() != digest.SHA256 {
		return "", fmt.Errorf("layer %s: only sha256 is kept: %w", diffID, errdefs.ErrNotFound)
	}
	return filepath.Join(c.layerDir(), diffID.Encoded()), nil
}

// Write makes the layer file of an uncompressed tar stream. When it returns,
// file and name are durable. Where r is Blocks too, it is used as such and never
// read. progress, if not nil, is called from another goroutine with the bytes
// written so far. A layer that the cache has already is kept as it is. What r
// fails with is passed on; a tar that containerd would refuse gives
// errdefs.ErrInvalidArgument. A Read or Next of r that blocks must end when ctx
// does. Pin the DiffID first, if it is known and Sweep may run.
func (c *Cache) Write(ctx context.Context, r io.Reader, progress func(written int64)) (_ *Layer, err error) {
	start := time.Now()
	f, err := os.CreateTemp(c.tmpDir(), "layer-")
	if err != nil {
		return nil, fmt.Errorf("layer file: %w", err)
	}
	defer func() {
		_ = f.Close() // publish has reported what it finds
		if rerr := os.Remove(f.Name()); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	p := &pipeline{file: f, progress: progress, prefix: c.prefix, hash: c.hasher(), flush: c.flush, makeRoom: c.room, syncing: c.syncing}
	if err := p.run(ctx, r); err != nil {
		return nil, err
	}
	l := &Layer{DiffID: p.diffID, Size: p.size, Table: p.table, Timings: p.timings}
	named := time.Now()
	if err := c.publish(f, l); err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.DiffID, err)
	}
	l.Timings.Sync += time.Since(named)
	l.Timings.Tail = time.Since(p.ended)
	l.Timings.Total = time.Since(start)
	c.tables.put(l.DiffID, l.Table)
	return l, nil
}

// publish gives the finished file, which is durable, its name, durably.
func (c *Cache) publish(f *os.File, l *Layer) (err error) {
	if l.Path, err = c.path(l.DiffID); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := c.rename(f.Name(), l); err != nil {
		return err
	}
	c.syncing(c.layerDir())
	return syncDir(c.layerDir())
}

func (c *Cache) syncing(path string) {
	if c.onSync != nil {
		c.onSync(path)
	}
}

func (c *Cache) rename(tmp string, l *Layer) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wanted[l.DiffID] = time.Now()
	if l.Existed = c.adoptLocked(l); l.Existed {
		return nil
	}
	return os.Rename(tmp, l.Path)
}

// adoptLocked reports whether the file is there in full, and makes it young for
// Sweep. Snapshots link the inode, so a good one must not be replaced.
func (c *Cache) adoptLocked(l *Layer) bool {
	fi, err := os.Lstat(l.Path)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() != l.Size {
		return false
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, l.Path, nil, 0) == nil
}

// Get returns a layer of the cache, or errdefs.ErrNotFound, or
// errdefs.ErrDataLoss if its file can no longer be read as a tar. Its table comes
// from memory or is scanned again from the file; several calls share one scan.
// Whether the file still hashes to its name is not looked at: see Verify.
func (c *Cache) Get(ctx context.Context, diffID digest.Digest) (*Layer, error) {
	path, err := c.path(diffID)
	if err != nil {
		return nil, err
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, notFound(diffID, err)
	}
	t, err := c.tables.get(ctx, diffID, func(ctx context.Context) (*Table, error) { return c.rescan(ctx, path) })
	if errdefs.IsInvalidArgument(err) {
		return nil, fmt.Errorf("layer file %s is damaged (%s); remove it and pull again: %w", path, err.Error(), errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, notFound(diffID, err)
	}
	return &Layer{DiffID: diffID, Size: fi.Size(), Path: path, Table: t}, nil
}

func notFound(diffID digest.Digest, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("layer %s: %w", diffID, errdefs.ErrNotFound)
	}
	return fmt.Errorf("layer %s: %w", diffID, err)
}

func (c *Cache) rescan(ctx context.Context, path string) (*Table, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// Reading ahead would read the data that the scan steps over.
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM)
	return scan(ctx, newFileSource(f), c.prefix)
}

// Verify reads the layer file again and returns errdefs.ErrDataLoss if it does
// not hash to its name.
func (c *Cache) Verify(ctx context.Context, diffID digest.Digest) error {
	path, err := c.path(diffID)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return notFound(diffID, err)
	}
	defer f.Close()
	got, err := digest.SHA256.FromReader(ctxReader{ctx.Err, f})
	if err != nil {
		return fmt.Errorf("layer %s: %w", diffID, err)
	}
	if got != diffID {
		return fmt.Errorf("layer file %s has the digest %s; remove it and pull again: %w", path, got, errdefs.ErrDataLoss)
	}
	return nil
}

// ctxReader ends with a context.
type ctxReader struct {
	err func() error
	r   io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if err := r.err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// usedMode is the mode of a layer file that was linked once, or was retired: it has
// served, and need not wait for its first snapshot when its last one is gone.
const usedMode = 0o400

// Link makes dst a hard link of the layer file. The folder of dst is the
// caller's to sync. errdefs.ErrNotFound: no such layer; errdefs.ErrAlreadyExists:
// dst exists.
func (c *Cache) Link(diffID digest.Digest, dst string) error {
	path, err := c.path(diffID)
	if err != nil {
		return err
	}
	err = os.Link(path, dst)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("layer %s: %s: %w", diffID, dst, errdefs.ErrAlreadyExists)
	}
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Lstat(path); serr == nil {
			return fmt.Errorf("layer %s: %w", diffID, err) // the folder of dst
		}
	}
	if err != nil {
		return notFound(diffID, err)
	}
	if err := os.Chmod(dst, usedMode); err != nil {
		return errors.Join(fmt.Errorf("layer %s: %w", diffID, err), os.Remove(dst))
	}
	return nil
}

// Want says that a pull under way counts on the layer, or may be tried again:
// Sweep treats it like one that is new, as it does what Write has made, until
// Satisfied, or until it is old. It is not remembered across a restart, after
// which the layer is made again if need be.
func (c *Cache) Want(diffID digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wanted[diffID] = time.Now()
}

// Satisfied ends Want: the pull is complete.
func (c *Cache) Satisfied(diffID digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.wanted, diffID)
}

// Retire ends Want for the layer of a blob that nobody will come for: the file goes now or, linked or pinned, as soon as
// Sweep finds it unused, as if a snapshot had had it. One that is gone already is no error.
func (c *Cache) Retire(blob digest.Digest) error {
	link, err := c.record(blob)
	if err != nil {
		return err
	}
	diffID, err := c.Lookup(blob)
	if errdefs.IsNotFound(err) {
		return c.sweepRecord(link)
	} else if err != nil {
		return err
	}
	path, err := c.path(diffID)
	if err != nil {
		return err
	}
	c.Satisfied(diffID)
	if err := os.Chmod(path, usedMode); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("layer %s: %w", diffID, err)
	}
	return errors.Join(c.sweepOne(diffID, 0), c.sweepRecord(link))
}

// Pin keeps Sweep from the layer until unpin, which may be called more than
// once. The layer need not exist yet.
func (c *Cache) Pin(diffID digest.Digest) (unpin func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pins[diffID]++
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.pins[diffID]--; c.pins[diffID] == 0 {
			delete(c.pins, diffID)
		}
	})
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder %s: %w", path, err)
	}
	return nil
}
