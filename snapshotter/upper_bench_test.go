package snapshotter

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/gantryd/gantry/snapshotter/layer"
)

// BenchmarkPrepare reports what a container's Prepare takes with an upper
// directory and with an upper file, by turns, and the longest of each.
func BenchmarkPrepare(b *testing.B) {
	dir := b.TempDir()
	b.Cleanup(func() { mountsUnder(dir) })
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	kinds := []Upper{UpperDirectory, UpperFile}
	on := map[Upper]*Snapshotter{}
	for _, k := range kinds {
		cache, err := layer.Open(filepath.Join(dir, string(k), "layers"), layer.Options{})
		must(err)
		s, err := New(context.Background(), filepath.Join(dir, string(k), "root"), cache, Options{Upper: k})
		must(err)
		defer s.Close()
		l, err := cache.Write(b.Context(), bytes.NewReader(makeTar(b, reg("f", "x"))), nil)
		must(err)
		mounts, err := s.Prepare(b.Context(), "extract", "")
		must(err)
		must(s.Adopt(b.Context(), mounts, l.DiffID))
		must(s.Commit(b.Context(), "image", "extract"))
		on[k] = s
	}
	total, longest := map[Upper]time.Duration{}, map[Upper]time.Duration{}
	n := 0
	for b.Loop() {
		n++
		for _, k := range kinds {
			key := fmt.Sprint(n)
			start := time.Now()
			_, err := on[k].Prepare(b.Context(), key, "image")
			took := time.Since(start)
			must(err)
			total[k] += took
			longest[k] = max(longest[k], took)
			must(on[k].Remove(b.Context(), key))
		}
	}
	for _, k := range kinds {
		must(on[k].Cleanup(b.Context()))
		b.ReportMetric(float64(total[k].Microseconds())/1000/float64(n), string(k)+"-ms/op")
		b.ReportMetric(float64(longest[k].Microseconds())/1000, string(k)+"-longest-ms")
	}
}
