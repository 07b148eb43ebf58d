package erofs

import "encoding/binary"

// On-disk constants, named and numbered as in the kernel's
// fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst.
const (
	blockBits = 9

	superOffset = 1024
	superSize   = 128
	superMagic  = 0xe0f5e1e2

	// The device table counts its slots from the start of the image, so the
	// first one behind the superblock is number 9.
	deviceSlot     = (superOffset + superSize) / deviceSlotSize
	deviceSlotSize = 128

	// Inode numbers (nids) count slots of 32 bytes from metaBlock. The
	// superblock lies in that block too, so that no number is 0: some readers
	// of directories skip entries whose inode number is 0.
	metaBlock = superOffset / BlockSize
	nidSize   = 32
	metaStart = deviceSlot*deviceSlotSize + deviceSlotSize

	featureCompatMtime         = 0x2
	featureIncompatChunkedFile = 0x4
	featureIncompatDeviceTable = 0x8

	compactSize  = 32
	extendedSize = 64

	layoutFlatPlain  = 0
	layoutFlatInline = 2
	layoutChunkBased = 4

	direntSize     = 12
	chunkIndexSize = 8
	// chunkFormatIndexes says that a chunk's address is 8 bytes and names a device.
	chunkFormatIndexes = 0x20
	// nullBlock is the address of a chunk that reads as zeros.
	nullBlock = 1<<32 - 1

	xattrHeaderSize = 12
	xattrEntrySize  = 4
	// maxXattrBody is what i_xattr_icount (16 bits) can express.
	maxXattrBody = xattrHeaderSize + 4*(1<<16-2)

	xattrIndexUser       = 1
	xattrIndexACLAccess  = 2
	xattrIndexACLDefault = 3
	xattrIndexTrusted    = 4
	xattrIndexSecurity   = 6

	fileTypeRegular   = 1
	fileTypeDirectory = 2
	fileTypeCharDev   = 3
	fileTypeBlockDev  = 4
	fileTypeFifo      = 5
	fileTypeSocket    = 6
	fileTypeSymlink   = 7
)

var le = binary.LittleEndian

// superblock is struct erofs_super_block without the fields that stay zero.
type superblock struct {
	inodes    uint64
	epoch     uint64 // mtime of every compact inode
	epochNsec uint32
	rootNid   uint16
	blocks    uint32 // of the image itself, without devices
	uuid      [16]byte
}

func (s *superblock) put(b []byte) {
	le.PutUint32(b[0:], superMagic)
	le.PutUint32(b[8:], featureCompatMtime)
	b[12] = blockBits
	le.PutUint16(b[14:], s.rootNid)
	le.PutUint64(b[16:], s.inodes)
	le.PutUint64(b[24:], s.epoch)
	le.PutUint32(b[32:], s.epochNsec)
	le.PutUint32(b[36:], s.blocks)
	le.PutUint32(b[40:], metaBlock)
	copy(b[48:64], s.uuid[:])
	le.PutUint32(b[80:], featureIncompatChunkedFile|featureIncompatDeviceTable)
	le.PutUint16(b[86:], 1) // extra devices
	le.PutUint16(b[88:], deviceSlot)
}

// device is struct erofs_deviceslot: where a device's blocks appear in the
// image's own address space.
type device struct {
	blocks uint32
	mapped uint32
}

func (d *device) put(b []byte) {
	le.PutUint32(b[64:], d.blocks)
	le.PutUint32(b[68:], d.mapped)
}

// diskInode holds the fields of struct erofs_inode_compact and
// struct erofs_inode_extended.
type diskInode struct {
	extended   bool
	layout     uint16
	xattrCount uint16
	mode       uint16
	nlink      uint32
	size       uint64
	u          uint32 // start block, device number or chunk format
	ino        uint32 // what a 32-bit stat shows
	uid, gid   uint32
	mtime      uint64
	mtimeNsec  uint32
}

func (d *diskInode) put(b []byte) {
	le.PutUint16(b[2:], d.xattrCount)
	le.PutUint16(b[4:], d.mode)
	le.PutUint32(b[16:], d.u)
	le.PutUint32(b[20:], d.ino)
	if !d.extended {
		le.PutUint16(b[0:], d.layout<<1)
		le.PutUint16(b[6:], uint16(d.nlink))
		le.PutUint32(b[8:], uint32(d.size))
		le.PutUint16(b[24:], uint16(d.uid))
		le.PutUint16(b[26:], uint16(d.gid))
		return
	}
	le.PutUint16(b[0:], d.layout<<1|1)
	le.PutUint64(b[8:], d.size)
	le.PutUint32(b[24:], d.uid)
	le.PutUint32(b[28:], d.gid)
	le.PutUint64(b[32:], d.mtime)
	le.PutUint32(b[40:], d.mtimeNsec)
	le.PutUint32(b[44:], d.nlink)
}

func putDirent(b []byte, nid uint64, nameOff uint16, fileType byte) {
	le.PutUint64(b[0:], nid)
	le.PutUint16(b[8:], nameOff)
	b[10] = fileType
}

func putChunkIndex(b []byte, dev uint16, block uint32) {
	le.PutUint16(b[2:], dev)
	le.PutUint32(b[4:], block)
}

// putXattrEntry writes struct erofs_xattr_entry. The header before the first
// entry is all zero here: no shared xattrs, no name filter.
func putXattrEntry(b []byte, nameLen, index byte, valueLen uint16) {
	b[0] = nameLen
	b[1] = index
	le.PutUint16(b[2:], valueLen)
}

// encodeDev packs a device number as the kernel's new_encode_dev does.
func encodeDev(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | minor&^0xff<<12
}
