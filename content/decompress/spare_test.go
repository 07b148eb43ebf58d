package decompress

import (
	"runtime"
	"testing"
	"time"
)

// TestSpare fails too where the runtime no longer counts what spare asks for.
func TestSpare(t *testing.T) { //nolint:paralleltest // counts what the process runs
	stop := make(chan struct{})
	for range runtime.GOMAXPROCS(0) {
		go func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
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
	close(stop)
	wait(true)
}
