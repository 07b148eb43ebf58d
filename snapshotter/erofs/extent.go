package erofs

import (
	"fmt"
	"io"
	"math/bits"

	"github.com/containerd/errdefs"
)

// maxChunkBits keeps chunks at 1 GiB or less: a 32-bit kernel computes their
// size in 32 bits.
const maxChunkBits = 30 - blockBits

// Device is the layer file that an image points into: what mount(2) gets as
// the option device=. A last block that is not whole is never mapped, since
// the kernel reads whole blocks only.
type Device struct {
	io.ReaderAt
	// Size is the length of the file in bytes.
	Size int64
}

// mappable is the length in bytes of the part that may be mapped.
func (d Device) mappable() int64 { return d.Size &^ (BlockSize - 1) }

// run is bytes off to end of a file that lie in the device from dev. The part
// from mapOff to mapEnd, if any, is on the block grid of both; mapEnd is
// behind end where the file ends within a block that is zero from there on.
type run struct {
	off, end, dev  int64
	mapOff, mapEnd int64
}

// mapper finds out which data of a layer can be mapped.
type mapper struct {
	layer Device
	runs  []run
	pad   [BlockSize]byte
}

// find checks the extents of a file and joins those that follow each other.
// The result is good until the next call.
func (m *mapper) find(in *Inode) ([]run, error) {
	layer, out := m.layer, m.runs[:0]
	var end int64
	for _, e := range in.Data {
		if e.Off < end || e.Len < 0 || e.Len > in.Size-e.Off {
			return nil, fmt.Errorf("extent of %d bytes at %d overlaps, is out of order or outside of the file's %d bytes: %w",
				e.Len, e.Off, in.Size, errdefs.ErrInvalidArgument)
		}
		if e.DevOff < 0 || e.Len > layer.Size-e.DevOff {
			return nil, fmt.Errorf("extent of %d bytes at %d is outside of the layer's %d bytes: %w",
				e.Len, e.DevOff, layer.Size, errdefs.ErrInvalidArgument)
		}
		end = e.Off + e.Len
		if e.Len == 0 {
			continue
		}
		if n := len(out); n > 0 && out[n-1].end == e.Off && out[n-1].dev+e.Off-out[n-1].off == e.DevOff {
			out[n-1].end = end
			continue
		}
		out = append(out, run{off: e.Off, end: end, dev: e.DevOff})
	}
	m.runs = out
	for i := range out {
		if err := m.fit(&out[i], in); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// fit sets the part of a run that can be mapped.
func (m *mapper) fit(r *run, in *Inode) error {
	if (r.off^r.dev)&(BlockSize-1) != 0 {
		return nil
	}
	r.mapOff = align(r.off, BlockSize)
	r.mapEnd = r.end &^ (BlockSize - 1)
	if r.end == in.Size && r.end != r.mapEnd {
		clean := in.Padded
		if !clean {
			var err error
			if clean, err = m.padded(r.dev + r.end - r.off); err != nil {
				return err
			}
		}
		if clean {
			r.mapEnd += BlockSize
		}
	}
	r.mapEnd = max(r.mapOff, min(r.mapEnd, m.layer.mappable()-r.dev+r.off))
	return nil
}

// padded says whether the layer has zeros from off to the end of that block.
// The kernel shows what is there to whoever maps the file's last page, and
// programs rely on zeros (a compiler that maps its source, for one). A device
// without a reader counts as padded.
func (m *mapper) padded(off int64) (bool, error) {
	end := align(off, BlockSize)
	if m.layer.ReaderAt == nil || end > m.layer.mappable() {
		return true, nil
	}
	pad := m.pad[:end-off]
	if n, err := m.layer.ReadAt(pad, off); n < len(pad) {
		return false, fmt.Errorf("read layer at %d: %w", off+int64(n), noEOF(err))
	}
	for _, b := range pad {
		if b != 0 {
			return false, nil
		}
	}
	return true, nil
}

// whole says whether the run is the file, all of it and mapped.
func (r *run) whole(size int64) bool {
	return r.off == 0 && r.end == size && r.mapEnd == align(size, BlockSize)
}

// span is the part of a file that chunk number i covers, up to a whole block.
func span(i int64, size int64, chunkBits uint8) (off, end int64) {
	shift := chunkBits + blockBits
	return i << shift, min((i+1)<<shift, align(size, BlockSize))
}

func chunkCount(size int64, chunkBits uint8) int64 {
	shift := chunkBits + blockBits
	return (size + 1<<shift - 1) >> shift
}

// chooseChunks returns the chunk size that takes the least space in the image,
// table and copied data together; the larger one of equals.
func chooseChunks(rs []run, size int64) (chunkBits uint8, copied int64) {
	// One chunk over all of the file is the largest that makes sense.
	most := uint8(min(maxChunkBits, bits.Len64(uint64(size-1)>>blockBits)))
	least := int64(-1)
	for b := range most + 1 {
		c := copiedBytes(rs, size, b)
		if cost := c + chunkIndexSize*chunkCount(size, b); least < 0 || cost <= least {
			least, chunkBits, copied = cost, b, c
		}
	}
	return chunkBits, copied
}

// copiedBytes is how much of the file has to be copied with chunks of that
// size: every chunk that holds data and is not within one mapped run.
func copiedBytes(rs []run, size int64, chunkBits uint8) int64 {
	shift := chunkBits + blockBits
	var total int64
	done := int64(0) // chunks below are counted
	count := func(from, to int64) {
		if from = max(from, done); from < to {
			off, _ := span(from, size, chunkBits)
			_, end := span(to-1, size, chunkBits)
			total += end - off
			done = to
		}
	}
	for i := range rs {
		r := &rs[i]
		first, last := r.off>>shift, (r.end-1)>>shift+1
		mapFirst, mapLast := r.mappedChunks(size, chunkBits)
		if mapFirst >= mapLast {
			count(first, last)
			continue
		}
		count(first, mapFirst)
		count(mapLast, last)
	}
	return total
}

// mappedChunks returns the chunks that lie wholly in the mapped part of a run.
func (r *run) mappedChunks(size int64, chunkBits uint8) (first, last int64) {
	shift := chunkBits + blockBits
	first = (r.mapOff + 1<<shift - 1) >> shift
	last = r.mapEnd >> shift
	if r.mapEnd > r.mapOff && r.mapEnd == align(size, BlockSize) {
		last = chunkCount(size, chunkBits)
	}
	return first, last
}

// chunkKind is what a chunk of a file is.
type chunkKind uint8

const (
	chunkHole chunkKind = iota
	chunkMapped
	chunkCopied
)

// eachChunk calls f for every chunk of a file in order. rs are the runs that
// reach into the chunk.
func eachChunk(all []run, size int64, chunkBits uint8, f func(kind chunkKind, off, end int64, rs []run)) {
	at := 0
	for i := range chunkCount(size, chunkBits) {
		off, end := span(i, size, chunkBits)
		for at < len(all) && all[at].end <= off {
			at++
		}
		to := at
		for to < len(all) && all[to].off < end {
			to++
		}
		kind := chunkCopied
		switch rs := all[at:to]; {
		case len(rs) == 0:
			kind = chunkHole
		case rs[0].mapOff <= off && rs[0].mapEnd >= end:
			kind = chunkMapped
		}
		f(kind, off, end, all[at:to])
	}
}
