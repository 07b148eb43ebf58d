package decompress

import (
	"os"
	"os/signal"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

// TestSpare fails too where the runtime no longer counts what spare asks for.
func TestSpare(t *testing.T) { //nolint:paralleltest // counts what the process runs
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt) // has a goroutine wait in the kernel, as in gantryd
	defer signal.Stop(signals)
	var stop atomic.Bool
	defer stop.Store(true)
	burn := func() {
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
	for range runtime.GOMAXPROCS(0) - 1 { // and this one
		burn()
	}
	wait(true)
	burn()
	wait(false)
	stop.Store(true)
	wait(true)
}
