package deflate

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/gantryd/gantry/integration/short"
)

// mixed writes data as one member made of blocks of all types, with matches that
// reach from one into the other, and some empty blocks.
func mixed(t testing.TB, r *rand.Rand, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	b.Write(header(0, "", "", ""))
	for at := 0; ; {
		n := min(len(data)-at, r.IntN(1<<(4+r.IntN(13))))
		level := []int{flate.HuffmanOnly, 0, 0, 1, 5, 6, 9}[r.IntN(7)]
		w, err := flate.NewWriterDict(&b, level, data[max(0, at-windowSize):at])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data[at : at+n]); err != nil {
			t.Fatal(err)
		}
		at += n
		end := w.Flush
		if at == len(data) {
			end = w.Close
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if at == len(data) {
			break
		}
	}
	return appendTrailer(b.Bytes(), data)
}

func appendTrailer(b, data []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(data))
	return binary.LittleEndian.AppendUint32(b, uint32(len(data)))
}

var blendKinds = sync.OnceValue(func() [][]byte {
	return [][]byte{prose(70_000), noise(70_000, false), noise(70_000, true), make([]byte, 70_000), bytes.Repeat([]byte("ab"), 35_000)}
})

// blend is data of all kinds in patches.
func blend(r *rand.Rand, n int) []byte {
	kinds := blendKinds()
	var out []byte
	for len(out) < n {
		k := kinds[r.IntN(len(kinds))]
		lo := r.IntN(len(k))
		out = append(out, k[lo:min(len(k), lo+r.IntN(40_000))]...)
		if len(out) > 40_000 && r.IntN(3) == 0 { // far matches
			back := windowSize - r.IntN(40)
			out = append(out, out[len(out)-back:len(out)-back+300]...)
		}
	}
	return out[:n]
}

func TestMixedBlocks(t *testing.T) {
	t.Parallel()
	for seed := range uint64(short.Size(12, 4)) {
		r := rand.New(rand.NewPCG(seed, 1))
		data := blend(r, 1+r.IntN(700_000))
		in := mixed(t, r, data)
		if seed%3 == 0 {
			more := blend(r, r.IntN(300_000))
			data, in = append(data, more...), append(in, mixed(t, r, more)...)
		}
		sameInAllLayouts(t, in, data, nil)
		if out, ok := gunzip(t, in); !ok || !bytes.Equal(out, data) {
			t.Fatalf("seed %d: gzip(1) does not agree", seed)
		}
	}
}

// storedMember wraps data in stored blocks of the given size, which begin at odd
// bits: in front of each stands an empty block with fixed codes (10 bits).
func storedMember(data []byte, size int) []byte {
	b := header(0, "", "", "")
	all := data
	for len(data) > 0 {
		n := min(size, len(data))
		// 3 bits header (01 fixed, not final), 7 bits end of block, 3 bits stored header, padding.
		b = append(b, 0b010, 0)
		b = binary.LittleEndian.AppendUint16(b, uint16(n))
		b = binary.LittleEndian.AppendUint16(b, ^uint16(n))
		b = append(b, data[:n]...)
		data = data[n:]
	}
	b = append(b, 0b011, 0) // final, fixed, empty
	return appendTrailer(b, all)
}

// TestPlanted hides gzip streams in stored blocks: their headers, blocks and
// trailers look true where they stand, and are not.
func TestPlanted(t *testing.T) {
	t.Parallel()
	inner := join(tiny(t, prose(100_000), 3000), squeezeGzip(t, prose(900_000), 6), squeezeGzip(t, noise(50_000, false), 0))
	twice := squeezeGzip(t, inner, 0)
	tests := map[string]struct{ in, data []byte }{
		"gzip in stored":           {squeezeGzip(t, inner, 0), inner},
		"gzip in stored in stored": {squeezeGzip(t, twice, 0), twice},
		"compressed again":         {squeezeGzip(t, inner, 9), inner},
		"odd bits":                 {storedMember(inner, 5000), inner},
		"odd bits, short":          {storedMember(inner, 90), inner},
		"odd bits, long":           {storedMember(inner, 65535), inner},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sameInAllLayouts(t, test.in, test.data, nil)
		})
	}
}

// TestGuessesAreChecked makes sure that the tests above meet right and wrong guesses.
func TestGuessesAreChecked(t *testing.T) {
	t.Parallel()
	var sum counts
	text := squeezeGzip(t, prose(3_000_000), 1)
	planted := squeezeGzip(t, text, 0)
	for round := 0; sum.right == 0 || sum.wrong == 0 || sum.late == 0 || sum.resolved == 0; round++ {
		if round == 1000 { // which ones depends on who runs when
			t.Fatalf("%+v", sum)
		}
		for _, in := range [][]byte{text, planted} {
			r, err := NewReaderAt(bytes.NewReader(in), WithWorkers(4), withSizes(60_000, 3*smallSlab, 8))
			if err != nil {
				t.Fatal(err)
			}
			for {
				_, release, err := r.Next()
				if err != nil {
					break
				}
				release()
			}
			c := r.e.counts
			sum.right, sum.wrong, sum.late, sum.resolved = sum.right+c.right, sum.wrong+c.wrong, sum.late+c.late, sum.resolved+c.resolved
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// mutateGzip damages in at a few places.
func mutateGzip(r *rand.Rand, in []byte) []byte {
	in = bytes.Clone(in)
	for range 1 + r.IntN(3) {
		if len(in) == 0 {
			return in
		}
		at := r.IntN(len(in))
		switch r.IntN(5) {
		case 0:
			in[at] ^= 1 << r.IntN(8)
		case 1:
			in = in[:at]
		case 2:
			in = append(in[:at], in[min(len(in), at+1+r.IntN(20)):]...)
		case 3:
			lo := r.IntN(len(in))
			in = join(in[:at], in[lo:min(len(in), lo+r.IntN(3000))], in[at:])
		default:
			in[at] = byte(r.Uint32())
		}
	}
	return in
}

func TestMutatedMembers(t *testing.T) {
	t.Parallel()
	for seed := range uint64(short.Size(40, 6)) {
		r := rand.New(rand.NewPCG(seed, 2))
		in := mixed(t, r, blend(r, 1+r.IntN(200_000)))
		if seed%2 == 0 {
			in = join(in, tiny(t, prose(60_000), 1+r.IntN(5000)), mixed(t, r, blend(r, 100_000)))
		}
		likeGzip(t, mutateGzip(r, in))
	}
}
