package transfer

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/integration/short"
)

// zeros is a source of a blob of zeros of any size, and watches the heap while it sends.
type zeros struct {
	size int64
	sent atomic.Int64
	peak atomic.Uint64 // HeapInuse in bytes
}

func (z *zeros) Host() string { return "zeros" }

func (z *zeros) Tier() int { return 0 }

func (z *zeros) Open(_ context.Context, off, n int64) (Body, error) {
	return Body{ReadCloser: io.NopCloser(io.LimitReader(zeroReader{z}, n)), Off: off, N: n}, nil
}

type zeroReader struct{ *zeros }

func (z zeroReader) Read(p []byte) (int, error) {
	clear(p)
	const step = 4 << 20
	if n := z.sent.Add(int64(len(p))); n/step != (n-int64(len(p)))/step {
		z.peak.Store(max(z.peak.Load(), heapInUse())) // one of two at once may be lost: no matter
	}
	return len(p), nil
}

func heapInUse() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}

func (z *zeros) blob() Blob {
	h, p := sha256.New(), make([]byte, 1<<20)
	for n := z.size; n > 0; n -= int64(len(p)) {
		h.Write(p[:min(n, int64(len(p)))])
	}
	return Blob{Digest: digest.NewDigest(digest.SHA256, h), Size: z.size}
}

// peakHeap transfers a blob of that size and returns by how many bytes the heap grew at most.
func peakHeap(tb testing.TB, size int64) int64 {
	tb.Helper()
	z := &zeros{size: size}
	b := z.blob()
	m := newManager(tb, tb.TempDir(), Options{})
	runtime.GC()
	before := heapInUse()
	h := join(tb, m, b, z)
	wait(tb, h)
	_ = h.Close()
	if err := m.Forget(b.Digest); err != nil {
		tb.Fatal(err)
	}
	return int64(z.peak.Load()) - int64(before)
}

// Memory is bounded by the connections, whatever the size of the blob.
func TestMemory(t *testing.T) { //nolint:paralleltest // others would be counted
	const bound = 64 << 20
	small, large := peakHeap(t, 16<<20), peakHeap(t, int64(short.Size(256, 96))<<20)
	t.Logf("heap grew by %.1f MiB for 16 MiB, by %.1f MiB for the large one", float64(small)/(1<<20), float64(large)/(1<<20))
	if large > bound {
		t.Errorf("the large blob took %d bytes of heap, wanted less than %d", large, bound)
	}
}

// BenchmarkMemory prints the same for sizes that would take too long in a test.
func BenchmarkMemory(b *testing.B) {
	for _, size := range []int64{64 << 20, 4 << 30} {
		b.Run(fmt.Sprintf("%dMiB", size>>20), func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				b.ReportMetric(float64(peakHeap(b, size))/(1<<20), "heap-MiB")
			}
		})
	}
}
