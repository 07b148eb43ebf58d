package snapshotter

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// upperFileOptions: what is deleted goes back to the disk; the empty inode tables
// are holes already; an error that may have damaged the file system ends writing.
const upperFileOptions = "discard,noinit_itable,errors=remount-ro"

// openUpper sees to it that an active snapshot has an upper and work directory,
// mounted if they are in a file, and a view of nothing an empty directory to show.
// They are missing in Prepare, after a crash in it, and after a reboot. upper is
// made last.
func (s *Snapshotter) openUpper(ctx context.Context, snap storage.Snapshot, f form) error {
	if snap.Kind == snapshots.KindView && len(snap.ParentIDs) > 0 || exists(s.upper(snap.ID)) {
		return nil
	}
	unlock, err := s.locks.lock(ctx, snap.ID)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.lostUpper(snap.ID); err != nil {
		return err
	}
	switch {
	case !exists(s.dir(snap.ID)):
		return fmt.Errorf("snapshot was removed meanwhile: %w", errdefs.ErrNotFound)
	case s.hasUpperFile(snap.ID):
		err = s.remountUpper(ctx, snap.ID)
	case f.fileSize > 0:
		var settle func()
		if settle, err = s.newUpperFile(ctx, snap.ID, f.fileSize); err == nil {
			defer settle() // it holds up what is written meanwhile
		}
	}
	if err != nil || exists(s.upper(snap.ID)) {
		return err
	}
	if snap.Kind == snapshots.KindActive {
		if err := os.Mkdir(s.workdir(snap.ID), 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := s.makeUpper(snap.ID); err != nil {
		return err
	}
	return s.chownUpper(ctx, snap.ID, snap.ParentIDs, f.ids)
}

// newUpperFile makes and mounts one. The caller holds the lock of id, and calls
// settle when the file is ready for use.
func (s *Snapshotter) newUpperFile(ctx context.Context, id string, size int64) (settle func(), err error) {
	if err := s.uppers.make(ctx, s.upperFile(id), size); err != nil {
		return nil, err
	}
	return s.attachUpper(ctx, id, true)
}

// remountUpper mounts the upper file of an active snapshot if it is not mounted. The
// caller holds the lock of id. A file whose superblock never reached the disk
// has lost nothing that anybody synced: the first sync of anything in it
// writes the superblock too. It is made again; one that did is not.
func (s *Snapshotter) remountUpper(ctx context.Context, id string) error {
	if s.upperMounted(id) {
		return nil
	}
	if err := s.lostUpper(id); err != nil {
		return err
	}
	super, err := readSuperblock(s.upperFile(id))
	if err != nil {
		return err
	}
	if super == nil && s.uppers != nil {
		fi, err := os.Stat(s.upperFile(id))
		if err != nil {
			return err
		}
		log.G(ctx).WithField("snapshot", id).Warn("snapshotter: the upper file was lost with the power before anything in it was synced, making it again")
		size := wholeBlocks(fi.Size())
		if size < MinUpperSize || size > MaxUpperSize {
			size = s.uppers.size
		}
		settle, err := s.newUpperFile(ctx, id, size)
		if err == nil {
			settle()
		}
		return err
	}
	return s.mountUpper(ctx, id)
}

// openCommitted mounts the upper file of a committed snapshot, if it is one and
// is not mounted.
func (s *Snapshotter) openCommitted(ctx context.Context, id string) error {
	if exists(s.upper(id)) {
		return nil
	}
	unlock, err := s.locks.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	return s.mountCommitted(ctx, id)
}

// mountCommitted is openCommitted for a caller that holds the lock of id.
func (s *Snapshotter) mountCommitted(ctx context.Context, id string) error {
	if err := s.lostUpper(id); err != nil {
		return err
	}
	if !s.hasUpperFile(id) || s.upperMounted(id) {
		return nil
	}
	return s.mountUpper(ctx, id)
}

// mountUpper mounts an upper file. The caller holds the lock of id.
func (s *Snapshotter) mountUpper(ctx context.Context, id string) error {
	settle, err := s.attachUpper(ctx, id, false)
	if err == nil {
		settle()
	}
	return err
}

// attachUpper mounts an upper file. The caller holds the lock of id. A file that
// already has a loop device is mounted from that: two would each think that
// the file is theirs alone. That happens when only the mount point was taken
// away, and a container's own mount still holds the file. A fresh file has none,
// and is not looked for: that takes long where there are many.
func (s *Snapshotter) attachUpper(ctx context.Context, id string, fresh bool) (settle func(), err error) {
	file, target := s.upperFile(id), s.upperMount(id)
	if err := os.Mkdir(target, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if !fresh {
		used, err := openLoop(file)
		if err != nil {
			return nil, err
		}
		if used != nil {
			return func() {}, errors.Join(mountUpperLoop(used, file, target), used.Close())
		}
	}
	dev, err := mountUpperFile(ctx, file, target)
	if err != nil {
		return nil, err
	}
	return func() {
		// Without a worker New looks for what a crash has left.
		if s.work == nil || s.work.submit(func(ctx context.Context) { s.settleUpper(ctx, id, dev) }) != nil {
			_ = dev.Close() // the mount keeps it
		}
	}, nil
}

// mountUpperFile returns the loop device; the mount keeps it without the handle.
func mountUpperFile(ctx context.Context, file, target string) (*os.File, error) {
	dev, err := attachLoop(ctx, file, upperLoop)
	if err != nil {
		return nil, err
	}
	if err := mountUpperLoop(dev, file, target); err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return dev, nil
}

func mountUpperLoop(dev *os.File, file, target string) error {
	if err := unix.Mount(dev.Name(), target, "ext4", 0, upperFileOptions); err != nil {
		return fmt.Errorf("mount %s, which has %s, on %s: %w", dev.Name(), file, target, err)
	}
	return nil
}

// settleUpper does what need not hold up a Prepare: the file becomes durable, and
// from then on what a container writes is cached once, in its own file system,
// and not in the file's pages again. Where the disk's file system has no direct
// I/O it is cached twice. dev is its loop device, which is closed; nil if it has
// none.
func (s *Snapshotter) settleUpper(ctx context.Context, id string, dev *os.File) {
	err := s.syncUpperFile(id)
	if dev != nil {
		if e := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_DIRECT_IO, 1); e != nil {
			log.G(ctx).WithError(e).WithField("snapshot", id).Debug("snapshotter: no direct I/O on the upper file")
		}
		err = errors.Join(err, dev.Close())
	}
	if err != nil && s.hasUpperFile(id) { // else it was removed meanwhile
		log.G(ctx).WithError(err).WithField("snapshot", id).Warn("snapshotter: upper file is not synced")
	}
}

// syncUpperFile makes an upper file durable and notes that it is. Whoever drops
// the file meanwhile takes the note away after it.
func (s *Snapshotter) syncUpperFile(id string) error {
	if err := syncDir(s.upperFile(id)); err != nil {
		return err
	}
	if super, err := readSuperblock(s.upperFile(id)); super == nil {
		return err // lost with the power, and made again when it is asked for
	}
	if err := writeFile(s.upperSynced(id), false, func(io.Writer) error { return nil }); err != nil {
		return err
	}
	if !s.hasUpperFile(id) {
		return removeFile(s.upperSynced(id))
	}
	return syncDir(s.dir(id), s.snapshotsDir())
}

// lostUpper returns an error if the upper file of a snapshot reached the disk
// and is not there any more.
func (l layout) lostUpper(id string) error {
	if !exists(l.upperSynced(id)) {
		return nil
	}
	super, err := readSuperblock(l.upperFile(id))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is gone, and what was written there: %w", l.upperFile(id), errdefs.ErrDataLoss)
	case err == nil && super == nil:
		return fmt.Errorf("%s holds no file system any more: %w", l.upperFile(id), errdefs.ErrDataLoss)
	}
	return err
}

// syncUpper makes what was committed durable, after Commit.
func (s *Snapshotter) syncUpper(ctx context.Context, id string) {
	err := syncFileSystem(s.upper(id))
	if errors.Is(err, fs.ErrNotExist) {
		return // removed meanwhile, or not mounted: then it was
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("snapshot", id).Warn("snapshotter: committed upper file is not synced")
	}
}

// dropUpperFile unmounts and deletes an upper file, if there is one. The caller
// holds the lock of id. A mount elsewhere (a container's own, or its copy in
// another mount namespace) keeps the deleted file on the disk: what is in it
// is deleted too, as in a directory.
func (s *Snapshotter) dropUpperFile(ctx context.Context, id string) error {
	target, file := s.upperMount(id), s.upperFile(id)
	if !exists(target) && !exists(file) {
		return nil
	}
	// There may be many devices to look through.
	device, known := "", s.upperMounted(id)
	if known {
		device, _ = deviceOf(target)
	}
	if err := unmountAll(target); err != nil {
		return err
	}
	var dev *os.File
	if known {
		dev = openLoopOf(device, file)
	} else {
		dev, _ = openLoop(file)
	}
	if dev != nil {
		if err := errors.Join(clearElsewhere(dev, file, target), dev.Close()); err != nil {
			log.G(ctx).WithError(err).WithField("snapshot", id).Debug("snapshotter: upper file of a removed snapshot is still in use")
		}
	}
	return errors.Join(removeFile(target), removeFile(s.upperSynced(id)), removeFile(file), removeFile(s.upperSynced(id)))
}

func clearElsewhere(dev *os.File, file, target string) error {
	if err := mountUpperLoop(dev, file, target); err != nil {
		return err
	}
	return errors.Join(clearDir(filepath.Join(target, "upper")), unmountAll(target))
}

// upperFileUsage counts the blocks that the file takes on the disk. Those that
// its file system has handed out but not written yet count already; those that
// it has freed count until they are punched out, seconds later. The inodes are
// those in the upper directory.
func (l layout) upperFileUsage(ctx context.Context, id string) (snapshots.Usage, error) {
	fi, err := os.Stat(l.upperFile(id))
	if err != nil {
		return snapshots.Usage{}, err
	}
	var usage snapshots.Usage
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		usage.Size = st.Blocks * 512
	}
	const own = 11 // ten reserved ones and lost+found
	if !l.upperMounted(id) {
		super, err := readSuperblock(l.upperFile(id))
		if super == nil {
			return usage, err
		}
		count := binary.LittleEndian.Uint32
		usage.Inodes = max(1, int64(count(super[ext4InodeCount:]))-int64(count(super[ext4FreeInodes:]))-own-1)
		return usage, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(l.upperMount(id), &st); err != nil {
		return usage, err
	}
	work, err := diskUsage(ctx, l.workdir(id))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return usage, err
	}
	usage.Size = max(usage.Size, int64(st.Blocks-st.Bfree)*st.Bsize)
	usage.Inodes = max(1, int64(st.Files-st.Ffree)-own-work.Inodes)
	return usage, nil
}
