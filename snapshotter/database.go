package snapshotter

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// metadata.db is the only file of a root that nothing else can be made from: containerd goes on naming the snapshots in
// it. So a checked copy is kept beside it, a moment behind, which `gantry check --repair` goes back to.
const (
	databaseName = "metadata.db"
	savedName    = "metadata.db.saved"
	// lostFolder takes what a restored database does not know. Nothing in it is ever removed by gantry.
	lostFolder = "lost"
	// saveEvery bounds how often the copy is written.
	saveEvery = 10 * time.Second
)

func (l layout) database() string { return filepath.Join(l.root, databaseName) }
func (l layout) saved() string    { return filepath.Join(l.root, savedName) }

// saver writes the copy after changes.
type saver struct {
	changed chan struct{} // room for one
	cancel  context.CancelFunc
	done    chan struct{}
}

func (s *Snapshotter) startSaver(ctx context.Context) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.saver = &saver{changed: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{})}
	s.databaseChanged() // since the copy was written, if the last process was killed
	go func() {
		defer close(s.saver.done)
		for s.saver.wait(ctx) {
			if err := s.saveDatabase(ctx); err != nil {
				log.G(ctx).WithError(err).Error("snapshotter: no copy of metadata.db could be saved; run gantry check")
			}
		}
	}()
}

// wait waits for a change and for those that follow it; false if there is none to save when ctx ends.
func (v *saver) wait(ctx context.Context) bool {
	select {
	case <-v.changed:
	case <-ctx.Done():
		select {
		case <-v.changed: // one that came last
			return true
		default:
			return false
		}
	}
	select {
	case <-time.After(saveEvery):
	case <-ctx.Done():
	}
	return true
}

// databaseChanged never waits.
func (s *Snapshotter) databaseChanged() {
	if s.saver == nil {
		return
	}
	select {
	case s.saver.changed <- struct{}{}:
	default:
	}
}

// stop saves what has changed last.
func (v *saver) stop() {
	if v != nil {
		v.cancel()
		<-v.done
	}
}

// saveDatabase replaces the copy by one of the database as it is now, if that is sound.
func (s *Snapshotter) saveDatabase(ctx context.Context) (err error) {
	tmp := s.saved() + ".tmp"
	defer func() { err = errors.Join(err, removeFile(tmp)) }()
	err = writeFile(tmp, true, func(w io.Writer) error { return s.copyDatabase(ctx, w) })
	if err != nil {
		return err
	}
	if err := verifyDatabase(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.saved()); err != nil {
		return err
	}
	return syncDir(s.root)
}

// copyDatabase writes the database as one transaction sees it. Writers go on meanwhile.
func (s *Snapshotter) copyDatabase(ctx context.Context, to io.Writer) error {
	_, tx, err := s.ms.TransactionContext(context.WithoutCancel(ctx), false)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	source, ok := tx.(*bolt.Tx)
	if !ok {
		return fmt.Errorf("the database is a %T: %w", tx, errdefs.ErrNotImplemented)
	}
	_, err = source.WriteTo(to)
	return err
}

// CheckDatabase verifies a copy of the open database: pages that are written meanwhile would look wrong. The copy, some 10
// KiB for each snapshot, is in a file without a name, or in memory where the disk is full or read-only.
func (s *Snapshotter) CheckDatabase(ctx context.Context) error {
	fd, err := unix.Open(s.root, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		if err = s.checkCopy(ctx, fd); err == nil || errdefs.IsDataLoss(err) {
			return err
		}
		log.G(ctx).WithError(err).Debug("snapshotter: the database is checked in memory")
	}
	if fd, err = unix.MemfdCreate(savedName, unix.MFD_CLOEXEC); err != nil {
		return fmt.Errorf("memory for a copy of %s: %w", s.database(), err)
	}
	return s.checkCopy(ctx, fd)
}

// checkCopy verifies a copy in the empty file fd, and closes that.
func (s *Snapshotter) checkCopy(ctx context.Context, fd int) (err error) {
	f := os.NewFile(uintptr(fd), s.database())
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := s.copyDatabase(ctx, f); err != nil {
		return err
	}
	return verifyDatabaseAt(fmt.Sprintf("/proc/self/fd/%d", fd), s.database())
}

// verifyDatabase reads all of a database that nobody writes. Whatever is wrong with it is errdefs.ErrDataLoss.
func verifyDatabase(path string) error { return verifyDatabaseAt(path, path) }

// verifyDatabaseAt opens the database at path and calls it name.
func verifyDatabaseAt(path, name string) (err error) {
	if err := verifySize(path); err != nil {
		return fmt.Errorf("%s %w", name, err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: databaseWait})
	if errors.Is(err, berrors.ErrTimeout) {
		return fmt.Errorf("%s: another gantryd has it open: %w", name, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrDataLoss)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	return db.View(func(tx *bolt.Tx) error {
		// Before Check, which makes the list of free pages and panics, where nobody can recover, if that fails.
		if err := readAll(tx); err != nil {
			return fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrDataLoss)
		}
		var first error
		n := 0
		for e := range tx.Check() {
			if n++; first == nil {
				first = e
			}
		}
		if first != nil {
			return fmt.Errorf("%s: %d inconsistencies, the first: %s: %w", name, n, first.Error(), errdefs.ErrDataLoss)
		}
		return nil
	})
}

