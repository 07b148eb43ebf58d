package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// BuildCached is [Build] for images that take long to make: they are kept in the cache, under a
// name that must change when the description does. Processes that want the same one at once wait for each other.
func BuildCached(ctx context.Context, name string, spec ImageSpec) (*Image, error) {
	cache, err := Cache()
	if err != nil {
		return nil, err
	}
	images := filepath.Join(cache, "bench")
	if err := os.MkdirAll(images, 0o700); err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(images, name))
	if err != nil {
		return nil, err
	}
	defer unlock()
	dir := filepath.Join(images, name)
	if im, err := loadImage(dir); !errors.Is(err, fs.ErrNotExist) {
		return im, err
	}
	fmt.Printf("making the image %s, once\n", name)
	building := dir + ".new"
	if err := os.RemoveAll(building); err != nil {
		return nil, err
	}
	im, err := Build(ctx, building, spec)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(building))
	}
	if err := im.save(); err != nil {
		return nil, err
	}
	im.dir = dir
	return im, os.Rename(building, dir)
}

// lock waits until no other process holds the lock of what is cached at path.
func lock(path string) (unlock func(), _ error) {
	f, err := os.Create(path + ".lock")
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// imageFile describes a built image beside its blobs.
const imageFile = "image.json"

func (im *Image) save() error {
	data, err := json.Marshal(im)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(im.dir, imageFile), data, 0o600)
}

func loadImage(dir string) (*Image, error) {
	data, err := os.ReadFile(filepath.Join(dir, imageFile))
	if err != nil {
		return nil, err
	}
	im := &Image{dir: dir}
	if err := json.Unmarshal(data, im); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, imageFile), err)
	}
	return im, nil
}
