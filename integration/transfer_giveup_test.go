package integration

import (
	"syscall"
	"testing"

	"github.com/gantryd/gantry/integration/harness"
)

// TestHolderStops stops (SIGSTOP) the gantryd that fetches. One that waits for it gives up after transfer.give_up, goes
// on by itself from what is there, and both end up with the image.
func TestHolderStops(t *testing.T) {
	f := newFaultRegistry(t, harness.FaultOptions{Total: 50_000_000})
	first, second := sharing(t, f, "give_up = '3s'\n")
	im := random(t, 32, 120)
	ref := f.AddImage(im, "stopped", "test")
	pulls := make(chan error, 2)
	go func() { pulls <- pullDefault(t.Context(), first, ref) }()
	until(t, pulls, func() bool { return f.Sent() > 60<<20 })
	first.Gantryd().Signal(syscall.SIGSTOP)
	defer first.Gantryd().Signal(syscall.SIGCONT)
	before := f.Sent()
	if err := pullDefault(t.Context(), second, ref); err != nil {
		t.Fatal(err)
	}
	checkWhole(t, second, "default", ref, im)
	t.Logf("of %d bytes %d were sent before the stop and %d after it", im.Size(), before, f.Sent()-before)
	first.Gantryd().Signal(syscall.SIGCONT)
	if err := <-pulls; err != nil {
		t.Fatal(err)
	}
	checkWhole(t, first, "default", ref, im)
	// What lay in the stopped process's connections, and what both fetched when it went on.
	checkSent(t, f, im, 1.5)
}
