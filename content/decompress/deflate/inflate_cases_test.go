package deflate

import (
	"bytes"
	"compress/flate"
	"errors"
	"io"
	"strings"
	"testing"
)

// bitWriter writes a stream by hand.
type bitWriter struct {
	b   []byte
	bit uint
}

// put writes n bits of v, the lowest first, as extra bits and headers are.
func (w *bitWriter) put(v, n uint) *bitWriter {
	for i := range n {
		if w.bit&7 == 0 {
			w.b = append(w.b, 0)
		}
		w.b[len(w.b)-1] |= byte(v>>i&1) << (w.bit & 7)
		w.bit++
	}
	return w
}

// code writes n bits of v, the highest first, as Huffman codes are.
func (w *bitWriter) code(v, n uint) *bitWriter {
	for i := range n {
		w.put(v>>(n-1-i)&1, 1)
	}
	return w
}

// fixed writes a literal/length symbol of the fixed code.
func (w *bitWriter) fixed(sym uint) *bitWriter {
	switch {
	case sym < 144:
		return w.code(0x30+sym, 8)
	case sym < 256:
		return w.code(0x190+sym-144, 9)
	case sym < 280:
		return w.code(sym-256, 7)
	}
	return w.code(0xc0+sym-280, 8)
}

// stored writes a stored block with the given complement.
func (w *bitWriter) stored(final uint, data []byte, complement uint) *bitWriter {
	w.put(final, 1).put(0, 2)
	for w.bit&7 != 0 {
		w.put(0, 1)
	}
	w.put(uint(len(data)), 16).put(complement, 16)
	for _, b := range data {
		w.put(uint(b), 8)
	}
	return w
}

// dynamic writes a header whose code lengths are plain: each of 0 to 15 takes four bits.
func (w *bitWriter) dynamic(lit, dist map[int]uint, nlit, ndist int) *bitWriter {
	w.put(1, 1).put(2, 2).put(uint(nlit-257), 5).put(uint(ndist-1), 5).put(15, 4)
	for _, sym := range lengthOrder {
		if sym < 16 {
			w.put(4, 3)
		} else {
			w.put(0, 3)
		}
	}
	for i := range nlit {
		w.code(lit[i], 4)
	}
	for i := range ndist {
		w.code(dist[i], 4)
	}
	return w
}

func ramp(from, to int, l uint) map[int]uint {
	m := map[int]uint{}
	for i := from; i < to; i++ {
		m[i] = l
	}
	return m
}

func bw() *bitWriter { return new(bitWriter) }

// pre writes a dynamic header up to its code length code, which has the lengths given for symbols 16, 17, 18, 0.
func pre(lens ...uint) *bitWriter {
	w := bw().put(1, 1).put(2, 2).put(0, 5).put(0, 5).put(0, 4)
	for _, l := range lens {
		w.put(l, 3)
	}
	return w
}

var abEnd = map[int]uint{'a': 2, 'b': 2, 256: 2, 257: 2}

