package deflate

import (
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/gantryd/gantry/integration/short"
)

// corpus is generated data of each kind that layers hold.
func corpus(n int) map[string][]byte {
	r := rand.New(rand.NewPCG(7, 11))
	noise := make([]byte, n)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	skewed := make([]byte, n) // long codes
	for i := range skewed {
		v := 0
		for v < 200 && r.IntN(2) == 0 {
			v++
		}
		skewed[i] = byte(v * 7)
	}
	words := strings.Fields("layer blob digest snapshot upper lower whiteout ingest frontier chunk range mount index tar member\nif err != nil { return }\n")
	var text bytes.Buffer
	for text.Len() < n {
		text.WriteString(words[r.IntN(len(words))])
		text.WriteByte(" \t\n"[r.IntN(3)])
	}
	far := make([]byte, 0, n+600) // matches at every distance up to the window's edge
	for len(far) < n {
		if l := len(far); l > 300 && r.IntN(4) > 0 {
			d := min(l, 1+r.IntN(32768))
			if r.IntN(2) == 0 {
				d = min(l, 32768)
			}
			for range 3 + r.IntN(256) {
				far = append(far, far[len(far)-d])
			}
		} else {
			for range 1 + r.IntN(30) {
				far = append(far, byte(r.Uint32()))
			}
		}
	}
	short := make([]byte, 0, n+600) // periods of 1 to 20 bytes
	for len(short) < n {
		p := 1 + r.IntN(20)
		for range p {
			short = append(short, byte(r.Uint32()))
		}
		for range 3 + r.IntN(400) {
			short = append(short, short[len(short)-p])
		}
	}
	mixed := bytes.Join([][]byte{text.Bytes()[:n/4], noise[:n/4], make([]byte, n/4), far[:n/4]}, nil)
	return map[string][]byte{
		"noise": noise, "skewed": skewed, "text": text.Bytes()[:n], "far": far[:n], "short": short[:n],
		"zeros": make([]byte, n), "mixed": mixed, "empty": {}, "one": {42},
	}
}

func squeeze(t testing.TB, data []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, level)
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// inflateAll decodes raw to the end in one piece, with an output that grows by grow.
func inflateAll(raw []byte, grow int) ([]byte, *inflater, error) {
	f := new(inflater)
	f.reset(raw, 0)
	f.extend(raw, 0, true)
	out := make([]byte, grow)
	n := 0
	for {
		var st status
		var err error
		n, st, err = f.decode(out, n, -1)
		if err != nil {
			return out[:n], f, err
		}
		switch st {
		case ended:
			return out[:n], f, nil
		case outFull:
			out = append(out, make([]byte, grow)...)
		default:
			return out[:n], f, fmt.Errorf("status %d at bit %d", st, f.bit())
		}
	}
}

func TestDecodeLevels(t *testing.T) {
	t.Parallel()
	for name, data := range corpus(short.Size(150_000, 40_000)) {
		for level := -2; level <= 9; level++ {
			raw := squeeze(t, data, level)
			got, f, err := inflateAll(raw, 70_000)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s, level %d: %d of %d bytes, error %v", name, level, len(got), len(data), err)
			}
			if used := (f.bit() + 7) / 8; used != int64(len(raw)) {
				t.Errorf("%s, level %d: ended at byte %d of %d", name, level, used, len(raw))
			}
		}
	}
}

// resolve replaces markers by the window's bytes; window ends right before out[0].
func resolve(values []uint16, window []byte) []byte {
	full := make([]byte, windowSize)
	copy(full[windowSize-len(window):], window)
	out := make([]byte, len(values))
	for i, v := range values {
		if v >= marker {
			out[i] = full[v&^marker]
		} else {
			out[i] = byte(v)
		}
	}
	return out
}

func TestDecodeMarked(t *testing.T) {
	t.Parallel()
	for name, data := range corpus(150_000) {
		raw := squeeze(t, data, 6)
		f := new(inflater)
		f.reset(raw, 0)
		f.extend(raw, 0, true)
		out := make([]byte, len(data)+outMargin)
		bound := int64(0)
		for n := 0; ; {
			var st status
			var err error
			if n, st, err = f.decode(out, n, bound); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if st == ended {
				break
			}
			marked(t, name, raw, f.bit(), data, n)
			bound = f.bit() + 1
		}
	}
}

// marked decodes raw from a block boundary, in pieces, and expects data[from:].
func marked(t *testing.T, name string, raw []byte, bit int64, data []byte, from int) {
	t.Helper()
	f := new(inflater)
	f.reset(raw, bit)
	f.extend(raw, 0, true)
	var out []uint16
	n := 0
	for {
		n2, clean, st, err := f.decodeMarked(out, n, -1)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		n = n2
		if want := lastMarker(out[:n]) + 1; clean != want {
			t.Fatalf("%s: clean from %d, want %d", name, clean, want)
		}
		if st == ended {
			break
		}
		out = append(out, make([]uint16, 10_000)...)
	}
	if got := resolve(out[:n], data[max(0, from-windowSize):from]); !bytes.Equal(got, data[from:]) {
		t.Fatalf("%s: from bit %d: other bytes", name, bit)
	}
}

// TestSteps feeds input and output in tiny steps.
func TestSteps(t *testing.T) {
	t.Parallel()
	for name, data := range corpus(4000) {
		for _, level := range []int{-2, 0, 1, 6, 9} {
			raw := squeeze(t, data, level)
			for _, step := range []int{1, 2, 3, 7, 61} {
				got, err := steps(raw, step, step)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("%s, level %d, step %d: %d of %d bytes, error %v", name, level, step, len(got), len(data), err)
				}
			}
		}
	}
}

// steps decodes raw with in more bytes of input and out more of output at a time; bytes that were used are dropped. What
// lies behind the slices it lends must neither be read (it changes) nor written.
func steps(raw []byte, in, out int) ([]byte, error) {
	const canary = 64
	f := new(inflater)
	f.reset(nil, 0)
	room := make([]byte, 4096)
	base, end, n, limit := 0, 0, 0, 0
	for {
		behind := room[limit : limit+canary]
		for i := range behind {
			behind[i] = 0xa5
		}
		var st status
		var err error
		n, st, err = f.decode(room[:limit:limit], n, -1)
		if bytes.Count(behind, []byte{0xa5}) != canary || n > limit {
			return nil, fmt.Errorf("wrote behind %d values of output", limit)
		}
		if err != nil || st == ended {
			return room[:n], err
		}
		if st == outFull {
			limit = n + outMargin - 1 + out
			for limit+canary > len(room) {
				room = append(room, make([]byte, len(room))...)
			}
			continue
		}
		drop := int(f.bit() / 8)
		base, end = base+drop, min(len(raw), end+in)
		f.extend(bytes.Clone(raw[base:end]), drop, end == len(raw))
	}
}

func TestTruncated(t *testing.T) {
	t.Parallel()
	for name, data := range corpus(1500) {
		raw := squeeze(t, data, 6)
		for cut := range raw {
			got, _, err := inflateAll(raw[:cut], 5000)
			want, wantErr := io.ReadAll(flate.NewReader(bytes.NewReader(raw[:cut])))
			if !errors.Is(err, errUnexpectedEOF) || !errors.Is(wantErr, io.ErrUnexpectedEOF) || !bytes.HasPrefix(data, got) || len(got) < len(want) {
				t.Fatalf("%s cut at %d: %d bytes, %v; compress/flate: %d bytes, %v", name, cut, len(got), err, len(want), wantErr)
			}
		}
	}
}
