package erofs

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/containerd/errdefs"
)

// The trailer is one block behind the last block that the superblock counts,
// where no reader of EROFS looks. Its first 16 bytes are trailerMagic, the next
// 8 the length of the image in bytes, trailer included, little endian; its last
// 4 are the CRC-32C of every byte of the image before them.
const (
	trailerMagic = "gantry-index-v1\n"
	crcOffset    = BlockSize - crc32.Size
)

// ErrChecksum is what Verify returns for an image that is not what Write wrote.
var ErrChecksum = fmt.Errorf("EROFS index is damaged: %w", errdefs.ErrDataLoss)

func writeTrailer(s *sink) {
	size := s.off + BlockSize
	b := s.next(crcOffset)
	copy(b, trailerMagic)
	le.PutUint64(b[len(trailerMagic):], uint64(size))
	s.flush()
	le.PutUint32(s.next(crc32.Size), s.crc)
}

// Verify reads an image of size bytes and checks it against its own checksum.
// An image that was changed anywhere, cut short or made longer is an
// ErrChecksum: build it again from the layer. Errors of r are wrapped as they
// are. The checksum finds bit rot and torn writes, not forgery.
func Verify(r io.ReaderAt, size int64) error {
	if size < metaStart+BlockSize || size%BlockSize != 0 {
		return fmt.Errorf("%w: %d bytes are not the length of an index", ErrChecksum, size)
	}
	crc := crc32.New(castagnoli)
	buf := make([]byte, min(size, 1<<20))
	var block []byte
	for off := int64(0); off < size; off += int64(len(block)) {
		block = buf[:min(size-off, int64(len(buf)))]
		if n, err := r.ReadAt(block, off); n < len(block) {
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("%w: ends at byte %d of %d", ErrChecksum, off+int64(n), size)
			}
			return fmt.Errorf("erofs: read index at %d: %w", off+int64(n), noEOF(err))
		}
		if off+int64(len(block)) < size {
			_, _ = crc.Write(block)
		}
	}
	_, _ = crc.Write(block[:len(block)-crc32.Size])
	trailer := block[len(block)-BlockSize:]
	switch {
	case string(trailer[:len(trailerMagic)]) != trailerMagic:
		return fmt.Errorf("%w: no trailer", ErrChecksum)
	case le.Uint64(trailer[len(trailerMagic):]) != uint64(size):
		return fmt.Errorf("%w: %d bytes long, written with %d", ErrChecksum, size, le.Uint64(trailer[len(trailerMagic):]))
	case le.Uint32(trailer[crcOffset:]) != crc.Sum32():
		return fmt.Errorf("%w: checksum differs", ErrChecksum)
	}
	return nil
}
