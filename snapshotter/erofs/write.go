package erofs

import (
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Write writes the image of the tree under root to w, from its first byte to
// its last; the same tree gives the same bytes, whatever the order of
// Children. Data is mapped from the layer where the kernel can read it in
// place, and otherwise read from the layer and written into the image.
//
// What a tree cannot say in the format (bad or double names, directories with
// two names, extents out of place) is an errdefs.ErrInvalidArgument; what is
// over a limit (xattrs, device numbers, files over 16 TiB, layer and index over
// 2 TiB together, sparse files whose index would dwarf the layer) an errdefs.ErrOutOfRange. Either names the
// file. Errors of w and of the layer are wrapped as they are.
func Write(w io.Writer, root *Inode, layer Device) error {
	if layer.Size < 0 {
		return fmt.Errorf("erofs: layer of %d bytes: %w", layer.Size, errdefs.ErrInvalidArgument)
	}
	t, err := flatten(root)
	if err != nil {
		return err
	}
	l, err := arrange(t, layer)
	if err != nil {
		return err
	}
	s := newSink(w)
	l.writeSuper(s, l.uuid())
	l.writeInodes(s)
	l.writeData(s)
	if want := int64(l.blocks) * BlockSize; s.err == nil && s.off != want {
		return fmt.Errorf("erofs: image of %d bytes was laid out with %d: %w", s.off, want, errdefs.ErrInternal)
	}
	writeTrailer(s)
	s.flush()
	return s.err
}

// uuid derives an identity from the inodes. overlayfs trusts the file handles
// of a lower layer only while no other one has its UUID.
func (l *layout) uuid() (id [16]byte) {
	h := sha256.New()
	s := newSink(h)
	s.zeros(metaStart)
	l.writeInodes(s)
	s.flush()
	copy(id[:], h.Sum(nil))
	id[6] = id[6]&0x0f | 0x80 // version 8, RFC 9562: of one's own making
	id[8] = id[8]&0x3f | 0x80
	return id
}

func (l *layout) writeSuper(s *sink, uuid [16]byte) {
	s.zeros(superOffset)
	sb := superblock{
		inodes:    uint64(l.count),
		epoch:     uint64(l.epoch.sec),
		epochNsec: l.epoch.nsec,
		rootNid:   uint16(l.node(0).slot), // the first inode: 8 or 16
		blocks:    l.blocks,
		uuid:      uuid,
	}
	sb.put(s.next(superSize))
	dev := device{blocks: uint32(l.layer.mappable() / BlockSize), mapped: l.mapped}
	dev.put(s.next(deviceSlotSize))
}

// writeInodes writes every inode with its xattrs and what lies behind them.
func (l *layout) writeInodes(s *sink) {
	for i := range l.count {
		if s.err != nil {
			return
		}
		n := l.node(i)
		s.zeros(metaBlock*BlockSize + int64(n.slot)*nidSize - s.off)
		d := l.diskInode(n, uint32(i)+1)
		d.put(s.next(int(n.inodeSize())))
		writeXattrs(s, n.in.Xattrs)
		switch {
		case n.place == placeChunks:
			l.writeChunkTable(s, n)
		case n.place == placeInline && n.isDir():
			d := &l.dirs[n.dir]
			l.writeDirBlock(s, d, int(n.tail), d.count())
		case n.place == placeInline:
			s.writeString(n.in.Target)
		}
	}
	s.align(BlockSize)
}

func (l *layout) diskInode(n *node, ino uint32) diskInode {
	d := diskInode{
		extended:   n.extended,
		layout:     layoutFlatPlain,
		xattrCount: xattrCount(n.xattrs),
		mode:       uint16(n.in.Mode),
		nlink:      n.nlink,
		size:       n.size,
		ino:        ino,
		uid:        n.in.UID,
		gid:        n.in.GID,
		mtime:      uint64(n.in.Mtime),
		mtimeNsec:  n.in.MtimeNsec,
	}
	switch n.place {
	case placeNone:
		if t := n.in.Mode & unix.S_IFMT; t == unix.S_IFCHR || t == unix.S_IFBLK {
			d.u = encodeDev(unix.Major(n.in.Rdev), unix.Minor(n.in.Rdev))
		}
	case placeInline:
		d.layout, d.u = layoutFlatInline, l.dataStart+n.block
	case placeData:
		d.u = l.dataStart + n.block
	case placeDevice:
		d.u = l.mapped + n.block
	case placeChunks:
		d.layout, d.u = layoutChunkBased, chunkFormatIndexes|uint32(n.chunkBits)
	}
	return d
}

func (l *layout) writeChunkTable(s *sink, n *node) {
	s.align(chunkIndexSize)
	next := l.dataStart + n.block
	rs, err := l.find(n.in)
	s.fail(err)
	eachChunk(rs, n.in.Size, n.chunkBits, func(kind chunkKind, off, end int64, rs []run) {
		dev, block := uint16(0), uint32(nullBlock)
		switch kind {
		case chunkMapped:
			dev, block = 1, uint32((rs[0].dev+off-rs[0].off)/BlockSize)
		case chunkCopied:
			block = next
			next += uint32((end - off) / BlockSize)
		case chunkHole:
		}
		putChunkIndex(s.next(chunkIndexSize), dev, block)
	})
}

// writeData writes the data area in the order in which arrange counted it.
func (l *layout) writeData(s *sink) {
	for i := range l.count {
		n := l.node(i)
		switch {
		case n.place == placeChunks:
			l.writeChunks(s, n)
		case n.isDir():
			l.writeDirBlocks(s, n)
		case n.place == placeData:
			s.writeString(n.in.Target)
			s.align(BlockSize)
		}
		if s.err != nil {
			return
		}
	}
}

func (l *layout) writeChunks(s *sink, n *node) {
	rs, err := l.find(n.in)
	s.fail(err)
	eachChunk(rs, n.in.Size, n.chunkBits, func(kind chunkKind, off, end int64, rs []run) {
		if kind != chunkCopied {
			return
		}
		at := off
		for i := range rs {
			from, to := max(rs[i].off, off), min(rs[i].end, end)
			s.zeros(from - at)
			s.copyAt(l.layer, rs[i].dev+from-rs[i].off, to-from)
			at = to
		}
		s.zeros(end - at)
	})
}
