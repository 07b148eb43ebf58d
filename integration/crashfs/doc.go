// Package crashfs is a file system for tests that pull the plug.
//
// Mount puts a file system that lives in memory, served by FUSE, on a folder. What is done to it is written down in
// order: every change of a name, every write with its bytes, every fsync, and marks that the test sets when the code
// under test has promised something. From that Log, cut anywhere, it builds what a disk may hold after a power loss.
// Save writes such a State into a folder, best one of Memory, where the code under test is started again.
//
// # What a power loss may leave
//
// The promises are those that ext4, xfs and btrfs keep and no more:
//
//   - a file's bytes and length are safe after an fsync of that file; until then each 512-byte sector written since is the
//     old or the new one, on its own, and the length is anything between the old and the new;
//   - a name (of a new file or folder, a link, a rename, a removal) is safe after an fsync of the folder it is in;
//   - changes of names in one folder reach the disk in their order; those in different folders in any;
//   - a rename is one change, also between folders: it never leaves both names or none;
//   - an fsync of a file says nothing about its name, one of a folder nothing about what its files hold.
//
// Only tests import this package.
package crashfs
