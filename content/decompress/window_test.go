//go:build !race

// The race detector's build keeps a window alive for longer, so what is measured here is not what gantryd does.

package decompress

import (
	"bytes"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"
)

// wideFrame is a zstd frame with a window of 128 MiB that holds that many MiB, stored.
func wideFrame(mib int) io.Reader {
	head := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 17 << 3}
	block := append([]byte{0, 0, 8}, make([]byte, 1<<16)...) // the header is the length times 8
	parts := []io.Reader{bytes.NewReader(head)}
	for range 16 * mib {
		parts = append(parts, bytes.NewReader(block))
	}
	return io.MultiReader(append(parts, bytes.NewReader([]byte{1, 0, 0}))...)
}

// The budget bounds memory: a window that is given back has been collected before the next reader makes its own.
func TestLargeWindowsStayInBudget(t *testing.T) { //nolint:paralleltest // it measures the heap
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	budget := NewBudget(DefaultBudget)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			r, err := NewReader(t.Context(), wideFrame(140), WithBudget(budget))
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Close()
			if n, err := io.Copy(io.Discard, r); err != nil || n != 140<<20 {
				t.Errorf("read %d bytes, %v", n, err)
			}
		})
	}
	over, most := make(chan struct{}), uint64(0)
	go func() {
		defer close(over)
		wg.Wait()
	}()
	for running := true; running; {
		select {
		case <-over:
			running = false
		case <-time.After(5 * time.Millisecond):
		}
		runtime.ReadMemStats(&after)
		most = max(most, after.HeapInuse)
	}
	grown := int64(most) - int64(before.HeapInuse)
	t.Logf("the heap grew by %d MiB", grown>>20)
	if bound := int64(3 * MaxWindow); grown > bound { // the budget lets one reader at a time have twice the window
		t.Errorf("the heap grew by %d MiB, at most %d are expected", grown>>20, bound>>20)
	}
}
