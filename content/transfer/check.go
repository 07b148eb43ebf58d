package transfer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/gofrs/flock"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Damage is what Check found of one transfer.
type Damage struct {
	Name   string // of the folder in the manager's root
	Path   string
	Digest digest.Digest
	Size   int64 // of the blob, in bytes; 0 if not known
	// Complete: the folder claims to hold all of the blob, and does not.
	Complete bool
	Problem  string
}

// Pieces reads what a transfer's folder holds; Check calls it without any lock. A finished blob is hashed by it: true if
// the file at path has the digest.
type Pieces interface {
	Verify(ctx context.Context, path string, d digest.Digest, size int64) (bool, error)
	// Read counts bytes that were read otherwise.
	Read(n int64)
}

// Check compares what lies in the root with what its state files say: header and records with their own checksums, each
// recorded block with its CRC, a finished blob with its digest. No lock is held meanwhile. Folders in which somebody works,
// here or in another process, or has worked meanwhile, are left out. linked says whether a finished file is verified elsewhere.
func (m *Manager) Check(ctx context.Context, p Pieces, linked func(fs.FileInfo) bool) ([]Damage, error) {
	entries, err := os.ReadDir(m.root)
	if notMissing(err) != nil {
		return nil, fmt.Errorf("transfers: %w", err)
	}
	var found []Damage
	for _, e := range entries {
		if ctx.Err() != nil {
			return found, context.Cause(ctx)
		}
		if folderDigest(e.Name()) == "" || !e.IsDir() {
			continue
		}
		before := m.look(e.Name())
		d, err := m.examine(ctx, e.Name(), p, linked)
		if err != nil {
			return found, err
		}
		if d == nil {
			continue
		}
		still, err := m.still(e.Name(), before)
		if err != nil {
			return found, err
		}
		if still {
			found = append(found, *d)
		}
	}
	return found, nil
}

// sight tells whether a folder was written between two looks.
type sight struct{ state, data fs.FileInfo }

func (m *Manager) look(name string) (s sight) {
	s.state, _ = os.Lstat(filepath.Join(folderPath(m.root, name), stateName)) // nil: not there
	s.data, _ = os.Lstat(filepath.Join(folderPath(m.root, name), dataName))
	return s
}

