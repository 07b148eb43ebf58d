package snapshotter

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/snapshotter/layer"
)

// BenchmarkCalls reports what the calls that hold containerd's locks take, with
// a chain of 20 layers and, for the directory layer, 5000 files.
func BenchmarkCalls(b *testing.B) {
	dir := b.TempDir()
	b.Cleanup(func() { mountsUnder(dir) })
	cache, err := layer.Open(filepath.Join(dir, "layers"), layer.Options{})
	if err != nil {
		b.Fatal(err)
	}
	s, err := New(context.Background(), filepath.Join(dir, "root"), cache, Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	took := map[string]time.Duration{}
	timed := func(name string, f func()) {
		start := time.Now()
		f()
		took[name] += time.Since(start)
	}
	n := 0
	for b.Loop() {
		n++
		parent := ""
		for i := range 20 {
			l, err := cache.Write(b.Context(), bytes.NewReader(makeTar(b, reg(fmt.Sprintf("m/%d", i), "x"))), nil)
			must(err)
			key, name := fmt.Sprintf("k%d-%d", n, i), fmt.Sprintf("c%d-%d", n, i)
			var mounts []mount.Mount
			timed("prepare-extract", func() { mounts, err = s.Prepare(b.Context(), key, parent); must(err) })
			timed("adopt", func() { must(s.Adopt(b.Context(), mounts, l.DiffID)) })
			timed("commit-tar", func() { must(s.Commit(b.Context(), name, key)) })
			parent = name
		}
		key := fmt.Sprintf("container-%d", n)
		var mounts []mount.Mount
		timed("prepare-container", func() { mounts, err = s.Prepare(b.Context(), key, parent); must(err) })
		upper := s.ownUpper(mounts)
		for i := range 5000 {
			must(os.WriteFile(filepath.Join(upper, fmt.Sprint(i)), nil, 0o600))
		}
		timed("commit-directory", func() { must(s.Commit(b.Context(), fmt.Sprintf("d%d", n), key)) })
		timed("remove", func() { must(s.Remove(b.Context(), fmt.Sprintf("d%d", n))) })
	}
	for name, d := range took {
		per := 1
		if name == "prepare-extract" || name == "adopt" || name == "commit-tar" {
			per = 20
		}
		b.ReportMetric(float64(d.Microseconds())/1000/float64(n*per), name+"-ms/op")
	}
	if err := s.Remove(b.Context(), "nothing"); !errdefs.IsNotFound(err) {
		b.Error(err)
	}
}

func (s *Snapshotter) ownUpper(mounts []mount.Mount) string {
	id, _ := s.ownID(mounts)
	return s.upper(id)
}
