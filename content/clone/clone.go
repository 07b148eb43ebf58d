// Package clone gives one file the bytes of another at the same offsets, at the least price that the file system has:
// shared blocks (FICLONERANGE, as on XFS and btrfs), else copy_file_range, else read and write.
package clone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

const (
	// unit is a multiple of every file system's block size: only whole blocks can be shared.
	unit = 256 << 10
	// step is how many bytes are copied between two looks at the context.
	step = 16 << 20
)

// errCannot means that a cheaper way does not work between these two files.
var errCannot = errors.New("cannot be done between these files")

// Range makes dst[off:end] what src[off:end] is. dst may be longer or shorter. It returns how many bytes from off on
// are in dst, also when it fails or ctx ends.
func Range(ctx context.Context, dst, src *os.File, off, end int64) (int64, error) {
	if off >= end {
		return 0, nil
	}
	first, last := (off+unit-1)/unit*unit, end/unit*unit
	if first >= last {
		n, err := copied(ctx, dst, src, off, end)
		return n, wrap(dst, src, err)
	}
	// The whole blocks first, for if they cannot be shared all is copied in one go.
	if err := share(dst, src, first, last); err != nil {
		if !errors.Is(err, errCannot) {
			return 0, wrap(dst, src, err)
		}
		n, err := copied(ctx, dst, src, off, end)
		return n, wrap(dst, src, err)
	}
	n, err := copied(ctx, dst, src, off, first)
	if err != nil {
		return n, wrap(dst, src, err)
	}
	n, err = copied(ctx, dst, src, last, end)
	return last - off + n, wrap(dst, src, err)
}

func wrap(dst, src *os.File, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("copy %s to %s: %w", src.Name(), dst.Name(), err)
}

// copied copies, within the kernel as long as that works.
func copied(ctx context.Context, dst, src *os.File, off, end int64) (n int64, err error) {
	way := copyRange
	for at := off; at < end; at = off + n {
		if ctx.Err() != nil {
			return n, context.Cause(ctx)
		}
		m, err := way(dst, src, at, min(end-at, step))
		n += m
		if errors.Is(err, errCannot) {
			way = readWrite
			continue
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// readWrite copies up to n bytes, and at least one unless it fails.
func readWrite(dst, src *os.File, off, n int64) (int64, error) {
	p := make([]byte, min(n, unit))
	read, err := src.ReadAt(p, off)
	if read == 0 {
		if errors.Is(err, io.EOF) {
			return 0, io.ErrUnexpectedEOF
		}
		return 0, err
	}
	wrote, err := dst.WriteAt(p[:read], off)
	return int64(wrote), err
}
