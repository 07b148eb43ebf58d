package snapshotter

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Empty ext4 file systems, made by mkfs.ext4 once for each size and then
// written from memory: of 10 GiB only some 20 blocks are not zero. ext4 and not
// XFS, because any number of copies may be mounted at once (XFS refuses a UUID
// it knows), 16 MiB are enough for one (XFS: 300 MiB) and every kernel with
// overlayfs has it.

// ext4Features are named one by one, so that the host's mke2fs.conf has no say:
// a journal, because a power failure must leave what can be mounted without
// e2fsck; checksums with a seed of their own, so that the UUID may change;
// no second superblock and no room to grow, which would only be written.
const ext4Features = "none,has_journal,extent,huge_file,flex_bg,metadata_csum,metadata_csum_seed,64bit," +
	"dir_nlink,extra_isize,dir_index,filetype,sparse_super2,large_file,ext_attr"

// Offsets in ext4's superblock, see fs/ext4/ext4.h, and in it.
const (
	ext4Block      = 4096
	ext4Super      = 1024 // where the superblock begins
	ext4SuperSize  = 1024
	ext4InodeCount = 0x00
	ext4FreeInodes = 0x10
	ext4MagicAt    = 0x38
	ext4State      = 0x3a
	ext4UUID       = 0x68
	ext4HashSeed   = 0xec
	ext4Checksum   = 0x3fc
	ext4IDSize     = 16

	ext4Magic    = 0xef53
	ext4HasError = 2 // in the state
)

// keptTemplates bounds the sizes that are kept in memory, 70 KB each for 10
// GiB and 2.6 MB for a TiB.
const keptTemplates = 8

// extent is a run of bytes of a file, the first at off.
type extent struct {
	off  int64
	data []byte
}

// template is an empty file system of size bytes.
type template struct {
	size    int64
	extents []extent
}

// templates makes and keeps them.
type templates struct {
	mkfs string // the program

	mu   sync.Mutex
	kept []*template // used last, last
}

// mkfsPlaces are where mkfs.ext4 is looked for: in PATH, which may lack the
// folders where distributions put it, and there.
var mkfsPlaces = []string{"mkfs.ext4", "/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"}

// newTemplates looks for mkfs.ext4 in places.
func newTemplates(places []string) (*templates, error) {
	for _, name := range places {
		if path, err := exec.LookPath(name); err == nil {
			return &templates{mkfs: path}, nil
		}
	}
	return nil, errors.New("mkfs.ext4 is not installed (package e2fsprogs)")
}

// get returns the template for size, which is a multiple of ext4Block.
func (t *templates) get(ctx context.Context, size int64) (*template, error) {
	k := t.find(size)
	if k == nil {
		var err error
		if k, err = t.make(ctx, size); err != nil {
			return nil, fmt.Errorf("make an ext4 file system of %d bytes: %w", size, err)
		}
	}
	t.keep(k)
	return k, nil
}

// find returns the template that is kept for size, or nil.
func (t *templates) find(size int64) *template {
	t.mu.Lock()
	defer t.mu.Unlock()
	if i := slices.IndexFunc(t.kept, func(k *template) bool { return k.size == size }); i >= 0 {
		return t.kept[i]
	}
	return nil
}

// keep makes k the one that was used last.
func (t *templates) keep(k *template) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kept = append(slices.DeleteFunc(t.kept, func(o *template) bool { return o.size == k.size }), k)
	if len(t.kept) > keptTemplates {
		t.kept = t.kept[1:]
	}
}