// readAll reads every key and value. bbolt panics over a page that is none.
func readAll(tx *bolt.Tx) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("a page is damaged: %v", r)
		}
	}()
	var walk func(b *bolt.Bucket) error
	walk = func(b *bolt.Bucket) error {
		return b.ForEach(func(k, v []byte) error {
			if v != nil {
				return nil
			}
			inner := b.Bucket(k)
			if inner == nil {
				return fmt.Errorf("bucket %.100q is gone", k)
			}
			return walk(inner)
		})
	}
	return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return walk(b) })
}

// What bbolt's two meta pages begin with: a page header of 16 bytes, then magic, version, page size and flags of 4 bytes
// each, the root bucket of 16, and the numbers of the freelist's page, of the first page never used and of the
// transaction, 8 bytes each, and an FNV-1a sum of all from the magic on (go.etcd.io/bbolt/internal/common/meta.go).
const (
	metaOffset = 16
	metaSum    = 56
	metaSize   = 64
	metaMagic  = 0xED0CDAED
)

// verifySize refuses a file that is shorter than its pages: bbolt maps it, and reading past its end would end the process.
func verifySize(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	valid := false
	size := int64(os.Getpagesize())
	for at := int64(0); at < 2; at++ {
		var b [metaSize]byte
		if _, err := f.ReadAt(b[:], at*size+metaOffset); err != nil {
			if errors.Is(err, io.EOF) {
				break
			}
			return fmt.Errorf("cannot be read: %w: %w", err, errdefs.ErrDataLoss)
		}
		sum := fnv.New64a()
		_, _ = sum.Write(b[:metaSum])
		if binary.NativeEndian.Uint32(b[:]) != metaMagic || sum.Sum64() != binary.NativeEndian.Uint64(b[metaSum:]) {
			continue
		}
		valid = true
		pages, page := binary.NativeEndian.Uint64(b[40:]), uint64(binary.NativeEndian.Uint32(b[8:]))
		if page == 0 || pages > uint64(fi.Size())/page {
			return fmt.Errorf("has %d bytes, its pages take more: it was cut short: %w", fi.Size(), errdefs.ErrDataLoss)
		}
	}
	if !valid && fi.Size() > 0 { // an empty one is made anew
		return fmt.Errorf("is no database: %w", errdefs.ErrDataLoss)
	}
	return nil
}

// intact refuses a root with snapshots and no database: all of them would be taken for leftovers.
func intact(l layout) error {
	fi, err := os.Stat(l.database())
	if err == nil && fi.Size() > 0 {
		return nil
	}
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return err
	}
	if empty, err := isEmpty(l.snapshotsDir()); err != nil || empty {
		return err
	}
	return fmt.Errorf("%s is gone or empty, and %s is not: %w", l.database(), l.snapshotsDir(), errdefs.ErrDataLoss)
}

// VerifyDatabase checks the database of a root that no gantryd uses; one that does not exist is fine if there are no
// snapshots. errdefs.ErrDataLoss: it is broken.
func VerifyDatabase(root string) error {
	l := layout{root: root}
	if err := intact(l); err != nil || !exists(l.database()) {
		return err
	}
	return verifyDatabase(l.database())
}

// RestoreDatabase puts the copy in the place of a broken database. Folders of snapshots that the copy does not know, all
// of them if there is no good copy, are moved to lost/<time>/ and not removed: a container may be running on one. They go
// first, for a gantryd that starts on a database takes what it does not know for leftovers. No gantryd may use the root.
// saved is when the copy was written, zero if there was none.
func RestoreDatabase(ctx context.Context, root string) (saved time.Time, lost int, err error) {
	l := layout{root: root}
	lostDir := filepath.Join(root, lostFolder, time.Now().UTC().Format("20060102T150405.000Z"))
	if err := os.MkdirAll(lostDir, 0o700); err != nil {
		return saved, 0, err
	}
	known := map[string]held{}
	if fi, err := os.Stat(l.saved()); err == nil && verifyDatabase(l.saved()) == nil {
		if known, err = knownIn(ctx, l.saved()); err != nil {
			return saved, 0, err
		}
		saved = fi.ModTime()
	}
	if lost, err = l.setAside(lostDir, known); err != nil {
		return saved, lost, err
	}
	if err := os.Rename(l.database(), filepath.Join(lostDir, databaseName)); err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return saved, lost, err
	}
	if !saved.IsZero() {
		if err := copyFile(l.database(), l.saved()); err != nil {
			return saved, lost, err
		}
	}
	return saved, lost, syncDir(lostDir, root)
}

// setAside moves the folders of snapshots that are not known, durably.
func (l layout) setAside(to string, known map[string]held) (n int, err error) {
	entries, err := os.ReadDir(l.snapshotsDir())
	if errors.Is(err, iofs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if _, ok := known[e.Name()]; ok {
			continue
		}
		if err := os.Rename(l.dir(e.Name()), filepath.Join(to, e.Name())); err != nil {
			return n, err
		}
		n++
	}
	return n, syncDir(to, filepath.Dir(to), l.root, l.snapshotsDir())
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	return writeFile(to, true, func(w io.Writer) error {
		_, err := io.Copy(w, in)
		return err
	})
}

// knownIn reads a database, which the caller has verified, without a change to it.
func knownIn(ctx context.Context, path string) (_ map[string]held, err error) {
	s := &Snapshotter{}
	if s.ms, err = openStore(path, true); err != nil {
		return nil, err
	}
	all, err := s.loadHeld(ctx)
	return all, errors.Join(err, s.ms.Close())
}
