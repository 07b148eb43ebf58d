package deflate

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/gantryd/gantry/integration/short"
)

// echoes is noise in stored blocks, with coded blocks between that copy from the
// far end of the window, in two members.
func echoes(t *testing.T) (in, want []byte) {
	t.Helper()
	rest := noise(8_000_000, false)
	var first []byte
	for _, n := range []int{700_000, 90_000, 131_000, 33_000, 400_000, 32_000, 170_000, 60_000, 110_000, 220_000} {
		first = append(first, rest[:n]...)
		first = append(first, first[len(first)-windowSize+10:][:20_000]...)
		rest = rest[n:]
	}
	return join(squeezeGzip(t, first, 6), squeezeGzip(t, rest, 0)), join(first, rest)
}

// withoutDirect never reads stored blocks directly.
func withoutDirect(c *config) { c.direct = 1 << 30 }

func decodeCounting(t *testing.T, src io.Reader, opts ...Option) ([]byte, counts, error) {
	t.Helper()
	r, err := NewReader(src, opts...)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return got, r.e.counts, err
}

// TestDirect: runs of stored blocks are read from the source to where they are
// wanted, and windows reach into them.
func TestDirect(t *testing.T) {
	t.Parallel()
	in, want := echoes(t)
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			for name, src := range map[string]io.Reader{
				"whole":  bytes.NewReader(in),
				"halves": iotest.HalfReader(bytes.NewReader(in)),
				"EOF":    iotest.DataErrReader(bytes.NewReader(in)),
			} {
				got, n, err := decodeCounting(t, src, l.opts...)
				if err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s: %d bytes, equal up to %d, %v", name, len(got), common(got, want), err)
				}
				if n.direct == 0 {
					t.Errorf("%s: nothing was read directly", name)
				}
			}
		})
	}
}

// TestDirectDamage: wherever the source ends, fails or is damaged, the bytes and
// the error are those without direct reads.
func TestDirectDamage(t *testing.T) {
	t.Parallel()
	data := noise(400_000, false)
	in := squeezeGzip(t, data, 0)
	const block = 65535 + storedHead
	direct := []Option{WithWorkers(1), withSizes(9000, smallSlab, 2)}
	check := func(what string, src func() io.Reader) {
		t.Helper()
		want, n, wantErr := decodeCounting(t, src(), append(direct, withoutDirect)...)
		got, m, err := decodeCounting(t, src(), direct...)
		if !bytes.Equal(got, want) || !sameError(err, wantErr) || n.direct > 0 || m.direct == 0 {
			t.Errorf("%s: %d bytes, %v, %d direct runs; else %d bytes, %v", what, len(got), err, m.direct, len(want), wantErr)
		}
	}
	for _, at := range []int{2*block + headerSize, 3*block + headerSize - 70, len(in) - 12, len(in) - 4} {
		for i := at - 7; i < at+7 && i < len(in); i += short.Size(1, 3) {
			check("cut", func() io.Reader { return bytes.NewReader(in[:i]) })
			failing := errors.New("failing")
			check("fails", func() io.Reader { return io.MultiReader(bytes.NewReader(in[:i]), iotest.ErrReader(failing)) })
			bad := bytes.Clone(in)
			bad[i] ^= 0x15
			check("damaged", func() io.Reader { return bytes.NewReader(bad) })
		}
	}
}
