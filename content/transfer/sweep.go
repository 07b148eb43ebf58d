package transfer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
	return errors.Join(append(errs, m.sweepLocks(), m.apart.sweep())...)
}

// idleForRoom is how long a transfer must not have been written that makes room for another: the layers of a pull under way
// are not each other's room.
const idleForRoom = time.Minute

// MakeRoom removes, of the transfers that nobody uses, the one that was not written for longest: the disk is full, and what is
// wanted now comes before a retry that may never be. It says whether there was one.
func (m *Manager) MakeRoom() bool { return m.makeRoom(m.shared.rooms.Load()) }

// makeRoom is MakeRoom, unless somebody else made room since m.shared.rooms was rooms.
func (m *Manager) makeRoom(rooms int64) bool {
	m.room.Lock()
	defer m.room.Unlock()
	if m.shared.rooms.Load() != rooms {
		return true
	}
	entries, err := os.ReadDir(m.root)
	if err != nil {
		return false
	}
	written := map[string]time.Time{}
	var names []string
	for _, e := range entries {
		st, err := os.Lstat(filepath.Join(m.root, e.Name(), dataName))
		if folderDigest(e.Name()) != "" && err == nil {
			written[e.Name()] = st.ModTime()
			names = append(names, e.Name())
		}
	}
	slices.SortFunc(names, func(a, b string) int { return written[a].Compare(written[b]) })
	for _, n := range names {
		if removed, err := m.remove(n, idleForRoom); err == nil && removed {
			log.L.WithField("digest", "sha256:"+folderDigest(n)).Warn("the disk is full: removed a transfer that nobody came back for")
			m.shared.rooms.Add(1)
			return true
		}
	}
	return false
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

// Served notes that what the blob was fetched for has all of it: ForgetServed may remove the transfer from now on.
func (m *Manager) Served(d digest.Digest) error {
	names, err := m.folders(d)
	for _, n := range names {
		f, cerr := os.OpenFile(filepath.Join(m.root, n, servedName), os.O_CREATE|os.O_WRONLY, 0o600)
		if cerr == nil {
			cerr = f.Close()
		}
		if notMissing(cerr) != nil { // a folder that is missing was removed meanwhile
			err = errors.Join(err, fmt.Errorf("transfer %s: %w", n, cerr))
		}
	}
	return err
}

// ForgetServed is Forget for transfers that have served their purpose. The others are kept for a retry: the deletion of
// a blob may be no more than containerd's answer to a pull that failed for another layer.
func (m *Manager) ForgetServed(d digest.Digest) error {
	return m.forget(d, func(name string) bool {
		_, err := os.Lstat(filepath.Join(m.root, name, servedName))
		return err == nil
	})
}

// Forget removes what is left of a blob's transfers after the blob was deleted: at once, or when the last handle here is
// closed; unless another process uses them, they are not complete and somebody waits, or the data has a link elsewhere.
func (m *Manager) Forget(d digest.Digest) error {
	return m.forget(d, func(string) bool { return true })
}

// folders lists the names of a blob's folders.
func (m *Manager) folders(d digest.Digest) ([]string, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("transfers of %q: %w: %w", d, errdefs.ErrInvalidArgument, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return nil, nil
	}
	entries, err := os.ReadDir(m.root)
	if err != nil {
		return nil, fmt.Errorf("transfers of %s: %w", d, err)
	}
	var names []string
	for _, e := range entries {
		if folderDigest(e.Name()) == d.Encoded() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// unwanted has those who still hold the blob remove it when they are done.
func (m *Manager) unwanted(d digest.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, j := range m.jobs {
		if j.blob.Digest == d && j.ended {
			j.unwanted = true
		}
	}
}

func (m *Manager) forget(d digest.Digest, which func(name string) bool) error {
	names, err := m.folders(d)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if !which(n) {
			continue
		}
		m.unwanted(d)
		if _, err := m.remove(n, 0); err != nil {
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
