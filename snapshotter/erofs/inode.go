// Package erofs writes EROFS images that hold metadata only and point into
// other files for their data.
//
// An image written here is the index of one container layer: the kernel mounts
// it with the layer's own tar as the extra device, so that no byte of file data
// is copied. The on-disk format is documented in the Linux kernel
// (Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h).
//
// In an image come first superblock and device table, then the inodes, each
// with its xattrs and what lies inline (the last block of a directory, a short
// symlink, a table of chunks), then the data area (directories over a block,
// long symlinks, file data that could not be mapped), and last a trailer of one
// block with a checksum over all of it, which Verify checks. The layer, device
// 1, is mapped behind: a file that is one run of whole blocks there has a plain
// start block in that range and no table.
package erofs

// BlockSize is the block size of every image in bytes. Tar members start on
// 512-byte boundaries, so 512 is what lets an index point at them in place.
const BlockSize = 512

// Inode is one file of the image. Directory entries that have the same *Inode,
// which is Shared then, are hard links. An Inode must not be changed while Write runs.
type Inode struct {
	// Mode holds the type and permission bits as in st_mode (S_IFREG, ...).
	Mode uint32
	UID  uint32
	GID  uint32
	// Mtime is in seconds since 1970, MtimeNsec below 1e9.
	MtimeNsec uint32
	Mtime     int64
	// Rdev is the device number of character and block devices, in the
	// encoding of golang.org/x/sys/unix.Mkdev.
	Rdev uint64
	// Size is the length in bytes of a regular file. It is ignored otherwise.
	Size int64
	// Target is what a symlink says.
	Target string
	// Xattrs maps full names ("user.foo", "trusted.overlay.opaque") to values.
	Xattrs map[string]string
	// Data says where the bytes of a regular file are, ascending, without
	// overlaps. What no extent covers reads as zeros.
	Data []Extent
	// Children are the entries of a directory, in any order, without "." and "..".
	Children []Dirent
	// Shared must be set on an inode, no directory, that more than one entry has;
	// each of the names becomes a file of its own otherwise. It may be set on others.
	Shared bool
	// Padded says that the layer has zeros from the end of the last extent to the
	// end of that block, so that Write need not look.
	Padded bool
}

// Dirent names an inode in a directory. Names are bytes, not text.
type Dirent struct {
	Name  string
	Inode *Inode
}

// Extent says that Len bytes of a file from Off are the bytes of the layer file
// (device 1) from DevOff. All three may have any alignment: what the kernel can
// read in place is mapped, the rest (a run off the block grid, the partial last
// block of the device, a last block that is not zero behind the file's end) is
// copied into the image.
type Extent struct {
	Off    int64
	Len    int64
	DevOff int64
}
