package decompress

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"sync/atomic"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/pierrec/lz4/v4"

	"github.com/gantryd/gantry/integration/short"
)

// counting counts what was taken from it.
type counting struct {
	r io.Reader
	n atomic.Int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func TestDecodesNoFurtherThanAsked(t *testing.T) {
	t.Parallel()
	zeros := make([]byte, 32<<20)
	for name, in := range map[string][]byte{"gzip": gz(t, zeros, gzip.Header{}), "zstd": zst(t, zeros), "lz4": lz(t, zeros)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			most := 2 * inputBuffer
			if name == "gzip" {
				most = 4 << 20 // it reads ahead: two chunks of 512 KiB for each worker
			}
			src := &counting{r: bytes.NewReader(bytes.Repeat(in, 200))}
			r, err := NewReader(t.Context(), src, withWorkers(2))
			if err != nil {
				t.Fatal(err)
			}
			defer closed(t, r)
			if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
				t.Fatal(err)
			}
			if n := src.n.Load(); n > int64(most) {
				t.Errorf("took %d bytes of input for 1000 of output, want at most %d", n, most)
			}
		})
	}
}

// zstdHeader is that of a frame of one segment, whose size is 4 bytes.
func zstdHeader(size int) []byte {
	return append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0}, u32(size)...)
}

// zstdBlockHeader is of a block of the type: 0 as it is, 1 one byte repeated.
func zstdBlockHeader(last bool, kind, size int) []byte {
	word := size<<3 | kind<<1
	if last {
		word |= 1
	}
	return binary.LittleEndian.AppendUint32(nil, uint32(word))[:3]
}

// repeated is a frame of n blocks of 128 KiB of one byte, 4 bytes each.
func repeated(n int) []byte {
	out := zstdHeader(n * zstdBlock)
	for i := range n {
		out = append(append(out, zstdBlockHeader(i == n-1, 1, zstdBlock)...), 'z')
	}
	return out
}

// TestHostile reads streams that are made to cost more than they are worth. The
// budget is the reader's own, so what it holds at most is what it may.
func TestHostile(t *testing.T) {
	t.Parallel()
	million, frames := short.Size(1<<20, 1<<16), short.Size(20, 2)
	emptyFrame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0}
	emptyBlocks := bytes.Repeat(zstdBlockHeader(false, 0, 0), million)
	oneByteBlock := join(u32(1<<31|1), []byte{'x'})
	for _, c := range []struct {
		name string
		in   []byte
		want int // bytes of output; -1 is ErrCorrupt
	}{
		{"zstd, a million empty frames", bytes.Repeat(emptyFrame, million), 0},
		{"zstd, a million skippable frames", bytes.Repeat(skippable(1, ""), million), 0},
		{"zstd, both in turn", bytes.Repeat(join(skippable(1, ""), emptyFrame), million/2), 0},
		{"zstd, a million empty blocks", join(zstdHeader(0), emptyBlocks, zstdBlockHeader(true, 0, 0)), 0},
		{"zstd, twelve million empty blocks", join(zstdHeader(0), bytes.Repeat(emptyBlocks, 12), zstdBlockHeader(true, 0, 0)), 0},
		{"zstd, frames that hold 30 MiB", bytes.Repeat(repeated(240), frames), frames * 240 * zstdBlock},
		{"zstd, a frame that holds 100 MiB", repeated(40 * frames), 40 * frames * zstdBlock},
		{"zstd, less than announced", bytes.Repeat(join(zstdHeader(30<<20), zstdBlockHeader(true, 1, 1), []byte{0}), 1000), -1},
		{"zstd, more than announced", join(zstdHeader(10), zstdBlockHeader(false, 1, zstdBlock), []byte{0}, zstdBlockHeader(true, 1, zstdBlock), []byte{0}), -1},
		{"zstd, reserved block", join(zstdHeader(10), zstdBlockHeader(true, 3, 5), make([]byte, 10)), -1},
		{"zstd, long block", join(zstdHeader(10), zstdBlockHeader(true, 0, zstdBlock+1), make([]byte, zstdBlock+1)), -1},
		{"lz4, a million empty frames", bytes.Repeat(lz(t, nil, lz4.ChecksumOption(false)), million), 0},
		{"lz4, a million blocks of a byte", join(lz4Header(1<<6|1<<5, 7<<4), bytes.Repeat(oneByteBlock, million), u32(0)), million},
		{"lz4, the same, linked", join(lz4Header(1<<6, 4<<4), bytes.Repeat(oneByteBlock, million), u32(0)), million},
		{"lz4, legacy blocks of nothing", join(u32(magicLZ4Legacy), make([]byte, 4*million)), 0},
		{"apple, a million stored bytes", join(bytes.Repeat(join([]byte(appleStored), u32(1), []byte{'x'}), million), []byte(appleEnd)), million},
		{"apple, a million empty blocks", join(bytes.Repeat(join([]byte(appleStored), u32(0)), million), []byte(appleEnd)), 0},
		{"apple, 4 GiB announced", join([]byte(appleStored), u32(1<<32-1), []byte("that is all")), -1},
		{"apple, 8 MiB announced", join([]byte(appleBlock), u32(appleMost), u32(appleMost), []byte("that is all")), -1},
	} {
		for _, workers := range []int{1, 3} {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				b := NewBudget(DefaultBudget)
				got, peak, err := consume(t, c.in, b, workers)
				if c.want < 0 && !errors.Is(err, ErrCorrupt) || c.want >= 0 && (err != nil || got != int64(c.want)) {
					t.Errorf("%d bytes, error %v; want %d", got, err, c.want)
				}
				if most := int64(2*workers*2*(maxAhead+maxAhead/4) + 64<<20); peak > most {
					t.Errorf("held %d bytes, want at most %d", peak, most)
				}
			})
		}
	}
}

// consume reads a stream block by block and tells what of the budget was held at most.
func consume(t *testing.T, in []byte, b *Budget, workers int) (total, peak int64, err error) {
	t.Helper()
	defer func() {
		if n := b.Held(); n != 0 {
			t.Errorf("%d bytes are held after Close", n)
		}
	}()
	r, err := NewReader(t.Context(), bytes.NewReader(in), WithBudget(b), withWorkers(workers))
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = r.Close() }()
	for {
		data, release, err := r.Next()
		peak = max(peak, b.Held())
		if errors.Is(err, io.EOF) {
			return total, peak, nil
		}
		if err != nil {
			return total, peak, err
		}
		if len(data) == 0 || len(data) > 4<<20 {
			t.Errorf("a block of %d bytes", len(data))
		}
		total += int64(len(data))
		release()
	}
}
