package plugin

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/gofrs/flock"

	"github.com/gantryd/gantry/plugin/config"
)

// lockName is the file in a folder that only one gantryd may use.
const lockName = "gantryd.lock"

// rootNames are what the parts make in root. They take what they find there for
// their own, and remove what they do not know.
var rootNames = []string{"empty", "layers", "metadata.db", "mnt", "probe", "snapshots"}

// place is what a daemon holds on disk while it runs.
type place struct {
	locks []*flock.Flock
}

// occupy makes the daemon's folders and takes them for this process alone.
// Transfers may be shared with others; root and the blobs may not.
func occupy(c *config.Config) (*place, error) {
	if err := unclaimed(c.Root); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		path string
		mode os.FileMode
	}{{c.Root, 0o700}, {c.State, 0o711}, {filepath.Dir(c.Address), 0o711}, {c.Content.Root, 0o700}, {c.Transfer.Root, 0o700}} {
		if err := os.MkdirAll(f.path, f.mode); err != nil {
			return nil, fmt.Errorf("make gantryd's folders: %w", err)
		}
	}
	for _, root := range []string{c.Root, c.Content.Root, c.Transfer.Root} {
		if err := durablyNamed(root); err != nil {
			return nil, fmt.Errorf("make gantryd's folders durable: %w", err)
		}
	}
	p := &place{}
	for _, folder := range slices.Compact([]string{c.Root, c.Content.Root}) {
		if err := p.lock(folder, os.O_CREATE); err != nil {
			return nil, errors.Join(err, p.release())
		}
	}
	if err := linkable(c); err != nil {
		return nil, errors.Join(err, p.release())
	}
	return p, nil
}

// hold takes the folders of a gantryd that does not run for this process alone, without a change to them: they may be
// read-only. errdefs.ErrNotFound: no gantryd ever had root.
func hold(c *config.Config) (*place, error) {
	p := &place{}
	err := p.lock(c.Root, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no gantryd has used root (%s) so far, so there is nothing to check; is it the right configuration? %w", c.Root, errdefs.ErrNotFound)
	}
	if err == nil && c.Content.Root != c.Root {
		if err = p.lock(c.Content.Root, 0); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		return nil, errors.Join(err, p.release())
	}
	return p, nil
}

// unclaimed refuses a root in which somebody else has put what gantryd would take
// for its own: "/" with its mnt, or the folder of another snapshotter. Every
// gantryd leaves its lock file behind, so one that is there tells its root.
func unclaimed(root string) error {
	if _, err := os.Lstat(filepath.Join(root, lockName)); err == nil {
		return nil
	}
	for _, name := range rootNames {
		found := filepath.Join(root, name)
		if _, err := os.Lstat(found); err == nil {
			return fmt.Errorf("root (%s) was not made by gantryd: %s is there already, and gantryd would remove what is in it; set root to a new folder: %w",
				root, found, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// lock opens the folder's lock file with flag beside os.O_RDONLY.
func (p *place) lock(folder string, flag int) error {
	l := flock.New(filepath.Join(folder, lockName), flock.SetFlag(flag|os.O_RDONLY), flock.SetPermissions(0o600))
	got, err := l.TryLock()
	if err != nil {
		return fmt.Errorf("lock %s: %w", folder, err)
	}
	if !got {
		return fmt.Errorf("%s is in use by another gantryd, or by gantry check; stop it, or set root (and content.root) to other folders: %w",
			folder, errdefs.ErrFailedPrecondition)
	}
	p.locks = append(p.locks, l)
	return nil
}

// release gives the folders up. A second call does nothing.
func (p *place) release() error {
	var errs []error
	for _, l := range slices.Backward(p.locks) {
		errs = append(errs, l.Unlock())
	}
	p.locks = nil
	return errors.Join(errs...)
}

// linkable checks that a finished transfer can become a blob by a hard link. The
// numbers of the file systems do not tell: a bind mount of the same one refuses
// links too.
func linkable(c *config.Config) (err error) {
	probe, err := os.CreateTemp(c.Transfer.Root, ".probe-")
	if err != nil {
		return fmt.Errorf("transfer.root: %w", err)
	}
	name := filepath.Join(c.Content.Root, filepath.Base(probe.Name()))
	defer func() { err = errors.Join(err, os.Remove(probe.Name())) }()
	if err := probe.Close(); err != nil {
		return fmt.Errorf("transfer.root: %w", err)
	}
	err = os.Link(probe.Name(), name)
	if errors.Is(err, syscall.EXDEV) {
		return fmt.Errorf("transfer.root (%s) and content.root (%s) are not on one file system; a finished transfer becomes a blob by a hard link, so put them on the same one: %w",
			c.Transfer.Root, c.Content.Root, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("content.root: %w", err)
	}
	return os.Remove(name)
}
