package decompress

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

func FuzzReader(f *testing.F) {
	data := sample(2000)
	g, z, l := gz(f, data, gzip.Header{Name: "n", Extra: []byte("ee")}), zst(f, data), lz(f, data)
	for _, seed := range [][]byte{nil, {0x1f}, g, z, l, data, join(g, g), join(g, []byte("junk")), join(skippable(0, "s"), z), join(skippable(9, "s"), l), g[:50], z[:50], l[:50]} {
		f.Add(seed, uint16(64))
	}
	f.Fuzz(func(t *testing.T, in []byte, step uint16) {
		const most = 8 << 20 // a bomb is read this far
		src := &counting{r: bytes.NewReader(in)}
		r, err := NewReader(t.Context(), src)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("NewReader: %v", err)
			}
			return
		}
		defer closed(t, r)
		buf := make([]byte, int(step)+1)
		for total := 0; total < most; {
			n, err := r.Read(buf)
			if n < 0 || n > len(buf) {
				t.Fatalf("read %d into %d", n, len(buf))
			}
			total += n
			if errors.Is(err, io.EOF) {
				if n := src.n.Load(); n != int64(len(in)) {
					t.Fatalf("end after %d of %d bytes", n, len(in))
				}
				return
			}
			if err != nil {
				if !errors.Is(err, ErrCorrupt) {
					t.Fatalf("error without ErrCorrupt: %v", err)
				}
				return
			}
		}
	})
}

// both decodes in with the reader and, as far, with the library's plain one, and
// fails where they differ. What the library takes for damage the reader must
// too; the other way round some is stricter here.
func both(t *testing.T, in []byte, workers int, plain io.Reader, stricter bool) {
	t.Helper()
	const most = 4 << 20
	want, plainErr := io.ReadAll(io.LimitReader(plain, most))
	r, err := NewReader(t.Context(), bytes.NewReader(in), withWorkers(workers))
	if err != nil {
		if !errors.Is(err, ErrCorrupt) || plainErr == nil && !stricter {
			t.Fatalf("NewReader: %v; the library: %v", err, plainErr)
		}
		return
	}
	defer closed(t, r)
	got, err := io.ReadAll(io.LimitReader(r, most))
	switch {
	case err != nil && !errors.Is(err, ErrCorrupt):
		t.Fatalf("error without ErrCorrupt: %v", err)
	case err == nil && plainErr != nil:
		t.Fatalf("accepted %d bytes, the library: %v", len(got), plainErr)
	case err != nil && plainErr == nil && !stricter:
		t.Fatalf("%v, the library accepts %d bytes", err, len(want))
	case err == nil && !bytes.Equal(got, want):
		t.Fatalf("%d bytes, the library has %d others", len(got), len(want))
	case err != nil && !bytes.HasPrefix(want, got) && !bytes.HasPrefix(got, want):
		t.Fatalf("%d bytes before the error, the library has %d others", len(got), len(want))
	}
}

func FuzzZstd(f *testing.F) {
	data := sample(3000)
	one, sized, open := zst(f, data), zst(f, data, zstd.WithSingleSegment(true)), streamed(f, data)
	for _, seed := range [][]byte{one, sized, open, join(one, sized), join(open, open, open), join(skippable(3, "x"), open, skippable(4, ""), one), repeated(3), open[:100]} {
		f.Add(seed, uint8(2))
	}
	f.Fuzz(func(t *testing.T, in []byte, workers uint8) {
		if format, skip := identify(in[:min(8, len(in))]); format != Zstd && !skip {
			return
		}
		plain, err := zstd.NewReader(bytes.NewReader(in), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(false),
			zstd.WithDecodeBuffersBelow(0), zstd.WithDecoderMaxWindow(MaxWindow), zstd.WithDecoderMaxMemory(MaxWindow))
		if err != nil {
			t.Fatal(err)
		}
		defer plain.Close()
		// The library takes a stream that ends within a magic or a skippable frame for complete.
		both(t, in, int(workers%4)+1, plain, true)
	})
}

func FuzzLZ4(f *testing.F) {
	data := sample(3000)
	for _, seed := range [][]byte{
		lz(f, data), lz(f, data, lz4.BlockChecksumOption(true), lz4.SizeOption(uint64(len(data)))), linkedFrame(data), lz(f, data, lz4.LegacyOption(true)),
		join(lz(f, data[:9]), skippable(2, "y"), linkedFrame(data)), join(lz4Header(1<<6|1<<5, 4<<4), u32(1<<31|2), []byte("ab"), u32(0)),
	} {
		f.Add(seed, uint8(2))
	}
	f.Fuzz(func(t *testing.T, in []byte, workers uint8) {
		if format, _ := identify(in[:min(8, len(in))]); format != LZ4 {
			return
		}
		both(t, in, int(workers%4)+1, lz4.NewReader(bytes.NewReader(in)), true)
	})
}

// FuzzApple compares with the library's reader of the LZ4 frame format, which is
// given the same blocks in a frame of linked ones. So blocks hold 64 KiB at most.
func FuzzApple(f *testing.F) {
	data := sample(200 << 10)
	f.Add(apple(data, 64<<10), uint8(1))
	f.Add(apple(data[:3000], 100), uint8(2))
	f.Add(join([]byte(appleStored), u32(2), []byte("ab"), []byte(appleBlock), u32(5), u32(4), []byte{0x10, 'x', 3, 0}, []byte(appleEnd)), uint8(1))
	f.Fuzz(func(t *testing.T, in []byte, workers uint8) {
		if format, _ := identify(in[:min(8, len(in))]); format != AppleLZ4 {
			return
		}
		frame, ok := reframed(in)
		if !ok {
			_, _ = drain(t.Context(), bytes.NewReader(in)) // must only end
			return
		}
		both(t, in, int(workers%4)+1, lz4.NewReader(bytes.NewReader(frame)), true)
	})
}

// reframed makes an LZ4 frame of a stream in Apple's framing, if its structure is right.
func reframed(in []byte) ([]byte, bool) {
	out := lz4Header(1<<6, 4<<4)
	for len(in) >= 8 {
		length, size := 8, int(le32(in[4:]))
		if string(in[:4]) == appleBlock && len(in) >= 12 {
			length, size = 12, int(le32(in[8:]))
		}
		if kind := string(in[:4]); kind != appleBlock && kind != appleStored || size > 64<<10 || size == 0 || len(in) < length+size || le32(in[4:]) > 64<<10 {
			break
		}
		word := uint32(size)
		if length == 8 {
			word |= 1 << 31
		}
		out = join(out, u32(int(word)), in[length:length+size])
		in = in[length+size:]
	}
	return append(out, 0, 0, 0, 0), len(in) >= 4 && string(in[:4]) == appleEnd
}

func le32(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}
