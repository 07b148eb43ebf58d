package layer

import (
	"fmt"
	"io"
	"runtime"
	"testing"
)

// BenchmarkScan is the scan of tars of small files: the million of
// TestMillionEntries, and 80,000 files in 4,000 directories. ns/entry is without
// the time that it takes to make the stream.
func BenchmarkScan(b *testing.B) {
	for _, bc := range []struct {
		name    string
		entries int
		stream  func() io.Reader
	}{
		{"1M", million, func() io.Reader { return &manyEntries{} }},
		{"80k", 84_000, func() io.Reader { return &smallFiles{} }},
	} {
		b.Run(bc.name, func(b *testing.B) {
			begin := cpu(b).Seconds()
			for range 2 {
				if _, err := io.Copy(io.Discard, onlyReader{bc.stream()}); err != nil {
					b.Fatal(err)
				}
			}
			making := (cpu(b).Seconds() - begin) / 2
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			b.ReportAllocs()
			var table *Table
			begin = cpu(b).Seconds()
			for b.Loop() {
				var err error
				if table, err = Scan(b.Context(), onlyReader{bc.stream()}); err != nil || table.Len() != bc.entries {
					b.Fatal(table.Len(), err)
				}
			}
			spent := (cpu(b).Seconds()-begin)/float64(b.N) - making
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(spent*1e9/float64(bc.entries), "cpu-ns/entry")
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(bc.entries), "B/entry")
			runtime.KeepAlive(table)
		})
	}
}

// smallFiles is the tar of 80,000 files of up to 16 KiB.
type smallFiles struct {
	manyEntries
}

// Read implements io.Reader.
func (m *smallFiles) Read(p []byte) (int, error) {
	if len(m.pend) == 0 {
		if m.next > 84_000 {
			return 0, io.EOF
		}
		m.out = m.out[:0]
		switch i := m.next; {
		case i == 84_000:
			m.out = append(m.out, make([]byte, 1024)...)
		case i%21 == 0:
			m.dir = fmt.Sprintf("opt/venv/lib/python3.12/site-packages/package%d/sub%d", i/210, i/21)
			m.header('5', m.dir+"/", "", 0)
		default:
			size := i * 7919 % (16 << 10)
			m.header('0', m.dir+fmt.Sprintf("/module_%d.py", i), "", size)
			m.out = append(m.out, make([]byte, (size+511)&^511)...)
		}
		m.pend = m.out
		m.next++
	}
	return m.manyEntries.Read(p)
}
