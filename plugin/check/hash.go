package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"unsafe"

	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// readStep is read at once, in bytes; a multiple of any disk's block.
	readStep = 1 << 20
	align    = 4096
)

var buffers = sync.Pool{New: func() any {
	b := make([]byte, readStep+align)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (align - 1)
	b = b[skip : skip+readStep]
	return &b
}}

// Hash reads a file and returns its digest, what the file was, and how much of it was read. Reads go to the disk and not
// to the page cache where the file system can do that: a copy in memory says nothing about the disk, and a hundred GB
// would drive out what containers use. Elsewhere pages are dropped as they are read. read counts bytes as they come.
func Hash(ctx context.Context, path string, alg digest.Algorithm, read func(n int64)) (d digest.Digest, fi fs.FileInfo, err error) {
	f, direct, err := open(path)
	if err != nil {
		return "", nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if fi, err = f.Stat(); err != nil {
		return "", nil, err
	}
	h := alg.Digester()
	p, _ := buffers.Get().(*[]byte)
	defer buffers.Put(p)
	for off := int64(0); off < fi.Size(); {
		if ctx.Err() != nil {
			return "", fi, context.Cause(ctx)
		}
		// Not ReadAt: after a short read at the end it would go on from an offset that direct reads cannot have.
		n, err := unix.Pread(int(f.Fd()), (*p)[:min(readStep, roundUp(fi.Size()-off))], off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EINVAL) && direct { // the file system does not, after all
			if err := f.Close(); err != nil {
				return "", fi, err
			}
			if f, err = os.Open(path); err != nil {
				return "", fi, err
			}
			direct = false
			continue
		}
		if err != nil {
			return "", fi, fmt.Errorf("read at %d: %w", off, err)
		}
		if n == 0 {
			break
		}
		_, _ = h.Hash().Write((*p)[:n]) // never fails
		if !direct {
			_ = unix.Fadvise(int(f.Fd()), off, int64(n), unix.FADV_DONTNEED)
		}
		off += int64(n)
		read(int64(n))
		if !direct || off%align == 0 {
			continue
		}
		break // the last block
	}
	return h.Digest(), fi, nil
}

func roundUp(n int64) int64 { return (n + align - 1) &^ (align - 1) }

// open tries to open a file for direct reads.
func open(path string) (f *os.File, direct bool, err error) {
	f, err = os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.EINVAL) {
		f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
		return f, false, err
	}
	return f, true, err
}
