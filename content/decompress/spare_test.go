package decompress

import (
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

// TestSpare fails too where the runtime no longer counts what spare asks for.
func TestSpare(t *testing.T) { //nolint:paralleltest // counts what the process runs
	var stop atomic.Bool
	for range runtime.GOMAXPROCS(0) {
		go func() {
			for !stop.Load() {
			}
		}()
	}
	wait := func(want bool) {
		t.Helper()
		for range 2000 {
			if spare() == want {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Errorf("spare: %v, with %d processors", !want, runtime.GOMAXPROCS(0))
	}
	wait(false)
	stop.Store(true)
	wait(true)
}
