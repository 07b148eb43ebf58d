package erofs

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

// synthetic is a tree of n files of all sizes in directories of 20, as a tar of
// such files would give. The layer is /dev/zero: its padding is read by one
// system call a file, as a real layer's is.
func synthetic(b *testing.B, n int, oneTime bool) (*Inode, Device) {
	b.Helper()
	zero, err := os.Open("/dev/zero")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = zero.Close() })
	root, off := dir(), int64(512)
	var mid, leaf *Inode
	for i := range n {
		if i%400 == 0 {
			mid = dir()
			root.Children = append(root.Children, Dirent{fmt.Sprintf("package-%d", i), mid})
		}
		if i%20 == 0 {
			leaf = dir()
			mid.Children = append(mid.Children, Dirent{fmt.Sprintf("directory-%d", i), leaf})
		}
		size := int64(i%64) * 100
		f := file(size, Extent{0, size, off})
		f.Mtime = int64(i)
		if oneTime {
			f.Mtime, f.MtimeNsec = root.Mtime, root.MtimeNsec
		}
		leaf.Children = append(leaf.Children, Dirent{fmt.Sprintf("some_file_name_%d.py", i), f})
		off += 512 + align(size, BlockSize)
	}
	return root, Device{ReaderAt: zero, Size: off}
}

// BenchmarkWrite reports the peak of the heap over what the tree takes, and
// that of both.
func BenchmarkWrite(b *testing.B) {
	for _, bc := range []struct {
		name    string
		n       int
		oneTime bool
	}{
		{"12k", 12_000, false},
		{"1M", 900_000, false}, // and 47,250 directories
		{"1M-one-time", 900_000, true},
	} {
		b.Run(bc.name, func(b *testing.B) {
			root, layer := synthetic(b, bc.n, bc.oneTime)
			runtime.GC()
			var before runtime.MemStats
			runtime.ReadMemStats(&before)
			peak, stop := heapPeak()
			var size counter
			b.ReportAllocs()
			for b.Loop() {
				size = 0
				if err := Write(&size, root, layer); err != nil {
					b.Fatal(err)
				}
			}
			stop()
			b.SetBytes(int64(size))
			b.ReportMetric(float64(size)/1e6, "image-MB")
			b.ReportMetric(float64(peak.Load())/1e6, "peak-MB")
			b.ReportMetric(float64(peak.Load()-before.HeapAlloc)/1e6, "own-MB")
			runtime.KeepAlive(root)
		})
	}
}

// BenchmarkVerify reads from memory.
func BenchmarkVerify(b *testing.B) {
	const size = 64 << 20
	b.SetBytes(size)
	for b.Loop() {
		if err := Verify(zeros{}, size); err == nil {
			b.Fatal("zeros verified")
		}
	}
}

type zeros struct{}

func (zeros) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

var _ io.Writer = (*counter)(nil)

// heapPeak samples the live heap until stop is called.
func heapPeak() (peak *atomic.Uint64, stop func()) {
	peak = new(atomic.Uint64)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			if m.HeapAlloc > peak.Load() {
				peak.Store(m.HeapAlloc)
			}
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
	}()
	return peak, func() { close(done); <-ended }
}
