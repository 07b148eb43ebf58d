package deflate

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	kgzip "github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"
)

// goTar is a tar of the first files of the Go distribution's folder, at most size bytes of them.
func goTar(b *testing.B, folder string, size int) []byte {
	b.Helper()
	root, err := exec.CommandContext(b.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		b.Fatal(err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	err = filepath.WalkDir(filepath.Join(strings.TrimSpace(string(root)), folder), func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if out.Len() > size {
			return fs.SkipAll
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o644}); err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return out.Bytes()
}

// gzipped runs gzip(1), which made most layers' bytes, with the given level.
func gzipped(b *testing.B, data []byte, level string) []byte {
	b.Helper()
	c := exec.CommandContext(b.Context(), "gzip", level, "-c")
	c.Stdin = bytes.NewReader(data)
	out, err := c.Output()
	if err != nil {
		b.Fatal(err)
	}
	return out
}

// goGzipped cuts data into members of the given size and compresses each with compress/gzip.
func goGzipped(b *testing.B, data []byte, member int) []byte {
	b.Helper()
	var out bytes.Buffer
	for len(data) > 0 {
		n := min(member, len(data))
		w := gzip.NewWriter(&out)
		_, _ = w.Write(data[:n])
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
		data = data[n:]
	}
	return out.Bytes()
}

// serial decodes members (of plain headers, but for a name) through buf and checks their CRC-32.
func serial(b *testing.B, gz, buf []byte) (total int) {
	var f inflater
	for at := 0; at < len(gz); at += 8 {
		flags := gz[at+3]
		if at += 10; flags&8 != 0 {
			at += bytes.IndexByte(gz[at:], 0) + 1
		}
		f.reset(gz, int64(at)*8)
		f.extend(gz, 0, true)
		crc := uint32(0)
		for n, st := 0, outFull; st != ended; {
			if n > windowSize {
				n = copy(buf, buf[n-windowSize:n])
			}
			from := n
			var err error
			if n, st, err = f.decode(buf, n, -1); err != nil {
				b.Fatal(err)
			}
			crc = crc32.Update(crc, crc32.IEEETable, buf[from:n])
			total += n - from
		}
		if at = int(f.bit()+7) / 8; binary.LittleEndian.Uint32(gz[at:]) != crc {
			b.Fatal("CRC-32 differs")
		}
	}
	return total
}

// markedAll decodes the one member of gz with markers all the way.
func markedAll(b *testing.B, gz []byte, buf []uint16) {
	at := 10
	if gz[3]&8 != 0 {
		at += bytes.IndexByte(gz[at:], 0) + 1
	}
	var f inflater
	f.reset(gz, int64(at)*8)
	f.extend(gz, 0, true)
	for n, st := 0, outFull; st != ended; {
		if n > windowSize {
			n = copy(buf, buf[n-windowSize:n])
		}
		var err error
		if n, _, st, err = f.decodeMarked(buf, n, -1); err != nil {
			b.Fatal(err)
		}
	}
}

// klauspostAll is the peer, as its users run it.
func klauspostAll(b *testing.B, gz, buf []byte) int {
	r, err := kgzip.NewReader(bytes.NewReader(gz))
	if err != nil {
		b.Fatal(err)
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf)
	if err != nil {
		b.Fatal(err)
	}
	return int(n)
}

// cpuTime is what this thread has used: other work on the machine disturbs it less than the clock.
func cpuTime(b *testing.B) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}

// BenchmarkInflate runs klauspost/compress gzip and the serial decoder by turns, on one thread, over the same input and
// prints the fastest run of each (bytes of output for each second of CPU time), both with CRC-32. Run it with -benchtime 5x.
func BenchmarkInflate(b *testing.B) {
	const size = 48 << 20
	src, bin := goTar(b, "src", size), goTar(b, "pkg/tool", size)
	noise := make([]byte, size)
	r := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < size; i += 8 {
		binary.LittleEndian.PutUint64(noise[i:], r.Uint64())
	}
	biased := bytes.Clone(noise) // literals of nearly 8 bits, as in a JPEG
	for i, v := range biased {
		if v >= 240 {
			biased[i] = v - 240
		}
	}
	hex := make([]byte, size/2)
	for i := range hex {
		hex[i] = "0123456789abcdef"[noise[i]&15]
	}
	inputs := []struct {
		name string
		gz   []byte
	}{
		{"go-src-1", gzipped(b, src, "-1")},
		{"go-src-6", gzipped(b, src, "-6")},
		{"go-src-9", gzipped(b, src, "-9")},
		{"go-src-compress-gzip", goGzipped(b, src, size*2)},
		{"go-tools-6", gzipped(b, bin, "-6")},
		{"text", gzipped(b, corpus(size / 2)["text"], "-6")},
		{"hex", gzipped(b, hex, "-6")},
		{"zeros", gzipped(b, make([]byte, size), "-6")},
		{"random", gzipped(b, noise, "-6")},
		{"jpeg-like", gzipped(b, biased, "-6")},
		{"members-of-64K", goGzipped(b, src[:size/4], 64<<10)},
		{"members-of-1500", goGzipped(b, src[:size/4], 1500)},
		{"members-of-100", goGzipped(b, src[:size/32], 100)},
	}
	for _, in := range inputs {
		b.Run(in.name, func(b *testing.B) { benchInput(b, in.gz, !strings.HasPrefix(in.name, "members")) })
	}
}

func benchInput(b *testing.B, gz []byte, withMarked bool) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf, buf16 := make([]byte, 512<<10), make([]uint16, 512<<10)
	const never = time.Duration(1 << 62)
	peer, ours, marked, size := never, never, never, 0
	for b.Loop() {
		start := cpuTime(b)
		want := klauspostAll(b, gz, buf)
		peer = min(peer, cpuTime(b)-start)
		start = cpuTime(b)
		size = serial(b, gz, buf)
		ours = min(ours, cpuTime(b)-start)
		if size != want {
			b.Fatalf("%d bytes, klauspost has %d", size, want)
		}
		if withMarked {
			start = cpuTime(b)
			markedAll(b, gz, buf16)
			marked = min(marked, cpuTime(b)-start)
		}
	}
	mb := float64(size) / 1e6
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(mb/peer.Seconds(), "klauspost-MB/s")
	b.ReportMetric(mb/ours.Seconds(), "MB/s")
	b.ReportMetric(peer.Seconds()/ours.Seconds(), "ratio")
	if withMarked {
		b.ReportMetric(mb/marked.Seconds(), "marked-MB/s")
	}
}
