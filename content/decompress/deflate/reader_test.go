package deflate

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"testing"

	"go.uber.org/goleak"

	"github.com/gantryd/gantry/integration/short"
)

// withSizes makes chunks and slabs small.
func withSizes(chunk, slab, slabs int) Option {
	return func(c *config) {
		c.first, c.chunk, c.least, c.slab, c.slabs, c.direct = chunk, chunk, chunk, slab, slabs, min(chunk, directLeast)
	}
}

func TestMain(m *testing.M) {
	strict = true
	goleak.VerifyTestMain(m)
}

// smallSlab is about the smallest slab that works.
const smallSlab = 2 * (windowSize + 4<<10)

// layouts are ways to cut the same stream.
var layouts = []struct {
	name string
	opts []Option
}{
	{"serial", []Option{WithWorkers(1)}},
	{"serial, small", []Option{WithWorkers(1), withSizes(700, smallSlab, 2)}},
	{"two", []Option{WithWorkers(2)}},
	{"two, 512 B", []Option{WithWorkers(2), withSizes(512, smallSlab, 2)}},
	{"two, 3000 B", []Option{WithWorkers(2), withSizes(3000, smallSlab, 4)}},
	{"two, 40000 B", []Option{WithWorkers(2), withSizes(40000, smallSlab, 8)}},
	{"four, 9000 B", []Option{WithWorkers(4), withSizes(9000, smallSlab, 3)}},
	{"eight, 1500 B", []Option{WithWorkers(8), withSizes(1500, smallSlab, 3)}},
	{"eight, 17000 B", []Option{WithWorkers(8), withSizes(17000, 3*smallSlab, 8)}},
}

func inflateGzip(in []byte, opts ...Option) ([]byte, error) {
	r, err := NewReaderAt(bytes.NewReader(in), opts...)
	if err != nil {
		return nil, err
	}
	out, err := io.ReadAll(r)
	return out, errors.Join(err, r.Close())
}

func squeezeGzip(t testing.TB, data []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestReaderLayouts(t *testing.T) {
	t.Parallel()
	for name, data := range corpus(short.Size(400_000, 100_000)) {
		for _, level := range []int{gzip.HuffmanOnly, 0, 1, 6, 9} {
			in := squeezeGzip(t, data, level)
			for _, l := range layouts {
				t.Run(fmt.Sprintf("%s/%d/%s", name, level, l.name), func(t *testing.T) {
					t.Parallel()
					got, err := inflateGzip(in, l.opts...)
					if err != nil || !bytes.Equal(got, data) {
						t.Fatalf("got %d bytes, %v; want %d (equal up to %d)", len(got), err, len(data), common(got, data))
					}
				})
			}
		}
	}
}

func common(a, b []byte) int {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}
