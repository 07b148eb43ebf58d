package decompress

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sample is half text, half noise, so that every format both matches and stores.
func sample(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	words := strings.Fields("layer blob digest snapshot upper lower whiteout ingest frontier chunk range mount index tar member")
	var b bytes.Buffer
	for b.Len() < n {
		for range 400 {
			b.WriteString(words[r.IntN(len(words))])
			b.WriteByte(' ')
		}
		for range 250 {
			_ = binary.Write(&b, binary.LittleEndian, r.Uint64())
		}
	}
	return b.Bytes()[:n]
}

func gz(t testing.TB, data []byte, header gzip.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, 6)
	if err != nil {
		t.Fatal(err)
	}
	w.Header = header
	return finish(t, &b, w, data)
}

func zst(t testing.TB, data []byte, o ...zstd.EOption) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, append([]zstd.EOption{zstd.WithEncoderConcurrency(1)}, o...)...)
	if err != nil {
		t.Fatal(err)
	}
	return finish(t, &b, w, data)
}

func lz(t testing.TB, data []byte, o ...lz4.Option) []byte {
	t.Helper()
	var b bytes.Buffer
	w := lz4.NewWriter(&b)
	if err := w.Apply(append([]lz4.Option{lz4.ConcurrencyOption(1)}, o...)...); err != nil {
		t.Fatal(err)
	}
	return finish(t, &b, w, data)
}

func finish(t testing.TB, b *bytes.Buffer, w io.WriteCloser, data []byte) []byte {
	t.Helper()
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func skippable(id byte, content string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, magicSkip+uint32(id))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(content)))
	return append(b, content...)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// readings are the ways to read a stream to its end.
var readings = map[string]func(io.Reader) ([]byte, error){
	"Read":    func(r io.Reader) ([]byte, error) { return io.ReadAll(struct{ io.Reader }{r}) },
	"OneByte": func(r io.Reader) ([]byte, error) { return io.ReadAll(iotest.OneByteReader(r)) },
	"WriteTo": func(r io.Reader) ([]byte, error) {
		var b bytes.Buffer
		_, err := r.(io.WriterTo).WriteTo(&b)
		return b.Bytes(), err
	},
	"ReadThenWriteTo": func(r io.Reader) ([]byte, error) {
		var b bytes.Buffer
		if _, err := io.CopyN(&b, struct{ io.Reader }{r}, 1000); err != nil && !errors.Is(err, io.EOF) {
			return b.Bytes(), err
		}
		_, err := r.(io.WriterTo).WriteTo(&b)
		return b.Bytes(), err
	},
}

func TestFormats(t *testing.T) {
	t.Parallel()
	data := sample(700 << 10)
	a, b := data[:300<<10], data[300<<10:]
	full := gzip.Header{Name: "layer.tar", Comment: "a comment", Extra: []byte("xx\x04\x00abcd"), ModTime: time.Unix(1e9, 0)}
	for _, c := range []struct {
		name   string
		in     []byte
		format Format
		want   []byte
	}{
		{"gzip", gz(t, data, gzip.Header{}), Gzip, data},
		{"gzip with all header fields", gz(t, data, full), Gzip, data},
		{"gzip members", join(gz(t, a, gzip.Header{}), gz(t, nil, full), gz(t, b, full)), Gzip, data},
		{"gzip of nothing", gz(t, nil, gzip.Header{}), Gzip, nil},
		{"gzip, zero padding", join(gz(t, data, gzip.Header{}), make([]byte, 5000)), Gzip, data},
		{"gzip, one zero", join(gz(t, data, gzip.Header{}), []byte{0}), Gzip, data},
		{"gzip, garbage", join(gz(t, data, gzip.Header{}), sample(300<<10)), Gzip, data},
		{"gzip, half a magic", join(gz(t, data, gzip.Header{}), []byte{0x1f}), Gzip, data},
		{"gzip, a member behind zeros is garbage", join(gz(t, a, gzip.Header{}), []byte{0, 0}, gz(t, b, gzip.Header{})), Gzip, a},
		{"zstd", zst(t, data), Zstd, data},
		{"zstd frames", join(zst(t, a), zst(t, b)), Zstd, data},
		{"zstd, skippable frames all over", join(skippable(0, "first"), skippable(15, ""), zst(t, a), skippable(3, "mid"), zst(t, b), skippable(1, "last")), Zstd, data},
		{"zstd, skippable frame over the buffer", join(skippable(0, strings.Repeat("x", 3*inputBuffer)), zst(t, data)), Zstd, data},
		{"zstd, single segment", zst(t, data, zstd.WithSingleSegment(true)), Zstd, data},
		{"zstd, window of 64 MiB", zst(t, data, zstd.WithWindowSize(64<<20)), Zstd, data},
		{"zstd of nothing", zst(t, nil, zstd.WithZeroFrames(true)), Zstd, nil},
		{"skippable frames only", join(skippable(0, "a"), skippable(1, "b")), Zstd, nil},
		{"lz4", lz(t, data), LZ4, data},
		{"lz4, all checksums, small blocks", lz(t, data, lz4.BlockChecksumOption(true), lz4.ChecksumOption(true), lz4.BlockSizeOption(lz4.Block64Kb)), LZ4, data},
		{"lz4 with its size", lz(t, data, lz4.SizeOption(uint64(len(data)))), LZ4, data},
		{"lz4 frames", join(lz(t, a), lz(t, b)), LZ4, data},
		{"lz4 behind a skippable frame", join(skippable(5, "lz"), lz(t, data)), LZ4, data},
		{"uncompressed", data, Uncompressed, data},
		{"empty", nil, Uncompressed, nil},
		{"one byte", []byte{0x1f}, Uncompressed, []byte{0x1f}},
		{"three bytes of a magic", []byte{0x28, 0xb5, 0x2f}, Uncompressed, []byte{0x28, 0xb5, 0x2f}},
		{"nine bytes", []byte("123456789"), Uncompressed, []byte("123456789")},
		{"gzip magic, other method", []byte{0x1f, 0x8b, 0x07, 0}, Uncompressed, []byte{0x1f, 0x8b, 0x07, 0}},
	} {
		for how, read := range readings {
			t.Run(c.name+"/"+how, func(t *testing.T) {
				t.Parallel()
				r, err := NewReader(t.Context(), bytes.NewReader(c.in))
				if err != nil {
					t.Fatal(err)
				}
				defer closed(t, r)
				if r.Format() != c.format {
					t.Errorf("format %q, want %q", r.Format(), c.format)
				}
				got, err := read(r)
				if err != nil || !bytes.Equal(got, c.want) {
					t.Errorf("got %d bytes and error %v, want %d and none", len(got), err, len(c.want))
				}
				if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF { //nolint:errorlint // Read must return it bare
					t.Errorf("read after the end: %d, %v", n, err)
				}
			})
		}
	}
}

