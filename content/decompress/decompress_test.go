package decompress

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"go.uber.org/goleak"

	"github.com/gantryd/gantry/integration/short"
)

// withWorkers bounds how many goroutines decode one stream. With 1 everything is
// done by the caller.
func withWorkers(n int) Option { return func(o *options) { o.workers = n } }

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

func u32(n int) []byte { return binary.LittleEndian.AppendUint32(nil, uint32(n)) }

// tarNamed is a tar of one empty file.
func tarNamed(name string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Name: name, Mode: 0o644})
	_ = w.Close()
	return b.Bytes()
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
	"Next": func(r io.Reader) ([]byte, error) {
		var parts []*[]byte
		var wg sync.WaitGroup
		for {
			data, release, err := r.(*Reader).Next()
			if err != nil {
				wg.Wait()
				var all []byte
				for _, p := range parts {
					all = append(all, *p...)
				}
				if errors.Is(err, io.EOF) {
					err = nil
				}
				return all, err
			}
			part := new([]byte)
			parts = append(parts, part)
			wg.Go(func() { // looked at and released late, and not in order
				runtime.Gosched()
				*part = bytes.Clone(data)
				release()
			})
		}
	},
	"ReadThenNext": func(r io.Reader) ([]byte, error) {
		head := make([]byte, 1000)
		n, err := io.ReadFull(struct{ io.Reader }{r}, head)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = nil
			}
			return head[:n], err
		}
		rest, release, err := r.(*Reader).Next()
		if err != nil {
			return head, nil // the end: the caller sees it again
		}
		head = append(head, rest...)
		release()
		more, err := io.ReadAll(r)
		return append(head, more...), err
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
		{"lz4, skippable frames all over", join(lz(t, a), skippable(5, "mid"), lz(t, nil), lz(t, b), skippable(0, "")), LZ4, data},
		{"lz4, blocks of 4 MiB behind small ones", join(lz(t, data, lz4.BlockSizeOption(lz4.Block64Kb)), lz(t, data, lz4.BlockSizeOption(lz4.Block4Mb))), LZ4, join(data, data)},
		{"lz4, linked blocks", linkedFrame(data), LZ4, data},
		{"lz4, linked and independent frames", join(linkedFrame(a), lz(t, b), linkedFrame(a)), LZ4, join(data, a)},
		{"lz4, legacy", lz(t, data, lz4.LegacyOption(true)), LZ4, data},
		{"lz4, legacy frames, another, and the size of all", join(lz(t, a, lz4.LegacyOption(true)), lz(t, b, lz4.LegacyOption(true)), lz(t, a), lz(t, b, lz4.LegacyOption(true)), u32(len(b))), LZ4, join(data, data)},
		{"apple", apple(data, 64<<10), AppleLZ4, data},
		{"apple, blocks of any size", join(apple(data, 3<<20)), AppleLZ4, data},
		{"apple of nothing", []byte("bv4$"), AppleLZ4, nil},
		{"apple, something behind the end", join(apple(data, 64<<10), []byte("bv41 is no block here")), AppleLZ4, data},
		{"a tar whose first file is bv41", tarNamed("bv41"), Uncompressed, tarNamed("bv41")},
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
				r, err := NewReader(t.Context(), bytes.NewReader(c.in), withWorkers(2))
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
	firstFrame := streamed(t, data[:1000])
	for name, in := range map[string][]byte{
		"gzip": gz(t, data, gzip.Header{Name: "n", Comment: "c", Extra: []byte("ee")}),
		"zstd": join(skippable(2, "skip"), zst(t, data)),
		"lz4":  lz(t, data, lz4.ChecksumOption(true), lz4.BlockSizeOption(lz4.Block64Kb)),

		"lz4 linked":  linkedFrame(data),
		"lz4 size":    lz(t, data, lz4.SizeOption(uint64(len(data))), lz4.BlockChecksumOption(true)),
		"lz4 legacy":  lz(t, data, lz4.LegacyOption(true)),
		"apple":       apple(data, 1000),
		"zstd sized":  zst(t, data, zstd.WithSingleSegment(true)),
		"zstd frames": join(firstFrame, streamed(t, data[1000:])),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for cut := 4; cut < len(in); cut += short.Size(1, 7) {
				if whole(name, cut, len(firstFrame)) {
					continue
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

// whole says whether the stream is complete when it is cut there.
func whole(name string, cut, frame int) bool {
	return name == "zstd" && cut == 12 || // a skippable frame
		name == "zstd frames" && cut == frame ||
		name == "lz4 legacy" && cut == 4 // no block is an empty frame
}

// streamed is a zstd frame that does not tell its content's size.
func streamed(t testing.TB, data []byte, o ...zstd.EOption) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, append(o, zstd.WithEncoderConcurrency(1))...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data[:len(data)/2]); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return finish(t, &b, w, data[len(data)/2:])
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
		{"gzip, half a magic", join(g, []byte{0x1f})}, // so says gzip(1), 1.12
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
		{"lz4 reserved bits", lz4Header(1<<6|1<<5|1<<1, 4<<4)},
		{"lz4 version", lz4Header(2<<6|1<<5, 4<<4)},
		{"lz4 block size", lz4Header(1<<6|1<<5, 3<<4)},
		{"lz4 block too long", join(lz4Header(1<<6|1<<5, 4<<4), u32(65537), make([]byte, 65537), u32(0))},
		{"lz4 block checksum", flip(linkedFrame(data), -9)},
		{"lz4 content checksum, linked", flip(linkedFrame(data), -1)},
		{"lz4 independent block checksum", flip(lz(t, data, lz4.BlockChecksumOption(true), lz4.ChecksumOption(false)), -5)},
		{"lz4 shorter than announced", resized(lz(t, data, lz4.SizeOption(uint64(len(data))), lz4.ChecksumOption(false)), len(data)+1)},
		{"lz4 longer than announced", resized(lz(t, data, lz4.SizeOption(uint64(len(data))), lz4.ChecksumOption(false)), len(data)-1)},
		{"lz4 refers to what is before it", join(lz4Header(1<<6, 4<<4), u32(4), []byte{0x10, 'x', 2, 0}, u32(0))},
		{"lz4 legacy, wrong size of all", join(lz(t, data, lz4.LegacyOption(true)), u32(len(data)+1))},
		{"lz4 legacy, block over its bound", join(u32(magicLZ4Legacy), u32(legacyBound+1), make([]byte, legacyBound+1))},
		{"apple, other magic", join(apple(data, 64<<10)[:0], []byte("bv4-\x01\x00\x00\x00xbv42"))},
		{"apple, block over its bound", join([]byte("bv41"), u32(appleMost+1), u32(appleMost), make([]byte, appleMost))},
		{"apple, more than its bytes can hold", join([]byte("bv41"), u32(1<<20), u32(100), make([]byte, 100), []byte("bv4$"))},
		{"apple, more bytes than it holds", join([]byte("bv41"), u32(1), u32(100), make([]byte, 100), []byte("bv4$"))},
		{"apple, size lies", join([]byte("bv41"), u32(4), u32(4), []byte{0x30, 'a', 'b', 'c'}, []byte("bv4$"))},
		{"apple, refers to what is before it", join([]byte("bv41"), u32(5), u32(4), []byte{0x10, 'x', 2, 0}, []byte("bv4$"))},
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

// lz4Header is a frame header, its checksum right.
func lz4Header(flags, sizes byte, more ...byte) []byte {
	descriptor := append([]byte{flags, sizes}, more...)
	return join(u32(magicLZ4), descriptor, []byte{byte(xxh32Of(descriptor) >> 8)})
}

// resized has an LZ4 frame announce another size.
func resized(frame []byte, size int) []byte {
	more := binary.LittleEndian.AppendUint64(nil, uint64(size))
	return join(lz4Header(frame[4], frame[5], more...), frame[15:])
}

func TestDictionariesAreRefused(t *testing.T) {
	t.Parallel()
	for name, in := range map[string][]byte{
		"lz4":  join(lz4Header(1<<6|1<<5|1, 4<<4, 1, 2, 3, 4), u32(0)),
		"zstd": {0x28, 0xb5, 0x2f, 0xfd, 0x21, 7, 0, 1, 0, 0},
	} {
		_, err := drain(t.Context(), bytes.NewReader(in))
		if !errors.Is(err, ErrCorrupt) || !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "dictionary") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestErrorsOfOthersPassThrough(t *testing.T) {
	t.Parallel()
	data := sample(300 << 10)
	boom := errors.New("boom")
	for name, in := range map[string][]byte{"gzip": gz(t, data, gzip.Header{}), "zstd": zst(t, data), "lz4": lz(t, data), "apple": apple(data, 64<<10), "linked": linkedFrame(data), "frames": join(zst(t, data), zst(t, data)), "tar": data} {
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
