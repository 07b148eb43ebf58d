package deflate

import (
	"bytes"
	"compress/flate"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

// fuzzLimit bounds the output that a fuzzed input may ask for.
const fuzzLimit = 4 << 20

// inflateLimited stops after limit bytes; over says that there was more.
func inflateLimited(in []byte, limit int, opts ...Option) (out []byte, over bool, err error) {
	r, err := NewReaderAt(bytes.NewReader(in), opts...)
	if err != nil {
		return nil, false, err
	}
	out, err = io.ReadAll(io.LimitReader(r, int64(limit)))
	return out, len(out) == limit, errors.Join(err, r.Close())
}

// FuzzReader holds parallel against serial decoding, of streams of any kind.
func FuzzReader(f *testing.F) {
	r := rand.New(rand.NewPCG(9, 9))
	f.Add(mixed(f, r, blend(r, 60_000)), uint16(700))
	f.Add(join(squeezeGzip(f, prose(40_000), 6), tiny(f, prose(9000), 700)), uint16(1000))
	f.Add(squeezeGzip(f, squeezeGzip(f, prose(60_000), 6), 0), uint16(2000))
	f.Add(squeezeGzip(f, make([]byte, 2<<20), 9), uint16(300))
	f.Fuzz(func(t *testing.T, in []byte, chunk uint16) {
		want, over, wantErr := inflateLimited(in, fuzzLimit, WithWorkers(1))
		got, _, err := inflateLimited(in, fuzzLimit, WithWorkers(1+2*int(chunk&1)), withSizes(max(64, int(chunk)), smallSlab, 3))
		if !bytes.Equal(got, want) || !over && !sameError(err, wantErr) {
			t.Fatalf("chunks of %d: %d bytes, %v; serial %d bytes, %v", chunk, len(got), err, len(want), wantErr)
		}
	})
}

// FuzzBlocks takes the input for raw DEFLATE and holds it against compress/flate.
func FuzzBlocks(f *testing.F) {
	r := rand.New(rand.NewPCG(8, 8))
	for _, n := range []int{0, 100, 50_000} {
		in := mixed(f, r, blend(r, n+1))
		f.Add(in[headerSize:len(in)-trailerSize], uint16(500))
	}
	f.Fuzz(func(t *testing.T, raw []byte, chunk uint16) {
		fr := flate.NewReader(bytes.NewReader(raw))
		want, wantErr := io.ReadAll(io.LimitReader(fr, fuzzLimit))
		in := appendTrailer(join(header(0, "", "", ""), raw), want)
		got, over, err := inflateLimited(in, fuzzLimit, WithWorkers(1+int(chunk&1)), withSizes(max(64, int(chunk)), smallSlab, 3))
		n := min(len(got), len(want))
		switch {
		case !bytes.Equal(got[:n], want[:n]):
			t.Fatalf("differs from compress/flate at %d", common(got, want))
		case over || len(want) == fuzzLimit:
		case wantErr == nil && len(got) < len(want):
			t.Fatalf("%d bytes, %v; compress/flate %d", len(got), err, len(want))
		case wantErr != nil && err == nil && len(got) != len(want):
			t.Fatalf("%d bytes without an error; compress/flate %d, %v", len(got), len(want), wantErr)
		}
	})
}
