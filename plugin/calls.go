package plugin

import (
	"context"
	"maps"
	"path"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gantryd/gantry/plugin/status"
	"github.com/gantryd/gantry/snapshotter"
)

// calls keeps the longest calls of each method: containerd's whole database
// waits for some of them.
type calls struct {
	mu       sync.Mutex
	byMethod map[string]*status.Call
}

// meter is what a call has spent so far on what it only waits for.
type meter struct{ synced, mounting atomic.Int64 } // nanoseconds

type meterKey struct{}

// withMeter returns a context whose calls of spent are counted.
func withMeter(ctx context.Context) (context.Context, *meter) {
	m := &meter{}
	return context.WithValue(ctx, meterKey{}, m), m
}

// spent implements snapshotter.Options.Spent.
func spent(ctx context.Context, on snapshotter.Expense, d time.Duration) {
	m, ok := ctx.Value(meterKey{}).(*meter)
	switch {
	case !ok: // nobody waits for it
	case on == snapshotter.Syncing:
		m.synced.Add(int64(d))
	case on == snapshotter.Mounting:
		m.mounting.Add(int64(d))
	}
}

// note counts a call that took so long. The methods are those of the server, so
// there is no end of them.
func (c *calls) note(method string, took time.Duration, m *meter) {
	synced, mounting := time.Duration(m.synced.Load()), time.Duration(m.mounting.Load())
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byMethod == nil {
		c.byMethod = map[string]*status.Call{}
	}
	x := c.byMethod[method]
	if x == nil {
		x = &status.Call{Method: method}
		c.byMethod[method] = x
	}
	x.Count++
	if seconds := took.Seconds(); seconds > x.Longest {
		x.Longest, x.LongestSync, x.LongestMounts = seconds, synced.Seconds(), mounting.Seconds()
	}
	x.Work = max(x.Work, (took - synced - mounting).Seconds())
}

// wrote counts a message of a Write stream that containerd sends within a transaction.
func (c *calls) wrote(message string, took, synced time.Duration) {
	m := &meter{}
	m.synced.Store(int64(synced))
	c.note("Content/Write "+message, took, m)
}

// report returns the methods in alphabetical order.
func (c *calls) report() []status.Call {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := []status.Call{}
	for _, method := range slices.Sorted(maps.Keys(c.byMethod)) {
		all = append(all, *c.byMethod[method])
	}
	return all
}

// shortMethod makes Snapshots/Prepare of /containerd.services.snapshots.v1.Snapshots/Prepare.
func shortMethod(full string) string {
	service := path.Ext(path.Dir(full))
	return service[min(1, len(service)):] + "/" + path.Base(full)
}
