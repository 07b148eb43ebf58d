package transfer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
)

// Sweep removes transfers, partial or finished, that were not written for Options.KeepPartial, that nobody uses and
// whose data nobody links; and lock files that guard nothing.
func (m *Manager) Sweep(ctx context.Context) error {
	entries, err := os.ReadDir(m.root)
	if err != nil {
		return fmt.Errorf("sweep transfers: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if folderDigest(e.Name()) == "" || !e.IsDir() {
			continue
		}
		removed, err := m.remove(e.Name(), m.opts.KeepPartial)
		if err != nil {
			errs = append(errs, fmt.Errorf("sweep %s: %w", e.Name(), err))
		}
		if removed {
			log.G(ctx).WithField("digest", "sha256:"+folderDigest(e.Name())).Debug("swept an old transfer")
		}
	}
	return errors.Join(append(errs, m.sweepLocks())...)
}

func (m *Manager) sweepLocks() error {
	entries, err := os.ReadDir(filepath.Join(m.root, locksName))
	if err != nil {
		return fmt.Errorf("sweep locks: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if _, err := os.Lstat(folderPath(m.root, e.Name())); folderDigest(e.Name()) == "" || err == nil {
			continue
		}
		if _, err := m.remove(e.Name(), 0); err != nil {
			errs = append(errs, fmt.Errorf("sweep lock %s: %w", e.Name(), err))
		}
	}
	return errors.Join(errs...)
}

// Forget removes what is left of a blob's transfers after the blob was deleted, unless they are in use, here or by another
// process, or the data has a link elsewhere.
func (m *Manager) Forget(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("forget %q: %w: %w", d, errdefs.ErrInvalidArgument, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return nil
	}
	names, err := filepath.Glob(filepath.Join(m.root, "sha256-"+d.Encoded()+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if _, err := m.remove(filepath.Base(n), 0); err != nil {
			errs = append(errs, fmt.Errorf("forget %s: %w", d, err))
		}
	}
	return errors.Join(errs...)
}

// remove deletes a folder and its lock file if nobody uses it, nobody links its data and it was not written for age.
func (m *Manager) remove(name string, age time.Duration) (removed bool, err error) {
	l, err := tryLock(m.root, name, false)
	if l == nil || err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	path := folderPath(m.root, name)
	for _, n := range []string{dataName, stateName} {
		st, err := os.Lstat(filepath.Join(path, n))
		if notMissing(err) != nil {
			return false, err
		}
		if err == nil && (links(st) > 1 || age > 0 && time.Since(st.ModTime()) < age) {
			return false, nil
		}
	}
	m.shared.forget(path)
	if err := os.RemoveAll(path); err != nil {
		return false, err
	}
	// Whoever opened the lock file before sees after locking it that its name is gone.
	return true, notMissing(os.Remove(l.Path()))
}