var cases = []struct {
	name string
	w    *bitWriter
	want string
	err  error
}{
	{"fixed, empty", bw().put(1, 1).put(1, 2).fixed(256), "", nil},
	{"fixed, literals of 8 and 9 bits", bw().put(1, 1).put(1, 2).fixed('a').fixed(200).fixed('b').fixed(256), "a\xc8b", nil},
	{"fixed, run", bw().put(1, 1).put(1, 2).fixed('a').fixed(257).code(0, 5).fixed(256), "aaaa", nil},
	{"length 258 as 227+31", bw().put(1, 1).put(1, 2).fixed('a').fixed(284).put(31, 5).code(0, 5).fixed(256), string(bytes.Repeat([]byte("a"), 259)), nil},
	{"fixed, symbol 286", bw().put(1, 1).put(1, 2).fixed('a').fixed(286).code(0, 5).fixed(256), "a", errSymbol},
	{"fixed, symbol 287", bw().put(1, 1).put(1, 2).fixed('a').fixed(287).code(0, 5).fixed(256), "a", errSymbol},
	{"fixed, distance code 30", bw().put(1, 1).put(1, 2).fixed('a').fixed(257).code(30, 5).fixed(256), "a", errDistance},
	{"fixed, distance code 31", bw().put(1, 1).put(1, 2).fixed('a').fixed(257).code(31, 5).fixed(256), "a", errDistance},
	{"distance before the first byte", bw().put(1, 1).put(1, 2).fixed(257).code(0, 5).fixed(256), "", errTooFar},
	{"distance one too far", bw().put(1, 1).put(1, 2).fixed('a').fixed('b').fixed(257).code(2, 5).fixed(256), "ab", errTooFar},
	{"block type 3", bw().put(1, 1).put(3, 2).put(0, 32), "", errBlockType},
	{"stored, empty", bw().stored(1, nil, 0xffff), "", nil},
	{"stored, three blocks", bw().stored(0, []byte("abc"), 0xfffc).stored(0, nil, 0xffff).stored(1, []byte("d"), 0xfffe), "abcd", nil},
	{"stored, complement wrong", bw().stored(1, []byte("abc"), 0xfffd), "", errStoredLength},
	{"stored behind fixed, at each offset", bw().put(0, 1).put(1, 2).fixed('a').fixed(200).fixed(256).stored(0, []byte("b"), 0xfffe).put(0, 1).put(1, 2).fixed(256).
		stored(0, []byte("c"), 0xfffe).put(0, 1).put(1, 2).fixed(200).fixed(201).fixed(256).stored(1, []byte("d"), 0xfffe), "a\xc8bc\xc8\xc9d", nil},
	{"dynamic", bw().dynamic(abEnd, map[int]uint{0: 1, 1: 1}, 258, 2).code(0, 2).code(1, 2).code(3, 2).code(1, 1).code(2, 2), "ababa", nil},
	{"one distance code", bw().dynamic(abEnd, map[int]uint{0: 1}, 258, 1).code(0, 2).code(3, 2).code(0, 1).code(2, 2), "aaaa", nil},
	{"one distance code, the other one used", bw().dynamic(abEnd, map[int]uint{0: 1}, 258, 1).code(0, 2).code(3, 2).code(1, 1).code(2, 2), "a", errDistance},
	{"one distance code of two bits", bw().dynamic(abEnd, map[int]uint{0: 2}, 258, 1).code(0, 2).code(2, 2), "", errIncomplete},
	{"no distance code", bw().dynamic(abEnd, nil, 258, 1).code(0, 2).code(1, 2).code(2, 2), "ab", nil},
	{"no distance code, but a match", bw().dynamic(abEnd, nil, 258, 1).code(0, 2).code(3, 2).code(0, 1).code(2, 2), "a", errDistance},
	{"incomplete distances", bw().dynamic(abEnd, map[int]uint{0: 2, 1: 2}, 258, 2).code(2, 2), "", errIncomplete},
	{"over-subscribed distances", bw().dynamic(abEnd, map[int]uint{0: 1, 1: 1, 2: 1}, 258, 3).code(2, 2), "", errOversubscribed},
	{"only the end", bw().dynamic(map[int]uint{256: 1}, nil, 257, 1).code(0, 1), "", nil},
	{"only the end, the other code used", bw().dynamic(map[int]uint{256: 1}, nil, 257, 1).code(1, 1), "", errSymbol},
	{"only the end, of two bits", bw().dynamic(map[int]uint{256: 2}, nil, 257, 1).code(0, 2), "", errIncomplete},
	{"incomplete literals", bw().dynamic(map[int]uint{'a': 2, 'b': 2, 256: 2}, nil, 257, 1).code(2, 2), "", errIncomplete},
	{"over-subscribed literals", bw().dynamic(ramp(0, 257, 8), nil, 257, 1).code(0, 8), "", errOversubscribed},
	{"no end of block", bw().dynamic(map[int]uint{'a': 1, 'b': 1}, nil, 257, 1).code(0, 1).code(1, 1), "", errNoEnd},
	{"no code at all", bw().dynamic(nil, nil, 257, 1).code(0, 1), "", errNoEnd},
	{"287 literal codes", bw().dynamic(ramp(0, 256, 8), nil, 287, 1), "", errTooMany},
	{"31 distance codes", bw().dynamic(abEnd, nil, 258, 31), "", errTooMany},
	{"code length code incomplete", pre(2, 2, 2, 0).put(0, 600), "", errIncomplete},
	{"code length code of one symbol", pre(0, 0, 1, 0).put(0, 600), "", errIncomplete},
	{"code length code over-subscribed", pre(1, 1, 1, 0).put(0, 600), "", errOversubscribed},
	{"repeat without a length before", pre(1, 0, 1, 0).put(0, 600), "", errRepeat},
	{"repeat beyond the last length", pre(0, 0, 1, 1).put(1, 1).put(127, 7).put(1, 1).put(127, 7).put(0, 600), "", errRepeat},
}

