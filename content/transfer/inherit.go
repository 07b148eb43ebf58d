package transfer

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// inherit fills a folder with the first n bytes of another one whose holder may still be there: only blocks that match
// their records, each recorded here too. Where the file system can, the bytes are shared and not copied. It returns
// how many came over.
func (f *folder) inherit(ctx context.Context, from *folder, n int64) (int64, error) {
	cloned := n / blockSize * blockSize
	if cloned > 0 && reflink(f.data, from.data, cloned) != nil {
		cloned = 0
	}
	buf := make([]byte, blockSize)
	for off := int64(0); off < n; off = blockEnd(off) {
		if ctx.Err() != nil {
			return off, context.Cause(ctx)
		}
		block := uint32(off / blockSize)
		r := from.log.blocks[block]
		want := min(n-off, blockLen(f.blob.Size, block))
		if int64(r.length) < want {
			return off, nil
		}
		if _, err := from.data.ReadAt(buf[:r.length], off); err != nil && !errors.Is(err, io.EOF) {
			return off, fmt.Errorf("read %s at %d: %w", from.path, off, err)
		}
		if crc32.Checksum(buf[:r.length], castagnoli) != r.crc {
			return off, nil
		}
		if off >= cloned {
			if _, err := f.data.WriteAt(buf[:r.length], off); err != nil {
				return off, err
			}
		}
		if err := f.record(block, int64(r.length), r.crc); err != nil {
			return off, err
		}
		f.log.blocks[block] = r
	}
	return n, nil
}
