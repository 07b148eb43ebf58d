package deflate

import (
	"bytes"
	"compress/flate"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/gantryd/gantry/integration/short"
)

const fuzzOutput = 1 << 18

// seeds are whole streams, each block type among them, and broken ones.
func seeds() [][]byte {
	var all [][]byte
	r := rand.New(rand.NewPCG(3, 5))
	data := corpus(2000)
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for name := range data {
			if !yield(name) {
				return
			}
		}
	}) {
		for _, level := range []int{-2, 0, 1, 6, 9} {
			var b bytes.Buffer
			w, err := flate.NewWriter(&b, level)
			if err != nil {
				panic(err)
			}
			_, _ = w.Write(data[name][:len(data[name])/2])
			_ = w.Flush()
			_, _ = w.Write(data[name][len(data[name])/2:])
			_ = w.Close()
			all = append(all, b.Bytes(), mutate(r, b.Bytes()), mutate(r, b.Bytes()))
		}
	}
	for _, c := range cases {
		all = append(all, c.w.b)
	}
	return all
}

// mutate flips bits, overwrites, cuts out or repeats something of raw.
func mutate(r *rand.Rand, raw []byte) []byte {
	b := bytes.Clone(raw)
	for range 1 + r.IntN(3) {
		if len(b) < 2 {
			break
		}
		i := r.IntN(len(b))
		j := i + r.IntN(min(40, len(b)-i))
		switch r.IntN(4) {
		case 0:
			b[i] ^= 1 << r.IntN(8)
		case 1:
			b[i] = byte(r.Uint32())
		case 2:
			b = slices.Delete(b, i, j)
		default:
			b = slices.Insert(b, i, bytes.Clone(b[i:j])...)
		}
	}
	return b
}

// verdict holds decode's answer against compress/flate's: the same bytes, or an error of both, what came before it being
// bytes of the same stream.
func verdict(t *testing.T, raw []byte, in, out int) {
	t.Helper()
	want, wantErr := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(raw)), fuzzOutput))
	if len(want) == fuzzOutput {
		return
	}
	got, err := steps(raw, in, out)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("steps of %d and %d: %d bytes, %v; compress/flate: %d, %v", in, out, len(got), err, len(want), wantErr)
	}
	if err != nil {
		c := min(len(got), len(want))
		got, want = got[:c], want[:c]
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("steps of %d and %d: other bytes than compress/flate", in, out)
	}
}

func FuzzDecode(f *testing.F) {
	for i, s := range seeds() {
		f.Add(s, uint16(i), uint16(1000))
	}
	f.Fuzz(func(t *testing.T, raw []byte, in, out uint16) {
		if len(raw) > 1<<14 {
			return
		}
		verdict(t, raw, len(raw)+1, 1<<16)
		verdict(t, raw, int(in)+1, int(out)+1)
	})
}

// TestMutated is what FuzzDecode does, at some size, in each run of the tests.
func TestMutated(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(17, 19))
	for _, s := range seeds() {
		for range short.Size(15, 3) {
			raw := mutate(r, s)
			verdict(t, raw, len(raw)+1, 1<<16)
			verdict(t, raw, 1+r.IntN(200), 1+r.IntN(2000))
		}
	}
}

// bothWays decodes raw behind a window that is known, then without it until some value, from there on with it, and expects
// the same; it also stops at each block boundary there.
func bothWays(t *testing.T, raw, window []byte, at int) {
	t.Helper()
	var f inflater
	f.reset(raw, 0)
	f.extend(raw, 0, true)
	want := append(bytes.Clone(window), make([]byte, fuzzOutput)...)
	n, st, err := f.decode(want, windowSize, -1)
	if st == outFull {
		return
	}
	want = want[windowSize:n]
	var g inflater
	g.reset(raw, 0)
	g.extend(raw, 0, true)
	values := make([]uint16, at+outMargin)
	m := 0
	var st2 status
	var err2 error
	for stop := int64(1); ; stop = g.bit() + 1 {
		m, _, st2, err2 = g.decodeMarked(values, m, stop)
		if err2 != nil || st2 != atBlock {
			break
		}
	}
	got := resolve(values[:m], window)
	if err2 == nil && st2 == outFull {
		out := append(append(bytes.Clone(window), got...), make([]byte, fuzzOutput+2*outMargin)...)
		m, st2, err2 = g.decode(out, windowSize+m, -1)
		got = out[windowSize:m]
	}
	if !bytes.Equal(got, want) || st2 != st || (err == nil) != (err2 == nil) || f.bit() != g.bit() && err == nil {
		t.Fatalf("known window: %d bytes, status %d at bit %d, %v; marked until %d: %d bytes, status %d at bit %d, %v",
			len(want), st, f.bit(), err, at, len(got), st2, g.bit(), err2)
	}
}

func FuzzMarked(f *testing.F) {
	for i, s := range seeds() {
		f.Add(s, uint16(i*7))
	}
	window := corpus(windowSize)["noise"]
	f.Fuzz(func(t *testing.T, raw []byte, at uint16) {
		if len(raw) < 1<<14 {
			bothWays(t, raw, window, int(at))
		}
	})
}

// TestMarkedMutated is FuzzMarked for each run of the tests.
func TestMarkedMutated(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(23, 29))
	window := corpus(windowSize)["noise"]
	for _, s := range seeds() {
		for range short.Size(3, 1) {
			bothWays(t, mutate(r, s), window, r.IntN(3000))
		}
	}
}

// headerAgrees holds checkHeader against the decoder.
func headerAgrees(t *testing.T, f *inflater, raw []byte, bit int64) bool {
	t.Helper()
	got := checkHeader(raw, bit)
	want := false
	if peek(raw, bit)>>1&3 == 2 {
		f.reset(raw, bit)
		_, more, err := f.enter(-1)
		want = more && err == nil
	}
	if got != want {
		t.Fatalf("checkHeader at bit %d: %v, the decoder says %v", bit, got, want)
	}
	return got
}

func FuzzHeader(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var f inflater
		for bit := range int64(min(len(raw), 64)) * 8 {
			headerAgrees(t, &f, raw, bit)
		}
	})
}

func TestCheckHeader(t *testing.T) {
	t.Parallel()
	found := 0
	var f inflater
	for _, s := range seeds() {
		for bit := range int64(len(s)+2) * 8 {
			if headerAgrees(t, &f, s, bit) {
				found++
			}
		}
	}
	if found < 20 {
		t.Errorf("%d headers found in all seeds", found)
	}
}
