package crashfs

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// FS is a mounted file system.
type FS struct {
	server *fuse.Server
	root   *node

	mu        sync.Mutex // guards all nodes too: changes and their order in the log are one
	nodes     uint64     // the number of the newest; the root is 1
	log       Log
	recording bool
}

// Mount puts an empty file system on dir, which must be there, and records what is done to it. It needs root and
// /dev/fuse. The caller unmounts it with Close.
func Mount(dir string) (*FS, error) {
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		return nil, fmt.Errorf("power loss is tested on a FUSE mount, which needs root and the kernel's fuse module: %w", err)
	} else if err := f.Close(); err != nil {
		return nil, err
	}
	f := &FS{nodes: rootNode, recording: true}
	f.root = &node{fs: f, id: rootNode, links: 1, modified: time.Now()}
	var none time.Duration // the kernel asks each time: hard links change what it would remember
	server, err := fs.Mount(dir, f.root, &fs.Options{
		EntryTimeout: &none, AttrTimeout: &none, NegativeTimeout: &none,
		MountOptions: fuse.MountOptions{FsName: "crashfs", Name: "crashfs", DirectMountStrict: true, DisableSplice: true, DisableXAttrs: true},
	})
	if err != nil {
		return nil, fmt.Errorf("mount a FUSE file system on %s, as root: %w", dir, err)
	}
	f.server = server
	return f, nil
}

// Close unmounts the file system and waits until it serves nothing any more. Files on it must be closed.
func (f *FS) Close() error {
	if err := f.server.Unmount(); err != nil {
		return fmt.Errorf("unmount, is a file still open: %w", err)
	}
	f.server.Wait()
	return nil
}

// Mark notes a promise: what was done before it is before it in the log.
func (f *FS) Mark(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.record(op{kind: opMark, mark: what})
}

// Log ends the recording and returns it.
func (f *FS) Log() Log {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.recording = false
	return f.log
}

// record is called with mu held.
func (f *FS) record(o op) {
	if f.recording {
		f.log = append(f.log, o)
	}
}

// node is a file or a folder.
type node struct {
	fs.Inode
	fs *FS
	id uint64

	// Guarded by FS.mu.
	mode     uint32
	links    uint32
	modified time.Time
	data     []byte // of a file; where a symlink leads
}

var _ interface {
	fs.NodeGetattrer
	fs.NodeSetattrer
	fs.NodeOpener
	fs.NodeReader
	fs.NodeWriter
	fs.NodeFsyncer
	fs.NodeMkdirer
	fs.NodeCreater
	fs.NodeSymlinker
	fs.NodeReadlinker
	fs.NodeLinker
	fs.NodeUnlinker
	fs.NodeRmdirer
	fs.NodeRenamer
} = (*node)(nil)

// add makes a child. Called with mu held.
func (n *node) add(ctx context.Context, kind, mode uint32) (*node, *fs.Inode) {
	n.fs.nodes++
	child := &node{fs: n.fs, id: n.fs.nodes, mode: mode & 0o7777, links: 1, modified: time.Now()}
	return child, n.NewPersistentInode(ctx, child, fs.StableAttr{Mode: kind, Ino: child.id})
}

// attr fills what stat shows. Called with mu held.
func (n *node) attr(out *fuse.Attr) {
	out.Mode, out.Nlink, out.Size = n.mode, n.links, uint64(len(n.data))
	out.Blocks = (out.Size + 511) / 512
	out.SetTimes(nil, &n.modified, &n.modified)
}

func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	n.attr(&out.Attr)
	return 0
}

func (n *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	if mode, ok := in.GetMode(); ok {
		n.mode = mode & 0o7777
	}
	if at, ok := in.GetMTime(); ok {
		n.modified = at
	}
	if size, ok := in.GetSize(); ok {
		n.truncate(int64(size))
	}
	n.attr(&out.Attr)
	return 0
}

// truncate is called with mu held.
func (n *node) truncate(size int64) {
	n.data, n.modified = resized(n.data, size), time.Now()
	n.fs.record(op{kind: opTruncate, node: n.id, size: size})
}

