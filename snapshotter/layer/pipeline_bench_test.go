package layer

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tarStream makes a tar of members without holding it: the data of all is cut
// from the same noise.
type tarStream struct {
	noise   []byte
	members []int // sizes of the files to come
	rest    [][]byte
	ended   bool
	n       int
}

func newTarStream(sizes []int) *tarStream {
	return &tarStream{noise: randomBytes(rand.New(rand.NewPCG(1, 1)), 8<<20), members: sizes}
}

// Read implements io.Reader.
func (s *tarStream) Read(p []byte) (n int, err error) {
	for n < len(p) {
		if len(s.rest) == 0 && !s.next() {
			if n == 0 {
				return 0, io.EOF
			}
			return n, nil
		}
		m := copy(p[n:], s.rest[0])
		n += m
		if s.rest[0] = s.rest[0][m:]; len(s.rest[0]) == 0 {
			s.rest = s.rest[1:]
		}
	}
	return n, nil
}

func (s *tarStream) next() bool {
	if len(s.members) == 0 {
		if s.ended {
			return false
		}
		s.rest, s.ended = [][]byte{make([]byte, 1024)}, true
		return true
	}
	size := s.members[0]
	s.members = s.members[1:]
	var w rawTar
	w.block(member{typ: '0', name: fmt.Sprintf("usr/share/dir%d/file%d", s.n/50, s.n), mode: 0o644}, int64(size))
	s.n++
	s.rest = [][]byte{w.Bytes()}
	for left := size; left > 0; {
		m := min(left, len(s.noise)-s.n%4096)
		s.rest = append(s.rest, s.noise[s.n%4096:][:m])
		left -= m
	}
	if pad := -size & 511; pad > 0 {
		s.rest = append(s.rest, make([]byte, pad))
	}
	return true
}

// smallFiles are the sizes of 80,000 files, 1.04 GB together.
func smallFiles() []int {
	r := rand.New(rand.NewPCG(2, 2))
	sizes := make([]int, 80_000)
	for i := range sizes {
		sizes[i] = 1 + r.IntN(26_000)
	}
	return sizes
}

// blockStream hands a stream out in blocks of its own, as a decompressor does.
type blockStream struct {
	r     io.Reader
	size  int
	spare chan []byte
	end   time.Time
}

func newBlockStream(r io.Reader, size, blocks int) *blockStream {
	s := &blockStream{r: r, size: size, spare: make(chan []byte, blocks)}
	for range blocks {
		s.spare <- make([]byte, size)
	}
	return s
}

// Next implements Blocks.
func (s *blockStream) Next() ([]byte, func(), error) {
	b := <-s.spare
	n, err := io.ReadFull(s.r, b)
	if n == 0 {
		s.spare <- b
		s.end = time.Now()
		return nil, nil, io.EOF
	}
	if err != nil && err != io.ErrUnexpectedEOF {
		return nil, nil, err
	}
	return b[:n], func() { s.spare <- b }, nil
}

// Read implements io.Reader, for those that do not know Next.
func (s *blockStream) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil {
		s.end = time.Now()
	}
	return n, err
}

// plain hides Next.
type plain struct{ io.Reader }

// BenchmarkWrite writes layers of 1 GB to the disk of $TMPDIR and says what each stage costs for a byte, and how long
// after the last byte of the stream the layer was durable.
func BenchmarkWrite(b *testing.B) {
	layers := []struct {
		name  string
		sizes []int
	}{{"one-file", []int{1_000_000_000}}, {"80000-files", smallFiles()}}
	inputs := []struct {
		name  string
		block int
	}{{"reader", 0}, {"blocks-64KiB", 64 << 10}, {"blocks-1MiB", 1<<20 - 777}, {"blocks-4MiB", 4 << 20}}
	for _, l := range layers {
		for _, in := range inputs {
			b.Run(l.name+"/"+in.name, func(b *testing.B) { benchWrite(b, l.sizes, in.block) })
		}
	}
}

func benchWrite(b *testing.B, sizes []int, block int) {
	var sum Timings
	var size int64
	var tail, cpu time.Duration
	for range b.N {
		b.StopTimer()
		c := newCache(b, Options{})
		s := newBlockStream(newTarStream(sizes), max(block, 1), (32<<20)/max(block, 1<<20))
		var r io.Reader = s
		if block == 0 {
			r = plain{s}
		}
		before := cpuTime(b)
		b.StartTimer()
		l, err := c.Write(b.Context(), r, nil)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		tail += time.Since(s.end)
		cpu += cpuTime(b) - before
		size += l.Size
		t := l.Timings
		sum.Read += t.Read
		sum.Hash += t.Hash
		sum.Write += t.Write
		sum.Scan += t.Scan
		sum.Sync += t.Sync
		sum.Total += t.Total
		if err := os.RemoveAll(c.root); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(size / int64(b.N))
	per := func(d time.Duration, stage string) {
		b.ReportMetric(float64(d.Nanoseconds())/float64(size), stage+"-ns/byte")
	}
	per(sum.Read, "read")
	per(sum.Hash, "hash")
	per(sum.Scan, "scan")
	per(sum.Write, "write")
	per(sum.Sync, "sync")
	per(cpu, "cpu")
	b.ReportMetric(tail.Seconds()/float64(b.N), "tail-s")
	b.ReportMetric(0, "ns/op")
}

// cpuTime is what the process has used, in the kernel too.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkZero compares ways to find out that a page is zeros. isZero is the first.
func BenchmarkZero(b *testing.B) {
	words := func(page []byte) bool {
		for ; len(page) >= 8; page = page[8:] {
			if binary.LittleEndian.Uint64(page) != 0 {
				return false
			}
		}
		return len(bytes.Trim(page, "\x00")) == 0
	}
	pages := map[string][]byte{"zeros": make([]byte, pageSize), "noise": bytes.Repeat([]byte{1}, pageSize), "late": append(make([]byte, pageSize-1), 1)}
	for _, name := range []string{"noise", "late", "zeros"} {
		for way, is := range map[string]func([]byte) bool{"compare": isZero, "words": words} {
			b.Run(name+"/"+way, func(b *testing.B) {
				n := 0
				for b.Loop() {
					if is(pages[name]) {
						n++
					}
				}
				if (n > 0) != (name == "zeros") {
					b.Error("wrong")
				}
			})
		}
	}
}
