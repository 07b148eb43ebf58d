package decompress

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// TestZstdFramesOfWholeBlocks has frames that fill their last block, nearly or
// with a byte more, in batches: each is decoded into what the one before left.
func TestZstdFramesOfWholeBlocks(t *testing.T) {
	t.Parallel()
	const most = 2 << 20
	noise := make([]byte, most)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(noise)
	for name, data := range map[string][]byte{"mixed": sample(most), "noise": noise, "zeros": make([]byte, most)} {
		for _, size := range []int{zstdBlock - 1, zstdBlock, zstdBlock + 1, 3 * zstdBlock, 9*zstdBlock - 1} {
			t.Run(fmt.Sprintf("%s/%d", name, size), func(t *testing.T) {
				t.Parallel()
				var want, in []byte
				for at := 0; at+size <= len(data); at += size {
					want = append(want, data[at:at+size]...)
					in = append(in, streamed(t, data[at:at+size])...)
					in = append(in, zst(t, data[at:at+size])...)
					want = append(want, data[at:at+size]...)
				}
				for _, workers := range []int{1, 2} {
					r, err := NewReader(t.Context(), bytes.NewReader(in), withWorkers(workers))
					if err != nil {
						t.Fatal(err)
					}
					if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
						t.Errorf("%d workers: %d bytes, error %v; want %d", workers, len(got), err, len(want))
					}
					closed(t, r)
				}
			})
		}
	}
}

// TestZstdOutputStaysInItsBuffer gives a batch less room than its frames need,
// which the library meets with memory of its own.
func TestZstdOutputStaysInItsBuffer(t *testing.T) {
	t.Parallel()
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	data := sample(300 << 10)
	first, second := streamed(t, data[:1000]), streamed(t, data)
	for _, room := range []int{1000, 2000, 200 << 10} {
		b := &zstdBatch{ends: []int{len(first), len(first) + len(second)}}
		j := &job{in: &buffer{b: join(first, second)}, out: &buffer{b: make([]byte, room)}}
		if n, err := b.run(dec)(j); n > room || !errors.Is(err, errZstdMoved) {
			t.Errorf("%d bytes into %d, error %v; want %v", n, room, err, errZstdMoved)
		}
	}
}

// TestZstdStreamKeepsItsDecoder has frames one after the other that are decoded
// as streams, with the windows of zstd's levels up to 19.
func TestZstdStreamKeepsItsDecoder(t *testing.T) {
	t.Parallel()
	mem, err := newMemory(t.Context(), NewBudget(DefaultBudget), idleHere)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.close()
	frame := windowed(t, sample(3<<20), 8<<20)
	z := newZstdPlanner(bufio.NewReader(bytes.NewReader(bytes.Repeat(frame, 3))), mem, 1)
	defer z.close()
	var kept *zstd.Decoder
	for {
		j, err := z.plan(true)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		j.free()
		if kept == nil {
			kept = z.stream.dec
		}
		if kept == nil || z.stream.dec != kept {
			t.Fatalf("decoder %p, before %p", z.stream.dec, kept)
		}
	}
	if held := mem.budget.Held(); held > overhead+baseBlocks+smallWindow {
		t.Errorf("%d bytes are held between frames", held)
	}
}