// Open bypasses the kernel's page cache, here as in Create: what is read is what the log says.
func (n *node) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_TRUNC != 0 {
		n.fs.mu.Lock()
		defer n.fs.mu.Unlock()
		n.truncate(0)
	}
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (n *node) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	off = min(off, int64(len(n.data)))
	return fuse.ReadResultData(dest[:copy(dest, n.data[off:])]), 0
}

func (n *node) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	n.data, n.modified = written(n.data, p, off), time.Now()
	n.fs.record(op{kind: opWrite, node: n.id, off: off, data: slices.Clone(p)})
	return uint32(len(p)), 0
}

func (n *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	n.fs.record(op{kind: opSync, node: n.id})
	return 0
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	if n.GetChild(name) != nil {
		return nil, syscall.EEXIST
	}
	child, inode := n.add(ctx, syscall.S_IFDIR, mode)
	n.fs.record(op{kind: opMkdir, folder: n.id, name: name, node: child.id})
	child.attr(&out.Attr)
	return inode, 0
}

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	if n.GetChild(name) != nil { // the kernel looked first
		return nil, nil, 0, syscall.EEXIST
	}
	child, inode := n.add(ctx, syscall.S_IFREG, mode)
	n.fs.record(op{kind: opCreate, folder: n.id, name: name, node: child.id})
	child.attr(&out.Attr)
	return inode, nil, fuse.FOPEN_DIRECT_IO, 0
}

func (n *node) Symlink(ctx context.Context, target, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	if n.GetChild(name) != nil {
		return nil, syscall.EEXIST
	}
	child, inode := n.add(ctx, syscall.S_IFLNK, 0o777)
	child.data = []byte(target)
	n.fs.record(op{kind: opSymlink, folder: n.id, name: name, node: child.id, toName: target})
	child.attr(&out.Attr)
	return inode, 0
}

func (n *node) Readlink(context.Context) ([]byte, syscall.Errno) { return n.data, 0 }

func (n *node) Link(_ context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	t, ok := target.(*node)
	if !ok || t.links == 0 {
		return nil, syscall.ENOENT
	}
	if n.GetChild(name) != nil {
		return nil, syscall.EEXIST
	}
	t.links++
	n.fs.record(op{kind: opLink, folder: n.id, name: name, node: t.id})
	t.attr(&out.Attr)
	return t.EmbeddedInode(), 0
}

func (n *node) Unlink(_ context.Context, name string) syscall.Errno {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	child := n.child(name)
	if child == nil {
		return syscall.ENOENT
	}
	child.links--
	n.fs.record(op{kind: opUnlink, folder: n.id, name: name, node: child.id})
	return 0
}

func (n *node) Rmdir(_ context.Context, name string) syscall.Errno {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	child := n.child(name)
	switch {
	case child == nil:
		return syscall.ENOENT
	case len(child.Children()) > 0:
		return syscall.ENOTEMPTY
	}
	n.fs.record(op{kind: opRmdir, folder: n.id, name: name, node: child.id})
	return 0
}

func (n *node) Rename(_ context.Context, name string, newParent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	to, ok := newParent.(*node)
	child := n.child(name)
	switch {
	case !ok || child == nil:
		return syscall.ENOENT
	case flags != 0:
		return syscall.EINVAL
	}
	if old := to.child(newName); old != nil {
		if old.IsDir() && len(old.Children()) > 0 {
			return syscall.ENOTEMPTY
		}
		old.links--
	}
	n.fs.record(op{kind: opRename, folder: n.id, name: name, node: child.id, toFolder: to.id, toName: newName})
	return 0
}

func (n *node) child(name string) *node {
	inode := n.GetChild(name)
	if inode == nil {
		return nil
	}
	child, _ := inode.Operations().(*node)
	return child
}

func resized(p []byte, size int64) []byte {
	if size <= int64(len(p)) {
		return p[:size:size]
	}
	return append(slices.Clip(p), make([]byte, size-int64(len(p)))...)
}

func written(p, data []byte, off int64) []byte {
	if end := off + int64(len(data)); end > int64(len(p)) {
		p = resized(p, end)
	}
	copy(p[off:], data)
	return p
}