// TestCases decodes each case bare (checked decoder) and with bytes behind it (fast loop), with bytes and with markers, at
// each bit offset, and asks compress/flate for its verdict.
func TestCases(t *testing.T) {
	t.Parallel()
	for _, c := range cases {
		_, err := io.ReadAll(flate.NewReader(bytes.NewReader(append(bytes.Clone(c.w.b), make([]byte, 700)...))))
		if (err != nil) != (c.err != nil) {
			t.Errorf("%s: want %v, compress/flate has %v", c.name, c.err, err)
		}
		for _, behind := range []int{0, 100} {
			for offset := range uint(8) {
				if offset > 0 && strings.HasPrefix(c.name, "stored") {
					break // its padding depends on the offset
				}
				in := bw().put(0x55, offset)
				for i := range c.w.bit {
					in.put(uint(c.w.b[i/8]>>(i%8)), 1)
				}
				raw := append(in.b, make([]byte, behind)...)
				checkCase(t, c.name, raw, offset, int64(in.bit), c.want, c.err)
			}
		}
	}
}

func checkCase(t *testing.T, name string, raw []byte, offset uint, end int64, want string, wantErr error) {
	t.Helper()
	var f inflater
	f.reset(raw, int64(offset))
	f.extend(raw, 0, true)
	out := make([]byte, 2000)
	n, st, err := f.decode(out, 0, -1)
	if !errors.Is(err, wantErr) || string(out[:n]) != want || err == nil && (st != ended || f.bit() != end) {
		t.Errorf("%s, offset %d: got %q, status %d at bit %d, %v; want %q, bit %d, %v", name, offset, out[:n], st, f.bit(), err, want, end, wantErr)
	}
	if errors.Is(wantErr, errTooFar) {
		return
	}
	f.reset(raw, int64(offset))
	f.extend(raw, 0, true)
	out16 := make([]uint16, 2000)
	n, clean, st, err := f.decodeMarked(out16, 0, -1)
	if !errors.Is(err, wantErr) || string(resolve(out16[:n], nil)) != want || clean != 0 || err == nil && (st != ended || f.bit() != end) {
		t.Errorf("%s, offset %d, marked: got %q, %v", name, offset, resolve(out16[:n], nil), err)
	}
}

// TestWindowEdge copies from exactly 32 KiB back, over the edge of what is known, with and without a window.
func TestWindowEdge(t *testing.T) {
	t.Parallel()
	window := corpus(windowSize)["noise"]
	for _, known := range []int{0, 1, 2, 257, 258, 259, 32767, 32768} {
		for _, dist := range []int{1, 2, 3, 7, 8, 15, 16, 17, 256, 257, 258, 32767, 32768} {
			for _, length := range []int{3, 4, 10, 11, 17, 64, 130, 257, 258} {
				w := bw().put(1, 1).put(1, 2).fixed('x').fixed('y')
				match(w, length, dist).fixed('z').fixed(256).put(0, 800)
				edge(t, w.b, window[:known], dist, length)
			}
		}
	}
}

// match writes one with the fixed codes.
func match(w *bitWriter, length, dist int) *bitWriter {
	l := len(lengthBase) - 1
	for int(lengthBase[l]) > length {
		l--
	}
	w.fixed(uint(257+l)).put(uint(length)-uint(lengthBase[l]), uint(lengthExtra[l]))
	d, base, extra := uint(0), 1, uint(0)
	for {
		next := base + 1<<extra
		if dist < next {
			break
		}
		d, base = d+1, next
		if d >= 4 {
			extra = d/2 - 1
		}
	}
	return w.code(d, 5).put(uint(dist-base), extra)
}

func edge(t *testing.T, raw, window []byte, dist, length int) {
	t.Helper()
	want := append(bytes.Clone(window), "xy"...)
	ok := dist <= len(want)
	for range length {
		if ok {
			want = append(want, want[len(want)-dist])
		}
	}
	var f inflater
	f.reset(raw, 0)
	f.extend(raw, 0, true)
	out := append(bytes.Clone(window), make([]byte, 1000)...)
	n, _, err := f.decode(out, len(window), -1)
	if ok && (err != nil || !bytes.Equal(out[:n], append(want, 'z'))) || !ok && !errors.Is(err, errTooFar) {
		t.Fatalf("window %d, distance %d, length %d: %d bytes, %v", len(window), dist, length, n, err)
	}
	f.reset(raw, 0)
	f.extend(raw, 0, true)
	out16 := make([]uint16, 1000)
	n, _, _, err = f.decodeMarked(out16, 0, -1)
	if err != nil || ok && !bytes.Equal(resolve(out16[:n], window), append(want, 'z')[len(window):]) {
		t.Fatalf("window %d, distance %d, length %d, marked: %v", len(window), dist, length, err)
	}
}
