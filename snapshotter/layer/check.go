package layer

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Files lists the layer files that have a name, by digest, and the names in their folder that are none.
func (c *Cache) Files() (files []digest.Digest, strays []string, err error) {
	names, err := readNames(c.layerDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // it is made with the first layer, where Open may make nothing
		return nil, nil, err
	}
	slices.Sort(names)
	for _, name := range names {
		d := digest.NewDigestFromEncoded(digest.SHA256, name)
		if _, err := c.path(d); err != nil {
			strays = append(strays, filepath.Join(c.layerDir(), name))
			continue
		}
		files = append(files, d)
	}
	return files, strays, nil
}

// Path names the file that a layer has, or would have.
func (c *Cache) Path(diffID digest.Digest) (string, error) { return c.path(diffID) }

// Drop takes the name of a layer file away, so that the next Write of the layer makes another file. Snapshots that link
// it keep it. One that is gone is fine.
func (c *Cache) Drop(diffID digest.Digest) error {
	path, err := c.path(diffID)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tables.drop(diffID)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Blobs returns the blobs that were recorded as this layer.
func (c *Cache) Blobs(diffID digest.Digest) ([]digest.Digest, error) {
	if _, err := c.path(diffID); err != nil {
		return nil, err
	}
	algorithms, err := readNames(filepath.Join(c.root, "blobs"))
	if err != nil {
		return nil, err
	}
	var found []digest.Digest
	for _, a := range algorithms {
		names, err := readNames(c.blobDir(digest.Algorithm(a)))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			blob := digest.NewDigestFromEncoded(digest.Algorithm(a), name)
			target, err := os.Readlink(filepath.Join(c.blobDir(digest.Algorithm(a)), name))
			if err == nil && filepath.Base(target) == diffID.Encoded() && blob.Validate() == nil {
				found = append(found, blob)
			}
		}
	}
	slices.Sort(found)
	return found, nil
}

// Give makes the file at path, which the caller has verified, the layer's file if it has none: a hard link, durable.
func (c *Cache) Give(diffID digest.Digest, path string) error {
	to, err := c.path(diffID)
	if err != nil {
		return err
	}
	if err := os.Link(path, to); err != nil && !errors.Is(err, fs.ErrExist) {
		return errors.Join(err, errdefs.ErrUnavailable)
	}
	c.syncing(c.layerDir())
	return syncDir(c.layerDir())
}