func closed(t *testing.T, r *Reader) {
	t.Helper()
	for range 2 {
		if err := r.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
}

// drain opens and reads in, and returns the error of either.
func drain(ctx context.Context, in io.Reader) ([]byte, error) {
	r, err := NewReader(ctx, in)
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }()
	return io.ReadAll(struct{ io.Reader }{r})
}

func TestTruncatedAnywhere(t *testing.T) {
	t.Parallel()
	data := sample(3000)
	for name, in := range map[string][]byte{
		"gzip": gz(t, data, gzip.Header{Name: "n", Comment: "c", Extra: []byte("ee")}),
		"zstd": join(skippable(2, "skip"), zst(t, data)),
		"lz4":  lz(t, data, lz4.ChecksumOption(true), lz4.BlockSizeOption(lz4.Block64Kb)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for cut := 4; cut < len(in); cut++ {
				if name == "zstd" && cut == 12 {
					continue // the skippable frame alone is a whole stream
				}
				got, err := drain(t.Context(), bytes.NewReader(in[:cut]))
				if !errors.Is(err, ErrCorrupt) || !errors.Is(err, io.ErrUnexpectedEOF) || !errdefs.IsInvalidArgument(err) {
					t.Fatalf("cut at %d of %d: %d bytes, error %v", cut, len(in), len(got), err)
				}
			}
		})
	}
	t.Run("second gzip member", func(t *testing.T) {
		t.Parallel()
		one := gz(t, data, gzip.Header{})
		for _, n := range []int{2, 3, 9, 10, 100, len(one) - 1} {
			if _, err := drain(t.Context(), bytes.NewReader(join(one, one[:n]))); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%d bytes of it: %v", n, err)
			}
		}
	})
}

func TestCorrupt(t *testing.T) {
	t.Parallel()
	data := sample(20 << 10)
	flip := func(in []byte, at int) []byte {
		out := bytes.Clone(in)
		out[(at+len(out))%len(out)] ^= 0x10
		return out
	}
	g, z := gz(t, data, gzip.Header{}), zst(t, data)
	l := lz(t, data, lz4.ChecksumOption(true))
	huge := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0} // single segment of 1 TiB
	for _, c := range []struct {
		name string
		in   []byte
	}{
		{"gzip body", flip(g, len(g)/2)},
		{"gzip checksum", flip(g, -6)},
		{"gzip length", flip(g, -1)},
		{"gzip reserved flag", flip(join(g[:3], []byte{0x80 ^ 0x10}, g[4:]), 3)},
		{"gzip second header", join(g, []byte{0x1f, 0x8b, 9, 0, 0, 0, 0, 0, 0, 0})},
		{"zstd body", flip(z, len(z)/2)},
		{"zstd checksum", flip(z, -1)},
		{"zstd trailing garbage", join(z, []byte("garbage"))},
		{"zstd window over the bound", []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 18 << 3, 9, 0, 0, 'x'}}, /* 2^28 */
		{"zstd huge single segment", huge},
		{"lz4 body", flip(l, len(l)/2)},
		{"lz4 checksum", flip(l, -1)},
		{"lz4 header", flip(l, 6)},
		{"lz4 trailing garbage", join(l, []byte("garbage"))},
		{"tar behind a skippable frame", join(skippable(0, "x"), data)},
		{"gzip behind a skippable frame", join(skippable(0, "x"), g)},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if got, err := drain(t.Context(), bytes.NewReader(c.in)); !errors.Is(err, ErrCorrupt) {
				t.Errorf("got %d bytes, error %v; want ErrCorrupt", len(got), err)
			}
		})
	}
}

