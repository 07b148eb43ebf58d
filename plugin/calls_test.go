package plugin

import (
	"context"
	"testing"
	"time"

	"github.com/gantryd/gantry/plugin/status"
	"github.com/gantryd/gantry/snapshotter"
)

func TestCalls(t *testing.T) {
	t.Parallel()
	var c calls
	call := func(took, synced, mounting time.Duration) {
		ctx, m := withMeter(t.Context())
		spent(ctx, snapshotter.Syncing, synced)
		spent(ctx, snapshotter.Mounting, mounting)
		c.note(shortMethod("/containerd.services.snapshots.v1.Snapshots/Prepare"), took, m)
	}
	call(400*time.Millisecond, 100*time.Millisecond, 250*time.Millisecond)
	call(300*time.Millisecond, 0, 100*time.Millisecond)
	spent(context.Background(), snapshotter.Syncing, time.Hour) // nobody's
	c.wrote("COMMIT", time.Second, 250*time.Millisecond)
	want := []status.Call{
		{Method: "Content/Write COMMIT", Count: 1, Longest: 1, LongestSync: 0.25, Work: 0.75},
		{Method: "Snapshots/Prepare", Count: 2, Longest: 0.4, LongestSync: 0.1, LongestMounts: 0.25, Work: 0.2},
	}
	got := c.report()
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("calls are %+v, want %+v", got, want)
	}
}
