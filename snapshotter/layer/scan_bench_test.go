package layer

import (
	"bytes"
	"fmt"
	"runtime"
	"testing"
)

// BenchmarkScan is a tar of a million small files in 20,000 directories.
func BenchmarkScan(b *testing.B) {
	const entries = 1_000_000
	var w rawTar
	w.Grow(entries * 1100)
	for i := range entries / 50 {
		d := fmt.Sprintf("usr/lib/node_modules/package-%d/dist", i)
		w.add(dir(d))
		for j := range 49 {
			w.add(file(fmt.Sprintf("%s/module-%d.js", d, j), "x"))
		}
	}
	tar := w.end()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	b.ResetTimer()
	var table *Table
	for range b.N {
		var err error
		if table, err = Scan(b.Context(), bytes.NewReader(tar)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(entries*b.N)/b.Elapsed().Seconds(), "entries/s")
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/entries, "B/entry")
	runtime.KeepAlive(table)
	runtime.KeepAlive(tar)
	if _, err := table.Index(nil); err != nil {
		b.Fatal(err)
	}
}
