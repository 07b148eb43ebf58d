package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// Limits of one layer. A tar beyond them fails with errdefs.ErrInvalidArgument;
// they are far above what images hold and keep a hostile tar, which shrinks a
// thousandfold when compressed, from filling the memory.
const (
	// MaxEntries is how many members a tar may have; with more inodes than that it
	// may imply no further directory. At 200 bytes for each in memory, and some for
	// its index, that is 1.3 GB.
	MaxEntries = 4 << 20
	// MaxHeld bounds the bytes of names, link targets, extended attributes and
	// sparse maps that a Table keeps.
	MaxHeld = 256 << 20
	// MaxFileSize is the largest file of a layer in bytes, which only a sparse
	// member can reach: as on ext4.
	MaxFileSize = 16<<40 - 1<<12
)

// defaultPrefix is the path below which containerd's overlayfs snapshotter
// unpacks by default. It counts towards PATH_MAX there, so it does here.
const defaultPrefix = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1000/fs"

// Scan reads an uncompressed tar up to its end-of-archive and returns the tree
// that containerd's archive.Apply would have made of it. Where r is an
// io.ReaderAt (a file) the data is stepped over, not read; r is then read from
// offset 0. A tar that containerd refuses gives errdefs.ErrInvalidArgument and
// names the member; errors of r pass through.
func Scan(ctx context.Context, r io.Reader) (*Table, error) {
	if f, ok := r.(io.ReaderAt); ok {
		return scan(ctx, newFileSource(f), len(defaultPrefix))
	}
	return scan(ctx, readerSource{r}, len(defaultPrefix))
}

func scan(ctx context.Context, src source, prefix int) (*Table, error) {
	s := &scanner{tape: &tape{src: src}, build: newBuilder(prefix)}
	s.headers.tape = s.tape
	return s.run(ctx)
}

func (s *scanner) run(ctx context.Context) (*Table, error) {
	for {
		if s.build.entries%256 == 0 && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		hdr, err := s.headers.next()
		if s.headers.zero && s.build.fresh != nil {
			s.build.fresh.Padded = true
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, s.readError(err)
		}
		if err := s.member(hdr); err != nil {
			return nil, fmt.Errorf("tar member %.300q: %w: %w", hdr.Name, err, errdefs.ErrInvalidArgument)
		}
	}
	t, err := s.build.finish()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return t, nil
}

type scanner struct {
	tape    *tape
	headers headers
	build   *builder
	last    string // the current member
	end     int64  // where its data ends
}

// readError says what was being read when the tar went wrong. An error of the
// source itself is not the tar's fault.
func (s *scanner) readError(err error) error {
	switch {
	case s.tape.err != nil:
		return fmt.Errorf("read tar at byte %d: %w", s.tape.pos, s.tape.err)
	case s.build.entries > 0 && errors.Is(err, io.ErrUnexpectedEOF) && s.tape.pos <= s.end:
		return fmt.Errorf("tar member %.300q: the tar ends before its data: %w", s.last, errdefs.ErrInvalidArgument)
	case s.build.entries > 0:
		return fmt.Errorf("tar header after member %.300q at byte %d: %w: %w", s.last, s.tape.headerAt, err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("first tar header: %w: %w", err, errdefs.ErrInvalidArgument)
}

func (s *scanner) member(hdr *tar.Header) error {
	extents, end, err := s.data(hdr)
	if err != nil {
		return err
	}
	if end < 0 { // no tar is that long: it ends before
		end = math.MaxInt64 &^ (blockSize - 1)
	}
	s.last, s.end, s.headers.end = hdr.Name, end, end
	s.build.fresh = nil
	if err := s.build.apply(hdr, extents); err != nil {
		return err
	}
	s.tape.expect(end)
	return nil
}

// data maps the content of the member and says where it ends in the tar.
func (s *scanner) data(hdr *tar.Header) (extents []erofs.Extent, end int64, err error) {
	begin := s.tape.pos
	switch hdr.Typeflag {
	case tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeDir, tar.TypeFifo, tar.TypeXGlobalHeader:
		return nil, begin, nil // whatever their size field says
	case tar.TypeGNUSparse:
		size, err := physicalSize(hdr, s.tape)
		return nil, begin + size, err
	}
	version := sparseVersion(hdr)
	if version == "" {
		if hdr.Size > 0 {
			extents = s.build.oneExtent(erofs.Extent{Len: hdr.Size, DevOff: begin})
		}
		return extents, begin + hdr.Size, nil
	}
	if hdr.Size > MaxFileSize {
		return nil, 0, fmt.Errorf("a sparse file of %d bytes", hdr.Size)
	}
	size, err := physicalSize(hdr, s.tape)
	if err != nil {
		return nil, 0, err
	}
	if version == "1" {
		size -= int64(len(s.tape.after)) // the map is part of the member
	}
	extents, err = sparseExtents(version, hdr, s.tape, begin, size)
	return extents, begin + size, err
}
