package snapshotter

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"

	"github.com/gantryd/gantry/snapshotter/layer"
)

// BenchmarkStart reports the medians of what a container's start and end call on an image of ten layers, here and in
// containerd's overlayfs, in turns, and the longest Prepare of each.
func BenchmarkStart(b *testing.B) {
	const depth = 10
	dir := b.TempDir()
	b.Cleanup(func() { mountsUnder(dir) })
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	cache, err := layer.Open(filepath.Join(dir, "layers"), layer.Options{})
	must(err)
	gantry, err := New(context.Background(), filepath.Join(dir, "root"), cache, Options{})
	must(err)
	defer gantry.Close()
	overlayfs, err := overlay.NewSnapshotter(filepath.Join(dir, "overlayfs"), overlay.AsynchronousRemove)
	must(err)
	defer overlayfs.Close()
	kinds := []struct {
		name string
		snapshots.Snapshotter
	}{{"gantry", gantry}, {"overlayfs", overlayfs}}
	for _, k := range kinds {
		parent := ""
		for i := range depth {
			key, name := fmt.Sprintf("extract-%d", i), fmt.Sprint("layer-", i)
			mounts, err := k.Prepare(b.Context(), key, parent)
			must(err)
			if k.Snapshotter == snapshots.Snapshotter(gantry) {
				l, err := cache.Write(b.Context(), bytes.NewReader(makeTar(b, reg(fmt.Sprint("f", i), "x"))), nil)
				must(err)
				must(gantry.Adopt(b.Context(), mounts, l.DiffID))
			}
			must(k.Commit(b.Context(), name, key))
			parent = name
		}
	}
	took := map[string][]time.Duration{}
	timed := func(name string, f func() error) {
		start := time.Now()
		must(f())
		took[name] = append(took[name], time.Since(start))
	}
	n := 0
	for b.Loop() {
		n++
		for i := range kinds {
			k := kinds[(i+n)%len(kinds)]
			key, top := fmt.Sprint("container-", n), fmt.Sprint("layer-", depth-1)
			timed("prepare-"+k.name, func() error { _, err := k.Prepare(b.Context(), key, top); return err })
			timed("mounts-"+k.name, func() error { _, err := k.Mounts(b.Context(), key); return err })
			timed("remove-"+k.name, func() error { return k.Remove(b.Context(), key) })
			must(k.Snapshotter.(snapshots.Cleaner).Cleanup(b.Context()))
		}
	}
	for name, all := range took {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, name+"-ms")
		if strings.HasPrefix(name, "prepare") {
			b.ReportMetric(float64(all[len(all)-1].Microseconds())/1000, name+"-longest-ms")
		}
	}
}