// make runs mkfs.ext4 on a sparse file in memory, which goes with its last
// handle, and reads what it wrote.
func (t *templates) make(ctx context.Context, size int64) (_ *template, err error) {
	fd, err := unix.MemfdCreate("gantry-mkfs", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "gantry-mkfs")
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, t.mkfs, "-q", "-F", "-b", strconv.Itoa(ext4Block), "-I", "256", "-i", "16384", "-m", "0",
		"-J", fmt.Sprintf("size=%d", journalMiB(size)), "-O", ext4Features,
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,num_backup_sb=0,root_owner=0:0", "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Env = append(os.Environ(), "MKE2FS_CONFIG=/dev/null")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", t.mkfs, err, strings.TrimSpace(string(out)))
	}
	extents, err := readExtents(f, size)
	if err != nil {
		return nil, err
	}
	if len(extents) == 0 || extents[0].off != 0 || !isSuperblock(extents[0].data[ext4Super:]) {
		return nil, fmt.Errorf("%s made no superblock", t.mkfs)
	}
	return &template{size: size, extents: extents}, nil
}

// journalMiB is ext4's least, 4, up to 16: what a container writes passes
// through it, so sooner or later it takes that much of the disk.
func journalMiB(size int64) int64 { return min(max(size>>26, 4), 16) }

// readExtents returns the blocks of a sparse file that are not zero.
func readExtents(f *os.File, size int64) ([]extent, error) {
	var all []extent
	block := make([]byte, ext4Block)
	for off := int64(0); ; {
		from, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return all, nil // no data behind off
		} else if err != nil {
			return nil, fmt.Errorf("%s: look for data: %w", f.Name(), err)
		}
		to, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("%s: look for holes: %w", f.Name(), err)
		}
		for off = from / ext4Block * ext4Block; off < min(to, size); off += ext4Block {
			if _, err := f.ReadAt(block, off); err != nil {
				return nil, err
			}
			if allZero(block) {
				continue
			}
			if n := len(all); n > 0 && all[n-1].off+int64(len(all[n-1].data)) == off {
				all[n-1].data = append(all[n-1].data, block...)
			} else {
				all = append(all, extent{off: off, data: append([]byte(nil), block...)})
			}
		}
		if off >= size {
			return all, nil
		}
	}
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// write makes w, an empty file, the file system, with a UUID of its own: udev
// and overlayfs tell file systems apart by it.
func (t *template) write(f *os.File) error {
	if err := f.Truncate(t.size); err != nil {
		return err
	}
	first := append([]byte(nil), t.extents[0].data[:ext4Super+ext4SuperSize]...)
	super := first[ext4Super:]
	_, _ = rand.Read(super[ext4UUID : ext4UUID+ext4IDSize]) // never fails
	// Version 4, the random one (RFC 9562).
	super[ext4UUID+6] = super[ext4UUID+6]&0x0f | 0x40
	super[ext4UUID+8] = super[ext4UUID+8]&0x3f | 0x80
	_, _ = rand.Read(super[ext4HashSeed : ext4HashSeed+ext4IDSize])
	binary.LittleEndian.PutUint32(super[ext4Checksum:], ext4Sum(super[:ext4Checksum]))
	for _, e := range t.extents {
		if _, err := f.WriteAt(e.data, e.off); err != nil {
			return err
		}
	}
	_, err := f.WriteAt(first, 0)
	return err
}

// ext4Sum is ext4's CRC-32C, which is not inverted at the end.
func ext4Sum(b []byte) uint32 { return ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

func isSuperblock(b []byte) bool {
	return len(b) >= ext4MagicAt+2 && binary.LittleEndian.Uint16(b[ext4MagicAt:]) == ext4Magic
}

// superblockProblem says what is wrong with a superblock, "" for nothing.
func superblockProblem(super []byte) string {
	switch {
	case ext4Sum(super[:ext4Checksum]) != binary.LittleEndian.Uint32(super[ext4Checksum:]):
		return "its superblock is damaged: the checksum differs"
	case binary.LittleEndian.Uint16(super[ext4State:])&ext4HasError != 0:
		return "the kernel has met errors in its file system"
	}
	return ""
}

// readSuperblock returns nil for a file without one.
func readSuperblock(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, ext4SuperSize)
	if _, err := f.ReadAt(b, ext4Super); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if !isSuperblock(b) {
		return nil, nil
	}
	return b, nil
}
