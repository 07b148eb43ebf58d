package deflate

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	kgzip "github.com/klauspost/compress/gzip"
)

// goTarball is a tar of the Go distribution, up to limit bytes.
func goTarball(t testing.TB, limit int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	root := runtime.GOROOT() //nolint:staticcheck // this very toolchain's files, as test data
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: strings.TrimPrefix(path, root), Mode: 0o644, Size: int64(len(data))}); err != nil {
			return err
		}
		if _, err := w.Write(data); err != nil {
			return err
		}
		if b.Len() >= limit {
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// gzipTool compresses with gzip(1).
func gzipTool(t testing.TB, data []byte, level int) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "gzip", fmt.Sprintf("-%d", level), "-c")
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("gzip(1) is needed: %v", err)
	}
	return out
}

// noise is data that does not compress; with soft, as a JPEG does: by a little.
func noise(n int, soft bool) []byte {
	r := rand.NewChaCha8([32]byte{7})
	out := make([]byte, n)
	_, _ = r.Read(out)
	for i := range out {
		if soft && out[i] >= 0xf0 {
			out[i] &= 0x3f
		}
	}
	return out
}

func prose(n int) []byte {
	r := rand.New(rand.NewPCG(3, 4))
	words := strings.Fields("the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you were all her she there would their we him been has when who will no more if out so up said what its about than into them can only other time new some could these two may first then do any like my now over such our man me even most made after also did many off before must well back through years much where your way down should because long each just state those people too mister how little good world make very year still see own work men day get here old both life being under three never know same last another while us since")
	var b bytes.Buffer
	for b.Len() < n {
		// Rare words are rarer than frequent ones.
		b.WriteString(words[int(float64(len(words))*r.Float64()*r.Float64())])
		b.WriteByte(" ,.\n"[min(3, int(r.ExpFloat64()/2))])
	}
	return b.Bytes()[:n]
}

func tiny(t testing.TB, data []byte, size int) []byte {
	var b bytes.Buffer
	for len(data) > 0 {
		n := min(size, len(data))
		b.Write(squeezeGzip(t, data[:n], 6))
		data = data[n:]
	}
	return b.Bytes()
}

// streams are what BenchmarkReader decodes; made once, on demand, whatever -count says.
var streams = []struct {
	name string
	make func(t testing.TB) []byte
}{
	{"go", func(t testing.TB) []byte { return gzipTool(t, goTarball(t, 300<<20), 6) }},
	{"stored", func(t testing.TB) []byte { return gzipTool(t, noise(128<<20, false), 6) }},
	{"jpeg", func(t testing.TB) []byte { return gzipTool(t, noise(128<<20, true), 6) }},
	{"gz-in-gz", func(t testing.TB) []byte { return gzipTool(t, gzipTool(t, goTarball(t, 300<<20), 6), 6) }},
	{"tiny", func(t testing.TB) []byte { return tiny(t, goTarball(t, 64<<20), 2000) }},
	{"zeros", func(t testing.TB) []byte { return gzipTool(t, make([]byte, 512<<20), 6) }},
	{"text", func(t testing.TB) []byte { return gzipTool(t, prose(128<<20), 6) }},
	{"one-GB", func(t testing.TB) []byte {
		data := goTarball(t, 260<<20)
		data = append(data, prose(100<<20)...)
		data = append(data, noise(100<<20, false)...)
		return gzipTool(t, append(data, data...), 6)
	}},
}

var madeStreams = struct {
	sync.Mutex
	data map[int][]byte
}{data: map[int][]byte{}}

// BenchmarkReader compares with klauspost/compress/gzip, in turns, and prints
// uncompressed MB/s and the ratio. Blocks are consumed as gantry does, without a copy.
func BenchmarkReader(b *testing.B) {
	for i, s := range streams {
		in := func() []byte {
			madeStreams.Lock()
			defer madeStreams.Unlock()
			if madeStreams.data[i] == nil {
				madeStreams.data[i] = s.make(b)
			}
			return madeStreams.data[i]
		}
		for _, procs := range []int{1, 2} {
			b.Run(fmt.Sprintf("%s/procs=%d", s.name, procs), func(b *testing.B) { benchReader(b, in(), procs) })
		}
	}
}

func benchReader(b *testing.B, in []byte, procs int) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
	var ours, theirs, oursCPU, theirsCPU time.Duration
	var size int64
	b.ResetTimer()
	for b.Loop() {
		begin, cpu := time.Now(), processTime()
		size = readKlauspost(b, in)
		theirs += time.Since(begin)
		theirsCPU += processTime() - cpu
		begin, cpu = time.Now(), processTime()
		if n := readOurs(b, in); n != size {
			b.Fatalf("%d bytes, want %d", n, size)
		}
		ours += time.Since(begin)
		oursCPU += processTime() - cpu
	}
	rate := func(d time.Duration) float64 { return float64(size) * float64(b.N) / 1e6 / d.Seconds() }
	b.ReportMetric(rate(ours), "MB/s")
	b.ReportMetric(rate(theirs), "klauspost-MB/s")
	b.ReportMetric(theirs.Seconds()/ours.Seconds(), "ratio")
	b.ReportMetric(theirsCPU.Seconds()/oursCPU.Seconds(), "ratio-of-cpu")
	b.ReportMetric(0, "ns/op")
}

// processTime is what the process has used. Its ratio is telling on a machine that
// does other things too.
func processTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func readKlauspost(b *testing.B, in []byte) int64 {
	r, err := kgzip.NewReader(bytes.NewReader(in))
	if err != nil {
		b.Fatal(err)
	}
	n, err := r.WriteTo(io.Discard)
	if err != nil {
		b.Fatal(err)
	}
	return n
}

func readOurs(b *testing.B, in []byte) int64 {
	r, err := NewReaderAt(bytes.NewReader(in))
	if err != nil {
		b.Fatal(err)
	}
	n, err := r.WriteTo(io.Discard)
	if err != nil {
		b.Fatal(err)
	}
	if testing.Verbose() {
		b.Logf("%+v", r.e.counts)
	}
	if err := r.Close(); err != nil {
		b.Fatal(err)
	}
	return n
}
