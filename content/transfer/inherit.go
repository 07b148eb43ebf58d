package transfer

import (
	"context"

	"github.com/gantryd/gantry/content/clone"
)

// inherit fills a folder with the first n bytes of another one whose holder may still be there: only blocks that match
// their records, each recorded here too. Where the file system can, the bytes are shared and not copied. It returns
// how many came over.
func (f *folder) inherit(ctx context.Context, from *folder, n int64) (int64, error) {
	last := from.log.blocks[uint32((n-1)/blockSize)]
	end := max(n, int64(last.block)*blockSize+int64(last.length)) // its checksum is over all of the block
	if _, err := clone.Range(ctx, f.data, from.data, 0, end); err != nil {
		return 0, err
	}
	buf := make([]byte, blockSize)
	for off := int64(0); off < n; off = blockEnd(off) {
		if ctx.Err() != nil {
			return off, context.Cause(ctx)
		}
		r := from.log.blocks[uint32(off/blockSize)]
		if off+int64(r.length) < min(n, blockEnd(off)) {
			return off, nil
		}
		if ok, err := f.holds(r, buf); !ok || err != nil {
			return off, err
		}
		if err := f.record(r.block, int64(r.length), r.crc); err != nil {
			return off, err
		}
		f.log.blocks[r.block] = r
	}
	return n, nil
}

// abandonCopy closes the state, and removes the folder if nothing is recorded in it: what was copied before the disk was
// full would only keep it full.
func (f *folder) abandonCopy() error {
	if len(f.log.blocks) == 0 {
		return f.remove()
	}
	return f.closeState()
}