func same(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == b
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// still says whether a folder is as it was and nobody works in it: for a moment this has the lock that a holder would
// have. A finished file, which others may hold, is never written.
func (m *Manager) still(name string, before sight) (bool, error) {
	l, free, err := tryFree(m.root, name, false)
	if err == nil && !free {
		l, free, err = tryFree(m.root, name, true)
	}
	if !free || err != nil {
		return false, err
	}
	now := m.look(name)
	return same(before.state, now.state) && same(before.data, now.data), l.Close()
}

// tryFree is tryLock where nobody may be able to lock or to write: on a file system that is read-only everything is free,
// and the lock is none.
func tryFree(root, name string, shared bool) (l *flock.Flock, free bool, err error) {
	l, err = tryLock(root, name, shared)
	if errors.Is(err, unix.EROFS) {
		return flock.New(""), true, nil
	}
	return l, l != nil, err
}

// examine looks at one folder; nil if nothing is wrong or it is going.
func (m *Manager) examine(ctx context.Context, name string, p Pieces, linked func(fs.FileInfo) bool) (*Damage, error) {
	path := folderPath(m.root, name)
	d := &Damage{Name: name, Path: path, Digest: digest.NewDigestFromEncoded(digest.SHA256, folderDigest(name))}
	fi, err := os.Lstat(filepath.Join(path, dataName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // a folder that is being made or removed; without data nothing is claimed
	}
	if err != nil {
		return nil, err
	}
	log, bad, err := readRecords(filepath.Join(path, stateName))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errStateHeader):
		d.Problem = "its state file has no valid header, so nothing that was fetched counts"
		return d, nil
	case err != nil:
		return nil, err
	case log.blob().Digest != d.Digest:
		d.Problem = fmt.Sprintf("its state file is that of %s", log.blob().Digest)
		return d, nil
	}
	d.Size = log.size
	if log.complete {
		d.Complete = true
		if linked(fi) {
			return nil, nil //nolint:nilnil // verified as a blob
		}
		ok, err := p.Verify(ctx, filepath.Join(path, dataName), d.Digest, log.size)
		if errors.Is(err, fs.ErrNotExist) || err == nil && ok {
			return nil, nil //nolint:nilnil // as it should be, or gone
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		d.Problem = "it is finished, and its bytes do not match its digest"
		return d, nil
	}
	wrong, err := wrongBlocks(ctx, filepath.Join(path, dataName), log, p)
	if err != nil || wrong == 0 && bad == 0 {
		return nil, err
	}
	d.Problem = fmt.Sprintf("of %d recorded blocks %d do not match their checksums, and %d records are damaged", len(log.blocks), wrong, bad)
	return d, nil
}

// readRecords parses a state file and counts the records that are none.
func readRecords(path string) (log *stateLog, bad int, err error) {
	if log, err = peekState(path); err != nil {
		return nil, 0, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Seek(headerSize, 0); err != nil {
		return nil, 0, err
	}
	err = log.scan(f, func(b []byte) {
		if kind, _ := log.decode(b); kind == 0 {
			bad++
		}
	})
	return log, bad, err
}

// wrongBlocks counts the recorded blocks that the data does not hold.
func wrongBlocks(ctx context.Context, path string, log *stateLog, p Pieces) (wrong int, err error) {
	data, err := os.Open(path)
	if err != nil {
		return 0, notMissing(err)
	}
	defer func() {
		dropPages(data, 0, 0)
		err = errors.Join(err, data.Close())
	}()
	f := &folder{data: data, log: log}
	buf := make([]byte, blockSize)
	for _, r := range f.recorded() {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		ok, err := f.holds(r, buf)
		if err != nil {
			return 0, err
		}
		p.Read(int64(r.length))
		if !ok {
			wrong++
		}
	}
	return wrong, nil
}

// Repair has the state of a damaged partial transfer say only what is true, so that the next one fetches the rest; a
// folder of which nothing can be trusted is removed. False: somebody works in it.
func (m *Manager) Repair(d Damage) (done bool, err error) {
	l, err := tryLock(m.root, d.Name, false)
	if l == nil || err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	m.shared.forget(d.Path)
	if d.Complete || d.Size == 0 {
		return true, os.RemoveAll(d.Path)
	}
	f, err := openFolder(d.Path, Blob{Digest: d.Digest, Size: d.Size}, false)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.closeState(), f.data.Close()) }()
	if f.sealed {
		return true, nil
	}
	gone := make([]bool, (d.Size+blockSize-1)/blockSize)
	buf := make([]byte, blockSize)
	for _, r := range f.recorded() {
		ok, err := f.holds(r, buf)
		if err != nil {
			return false, err
		}
		gone[r.block] = !ok
	}
	return true, f.unrecord(gone)
}

// Distrust has the next Join of a blob read what is on disk again before it believes it: a file that was verified in this
// process may have rotted since. That Join waits for no handle of a finished transfer: what they read is the old file,
// whatever takes its place.
func (m *Manager) Distrust(d digest.Digest) error {
	names, err := m.folders(d)
	for _, name := range names {
		m.shared.forget(folderPath(m.root, name))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, j := range m.jobs {
		select {
		case <-j.done: // its waiters know, whether it is settled or not
			if j.blob.Digest == d {
				m.drop(j)
				err = errors.Join(err, j.letGo())
			}
		default:
		}
	}
	return err
}

// Leftovers lists folders and locks below the root that belong to no living process, and what the next Sweep should have
// removed long ago.
func (m *Manager) Leftovers() ([]string, error) {
	entries, err := os.ReadDir(m.root)
	if notMissing(err) != nil {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		if folderDigest(e.Name()) == "" || !e.IsDir() {
			continue
		}
		fi, err := os.Lstat(filepath.Join(m.root, e.Name(), stateName))
		if err != nil || time.Since(fi.ModTime()) < 2*m.opts.KeepPartial {
			continue
		}
		data, err := os.Lstat(filepath.Join(m.root, e.Name(), dataName))
		if err == nil && links(data) == 1 {
			found = append(found, filepath.Join(m.root, e.Name()))
		}
	}
	apart, err := os.ReadDir(filepath.Join(m.root, discardRoot))
	if notMissing(err) != nil {
		return nil, err
	}
	for _, e := range apart {
		l, free, err := tryFree(m.root, discardLock+e.Name(), true)
		if err != nil {
			return nil, err
		}
		if !free {
			continue
		}
		found = append(found, filepath.Join(m.root, discardRoot, e.Name()))
		if err := l.Close(); err != nil {
			return nil, err
		}
	}
	return found, nil
}
