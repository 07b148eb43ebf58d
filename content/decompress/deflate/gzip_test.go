package deflate

import (
	"bytes"
	"compress/gzip"
	"errors"
	"hash/crc32"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// gunzip is gzip(1). A warning (exit status 2) is no failure.
func gunzip(t testing.TB, in []byte) (out []byte, ok bool) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "gzip", "-dc")
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("gzip(1) is needed: %v", err)
	}
	return out, err == nil || exit.ExitCode() == 2
}

// header makes a gzip header with what the flags announce.
func header(flags byte, extra, name, comment string) []byte {
	h := []byte{0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 0, 3}
	if flags&flagExtra != 0 {
		h = append(h, byte(len(extra)), byte(len(extra)>>8))
		h = append(h, extra...)
	}
	if flags&flagName != 0 {
		h = append(append(h, name...), 0)
	}
	if flags&flagComment != 0 {
		h = append(append(h, comment...), 0)
	}
	if flags&flagHCRC != 0 {
		sum := crc32.ChecksumIEEE(h)
		h = append(h, byte(sum), byte(sum>>8))
	}
	return h
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// TestLikeGzip holds verdict and output against gzip(1), and all layouts against each other.
func TestLikeGzip(t *testing.T) {
	t.Parallel()
	a, b := prose(90_000), prose(120_000)[50_000:]
	ma, mb := squeezeGzip(t, a, 6), squeezeGzip(t, b, 9)
	body := mb[headerSize:]
	long := strings.Repeat("x", 40_000)
	full := byte(flagExtra | flagName | flagComment | flagHCRC)
	damaged := func(in []byte, at int) []byte {
		in = bytes.Clone(in)
		in[at] ^= 0x10
		return in
	}
	tests := map[string][]byte{
		"one":                      ma,
		"two members":              join(ma, mb),
		"empty members":            join(squeezeGzip(t, nil, 6), ma, squeezeGzip(t, nil, 6), squeezeGzip(t, nil, 0), mb, squeezeGzip(t, nil, 6)),
		"all fields":               join(ma, header(full, long, "name", "comment"), body),
		"long name":                join(header(flagName, "", long, ""), body, ma),
		"header sum wrong":         join(ma, damaged(header(full, "ab", "name", "c"), 15), body),
		"text flag":                join(header(1, "", "", ""), body),
		"flag 0x20":                join(ma, header(0x20, "", "", ""), body),
		"flag 0x40":                join(ma, header(0x40, "", "", ""), body),
		"flag 0x80 first":          join(header(0x80, "", "", ""), body),
		"method":                   join(ma, []byte{0x1f, 0x8b, 7, 0, 0, 0, 0, 0, 0, 0}, body),
		"zeros":                    join(ma, make([]byte, 100_000)),
		"one zero":                 join(ma, []byte{0}),
		"zeros, member":            join(ma, make([]byte, 512), mb),
		"one byte":                 join(ma, []byte{'x'}),
		"garbage":                  join(ma, []byte(long)),
		"half a magic":             join(ma, []byte{0x1f}),
		"magic alone":              join(ma, []byte{0x1f, 0x8b}),
		"garbage, member":          join(ma, []byte("xx"), mb),
		"half a header":            join(ma, mb[:7]),
		"crc":                      damaged(ma, len(ma)-6),
		"size":                     damaged(ma, len(ma)-2),
		"crc, then a member":       join(damaged(ma, len(ma)-6), mb),
		"no trailer":               ma[:len(ma)-8],
		"half a trailer":           ma[:len(ma)-3],
		"empty":                    {},
		"not gzip":                 []byte("plain text"),
		"header only":              header(0, "", "", ""),
		"middle":                   damaged(join(ma, mb), len(ma)+len(mb)/2),
		"cut in the second member": join(ma, mb[:len(mb)/2]),
	}
	for name, in := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			likeGzip(t, in)
		})
	}
}

func likeGzip(t *testing.T, in []byte) {
	t.Helper()
	want, ok := gunzip(t, in)
	first, firstErr := inflateGzip(in, layouts[0].opts...)
	if (firstErr == nil) != ok {
		t.Fatalf("%v, gzip(1) says %v", firstErr, ok)
	}
	if ok && !bytes.Equal(first, want) {
		t.Fatalf("%d bytes, gzip(1) %d", len(first), len(want))
	}
	// Where it breaks off gzip(1) has not written its last window, or a little more.
	if n := common(first, want); n < min(len(first), len(want)) {
		t.Fatalf("differs from gzip(1) at %d", n)
	}
	if firstErr != nil && !errors.Is(firstErr, ErrCorrupt) {
		t.Fatalf("%v is not ErrCorrupt", firstErr)
	}
	sameInAllLayouts(t, in, first, firstErr)
}

func sameInAllLayouts(t *testing.T, in, want []byte, wantErr error) {
	t.Helper()
	for _, l := range layouts[1:] {
		for _, stream := range []bool{false, true} {
			got, err := inflateVia(in, stream, l.opts...)
			if !bytes.Equal(got, want) || !sameError(err, wantErr) {
				t.Fatalf("%s (stream %v): %d bytes, %v; serial %d bytes, %v; equal up to %d", l.name, stream, len(got), err, len(want), wantErr, common(got, want))
			}
		}
	}
}

func sameError(a, b error) bool {
	return (a == nil) == (b == nil) && (a == nil || a.Error() == b.Error())
}

func inflateVia(in []byte, stream bool, opts ...Option) ([]byte, error) {
	if !stream {
		return inflateGzip(in, opts...)
	}
	r, err := NewReader(bytes.NewReader(in), opts...)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	_, err = r.WriteTo(&out)
	return out.Bytes(), errors.Join(err, r.Close())
}

func TestTruncatedSaysSo(t *testing.T) {
	t.Parallel()
	in := squeezeGzip(t, prose(50_000), 6)
	for _, n := range []int{0, 1, 5, 10, 11, 100, len(in) / 2, len(in) - 9, len(in) - 8, len(in) - 1} {
		for _, l := range layouts {
			if _, err := inflateGzip(in[:n], l.opts...); !errors.Is(err, ErrCorrupt) || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s: first %d bytes: %v", l.name, n, err)
			}
		}
	}
}

// TestManyMembers decodes members of all sizes, so that they end on all edges.
func TestManyMembers(t *testing.T) {
	t.Parallel()
	data := prose(600_000)
	var in bytes.Buffer
	for i, rest := 0, data; len(rest) > 0; i++ {
		n := min(len(rest), i*i%977+i%7*300)
		in.Write(squeezeGzip(t, rest[:n], []int{6, 0, 1, gzip.HuffmanOnly}[i%4]))
		rest = rest[n:]
	}
	for _, l := range layouts {
		got, err := inflateGzip(in.Bytes(), l.opts...)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, %v; want %d", l.name, len(got), err, len(data))
		}
	}
}

func TestCombinedSums(t *testing.T) {
	t.Parallel()
	data := noise(100_000, false)
	for _, n := range []int{0, 1, 2, 7, 8, 255, 256, 32768, 65537, 99_999, 100_000} {
		got, want := sumOf(data[:n]).then(sumOf(data[n:])), sumOf(data)
		if got != want {
			t.Errorf("cut at %d: %+v, want %+v", n, got, want)
		}
	}
}