func TestErrorsOfOthersPassThrough(t *testing.T) {
	t.Parallel()
	data := sample(300 << 10)
	boom := errors.New("boom")
	for name, in := range map[string][]byte{"gzip": gz(t, data, gzip.Header{}), "zstd": zst(t, data), "lz4": lz(t, data), "tar": data} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, cut := range []int{0, 3, len(in) / 2, len(in)} {
				for _, cause := range []error{boom, io.ErrUnexpectedEOF} {
					_, err := drain(t.Context(), io.MultiReader(bytes.NewReader(in[:cut]), iotest.ErrReader(cause)))
					if !errors.Is(err, cause) || errors.Is(err, ErrCorrupt) {
						t.Errorf("source fails at %d: %v, want %v", cut, err, cause)
					}
				}
			}
			r, err := NewReader(t.Context(), bytes.NewReader(in))
			if err != nil {
				t.Fatal(err)
			}
			defer closed(t, r)
			if _, err := r.WriteTo(failing{boom}); !errors.Is(err, boom) || errors.Is(err, ErrCorrupt) {
				t.Errorf("failing writer: %v", err)
			}
			if _, err := r.WriteTo(io.Discard); !errors.Is(err, boom) {
				t.Errorf("the error does not repeat: %v", err)
			}
		})
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestCancelled(t *testing.T) {
	t.Parallel()
	stop := errors.New("told to stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	in := gz(t, sample(4<<20), gzip.Header{})
	r, err := NewReader(ctx, bytes.NewReader(in))
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, r)
	cancel(stop)
	if _, err := io.Copy(io.Discard, struct{ io.Reader }{r}); !errors.Is(err, stop) {
		t.Errorf("got %v, want the cause", err)
	}
	if _, err := NewReader(ctx, bytes.NewReader(in)); !errors.Is(err, stop) {
		t.Errorf("NewReader: %v, want the cause", err)
	}
}

// counting counts what was taken from it.
type counting struct {
	r io.Reader
	n int
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}

func TestDecodesNoFurtherThanAsked(t *testing.T) {
	t.Parallel()
	zeros := make([]byte, 32<<20)
	for name, in := range map[string][]byte{"gzip": gz(t, zeros, gzip.Header{}), "zstd": zst(t, zeros), "lz4": lz(t, zeros)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			src := &counting{r: bytes.NewReader(join(in, in, in, in, in, in, in, in))}
			r, err := NewReader(t.Context(), src)
			if err != nil {
				t.Fatal(err)
			}
			defer closed(t, r)
			if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
				t.Fatal(err)
			}
			if src.n > 2*inputBuffer {
				t.Errorf("took %d bytes of input for 1000 of output", src.n)
			}
		})
	}
}

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
				if src.n != len(in) {
					t.Fatalf("end after %d of %d bytes", src.n, len(in))
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

// BenchmarkReader prints uncompressed MB/s per format, read in steps of 128 KiB
// and through WriteTo.
func BenchmarkReader(b *testing.B) {
	data := sample(64 << 20)
	for _, c := range []struct {
		name string
		in   []byte
	}{
		{"gzip", gz(b, data, gzip.Header{})},
		{"zstd", zst(b, data)},
		{"lz4", lz(b, data)},
		{"uncompressed", data},
	} {
		for _, how := range []string{"Read", "WriteTo"} {
			b.Run(c.name+"/"+how, func(b *testing.B) {
				b.SetBytes(int64(len(data)))
				buf := make([]byte, 128<<10)
				for b.Loop() {
					r, err := NewReader(b.Context(), bytes.NewReader(c.in))
					if err != nil {
						b.Fatal(err)
					}
					var src io.Reader = r
					if how == "Read" {
						src = struct{ io.Reader }{r}
					}
					if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, src, buf); err != nil {
						b.Fatal(err)
					}
					if err := r.Close(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(len(data))/float64(len(c.in)), "ratio")
			})
		}
	}
}
