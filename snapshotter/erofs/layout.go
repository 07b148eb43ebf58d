package erofs

import (
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// layout is where everything goes: superblock and device table, inodes with
// what follows them, the data area, the trailer. The device is mapped behind.
type layout struct {
	*tree
	mapper
	dataStart uint32 // first block of the data area
	blocks    uint32 // of the image without the trailer
	mapped    uint32 // where the device's first block appears
	derived   int64  // bytes of chunk tables and copied data
}

// maxDerived is how many bytes of chunk tables and copied data an image may have
// beyond the size of its layer. A sparse map of 1 MiB, strewn over 16 TiB, would
// take 13 GB. An image of a disk with its data in 100 GB takes 200 MB at most.
const maxDerived = 256 << 20

// arrange places inodes and data. The whole address space, device included,
// has 2^32-1 blocks.
func arrange(t *tree, layer Device) (*layout, error) {
	l := &layout{tree: t, mapper: mapper{layer: layer}}
	pos, data := int64(metaStart), int64(0)
	for i := range t.count {
		n := t.node(i)
		if n.isDir() {
			t.measureDir(n)
		}
		n.extended = !l.fitsCompact(n)
		tail, blocks, err := l.placeData(n)
		if err != nil {
			return nil, t.errorf(i, "%w", err)
		}
		if n.place == placeData || n.place == placeInline || n.place == placeChunks {
			n.block = uint32(data)
		}
		slot := l.placeInode(n, &pos, tail)
		data += blocks
		if slot > math.MaxUint32 || data > math.MaxUint32 {
			return nil, tooLarge(pos + data*BlockSize + layer.Size)
		}
		n.slot = uint32(slot)
	}
	dataStart := align(pos, BlockSize) / BlockSize
	mapped := dataStart + data + 1 // the trailer
	if end := mapped + layer.mappable()/BlockSize; end >= nullBlock {
		return nil, tooLarge(end * BlockSize)
	}
	l.dataStart, l.blocks, l.mapped = uint32(dataStart), uint32(dataStart+data), uint32(mapped)
	return l, nil
}

func tooLarge(size int64) error {
	return fmt.Errorf("erofs: layer and index take %d bytes together, an image can address %d: %w",
		size, int64(nullBlock)*BlockSize, errdefs.ErrOutOfRange)
}

// fitsCompact says whether the short form of an inode loses nothing.
func (t *tree) fitsCompact(n *node) bool {
	in := n.in
	return in.Mtime == t.epoch.sec && in.MtimeNsec == t.epoch.nsec &&
		in.UID <= math.MaxUint16 && in.GID <= math.MaxUint16 &&
		n.nlink <= math.MaxUint16 && n.size <= math.MaxUint32
}

func (n *node) inodeSize() int64 {
	if n.extended {
		return extendedSize
	}
	return compactSize
}

// placeInode advances pos past the inode and what follows it, and returns the
// inode's nid. An inode, and a tail with it, stays within one block.
func (l *layout) placeInode(n *node, pos *int64, tail int64) (nid int64) {
	body := n.inodeSize() + int64(n.xattrs)
	together := n.inodeSize()
	if n.place == placeInline {
		together = body + tail
	}
	at := align(*pos, nidSize)
	if at%BlockSize+together > BlockSize {
		at = align(at, BlockSize)
	}
	*pos = at + body + tail
	if n.place == placeChunks {
		*pos = align(at+body, chunkIndexSize) + tail
	}
	return (at - metaBlock*BlockSize) / nidSize
}

// placeData decides where an inode's data lies: tail bytes behind the inode,
// blocks in the data area.
func (l *layout) placeData(n *node) (tail, blocks int64, err error) {
	switch n.in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return l.placeFile(n)
	case unix.S_IFDIR, unix.S_IFLNK:
		blocks = int64(align(n.size, BlockSize)) / BlockSize
		tail = int64(n.size) - (blocks-1)*BlockSize
		if n.inodeSize()+int64(n.xattrs)+tail <= BlockSize && (blocks == 1 || n.isDir()) {
			n.place = placeInline
			return tail, blocks - 1, nil
		}
		n.place = placeData
		return 0, blocks, nil
	}
	return 0, 0, nil
}

func (l *layout) placeFile(n *node) (tail, blocks int64, err error) {
	size := n.in.Size
	rs, err := l.find(n.in)
	if err != nil || size == 0 {
		return 0, 0, err
	}
	if len(rs) == 1 && rs[0].whole(size) {
		n.place, n.block = placeDevice, uint32(rs[0].dev/BlockSize)
		return 0, 0, nil
	}
	n.place = placeChunks
	var copied int64
	n.chunkBits, copied = chooseChunks(rs, size)
	if copied > 0 && l.layer.ReaderAt == nil {
		return 0, 0, fmt.Errorf("data has to be copied from the layer, which cannot be read: %w", errdefs.ErrInvalidArgument)
	}
	tail = chunkIndexSize * chunkCount(size, n.chunkBits)
	if l.derived += tail + copied; l.derived > maxDerived+l.layer.Size {
		return 0, 0, fmt.Errorf("sparse files whose index takes more than %d bytes, in a layer of %d, write them with fewer holes: %w",
			maxDerived+l.layer.Size, l.layer.Size, errdefs.ErrOutOfRange)
	}
	return tail, copied / BlockSize, nil
}
