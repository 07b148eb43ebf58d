package layer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

var recordSerial atomic.Uint64

func (c *Cache) blobDir(a digest.Algorithm) string {
	return filepath.Join(c.root, "blobs", a.String())
}

func (c *Cache) record(blob digest.Digest) (string, error) {
	if err := blob.Validate(); err != nil {
		return "", fmt.Errorf("blob %q: %w: %w", blob, err, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(c.blobDir(blob.Algorithm()), blob.Encoded()), nil
}

// Record notes durably that the blob decompresses to the layer. Only a blob
// whose digest has been verified may be recorded: adoption trusts it.
// errdefs.ErrNotFound: the layer is not in the cache.
func (c *Cache) Record(blob, diffID digest.Digest) error {
	link, err := c.record(blob)
	if err != nil {
		return err
	}
	file, err := c.path(diffID)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(file); err != nil {
		return notFound(diffID, err)
	}
	target := filepath.Join("..", "..", "sha256", diffID.Encoded())
	if old, err := os.Readlink(link); err == nil && old == target {
		return nil
	}
	dir := filepath.Dir(link)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("record of blob %s: %w", blob, err)
	}
	if blob.Algorithm() != digest.SHA256 { // whose folder Open has made
		c.syncing(filepath.Dir(dir))
		if err := syncDir(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	tmp := filepath.Join(c.tmpDir(), "record-"+strconv.FormatUint(recordSerial.Add(1), 10))
	if err := os.Symlink(target, tmp); err != nil {
		return fmt.Errorf("record of blob %s: %w", blob, err)
	}
	if err := os.Rename(tmp, link); err != nil {
		return errors.Join(fmt.Errorf("record of blob %s: %w", blob, err), os.Remove(tmp))
	}
	c.syncing(dir)
	return syncDir(dir)
}

// Lookup returns the DiffID that a blob was recorded with. errdefs.ErrNotFound:
// there is no record, or its layer file is gone.
func (c *Cache) Lookup(blob digest.Digest) (digest.Digest, error) {
	link, err := c.record(blob)
	if err != nil {
		return "", err
	}
	target, err := os.Readlink(link)
	if err != nil {
		return "", notFound(blob, err)
	}
	diffID := digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(target))
	file, err := c.path(diffID)
	if err != nil {
		return "", fmt.Errorf("record of blob %s: %w: %w", blob, err, errdefs.ErrNotFound)
	}
	if _, err := os.Lstat(file); err != nil {
		return "", notFound(diffID, err)
	}
	return diffID, nil
}

// Sweep removes layer files that nothing links or pins, and the records of blobs
// whose layer is gone. A layer that a snapshot has had and that no pull wants goes
// at once; another one once it was neither linked, unlinked nor written for olderThan.
func (c *Cache) Sweep(ctx context.Context, olderThan time.Duration) error {
	names, err := readNames(c.layerDir())
	if err != nil {
		return fmt.Errorf("sweep layers: %w", err)
	}
	var failed []error
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := c.sweepOne(digest.NewDigestFromEncoded(digest.SHA256, name), olderThan); err != nil {
			failed = append(failed, fmt.Errorf("sweep layers: %w", err))
		}
	}
	return errors.Join(append(failed, c.sweepRecords(ctx))...)
}

func (c *Cache) sweepOne(diffID digest.Digest, olderThan time.Duration) error {
	path, err := c.path(diffID)
	if err != nil {
		return nil //nolint:nilerr // not a layer file: not ours to remove
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	// Without a name the blocks go with this handle: not while pulls wait for the lock.
	defer f.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	// The inode changes with each link made or removed: ctime is the last use.
	idle := time.Since(time.Unix(st.Ctim.Unix()))
	wanted, ok := c.wanted[diffID]
	used := st.Mode&0o777 == usedMode && (!ok || time.Since(wanted) >= olderThan)
	if st.Nlink > 1 || c.pins[diffID] > 0 || (!used && idle < olderThan) {
		return nil
	}
	c.tables.drop(diffID)
	delete(c.wanted, diffID)
	return os.Remove(path)
}

func (c *Cache) sweepRecords(ctx context.Context) error {
	algorithms, err := readNames(filepath.Join(c.root, "blobs"))
	if err != nil {
		return fmt.Errorf("sweep records: %w", err)
	}
	var failed []error
	for _, a := range algorithms {
		dir := c.blobDir(digest.Algorithm(a))
		names, err := readNames(dir)
		if err != nil {
			failed = append(failed, fmt.Errorf("sweep records: %w", err))
		}
		for _, name := range names {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := c.sweepRecord(filepath.Join(dir, name)); err != nil {
				failed = append(failed, fmt.Errorf("sweep records: %w", err))
			}
		}
	}
	return errors.Join(failed...)
}

// sweepRecord removes a symlink that leads nowhere.
func (c *Cache) sweepRecord(link string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := os.Stat(link); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := os.Remove(link)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}
