package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"runtime"
	"testing"
)

// BenchmarkScan is the scan of tars of small files: the million of
// TestMillionEntries, and 80,000 files in 4,000 directories; beside it what of
// that reading the headers takes, and what it takes archive/tar. All are CPU time,
// without that of making the stream.
func BenchmarkScan(b *testing.B) {
	for _, bc := range []struct {
		name    string
		entries int
		stream  func() io.Reader
	}{
		{"1M", million, func() io.Reader { return &manyEntries{} }},
		{"80k", 84_000, func() io.Reader { return &sourceTree{limit: 84_000} }},
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
			begin = cpu(b).Seconds()
			for tr := tar.NewReader(onlyReader{bc.stream()}); ; {
				if _, err := tr.Next(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					b.Fatal(err)
				}
			}
			library := cpu(b).Seconds() - begin - making
			begin = cpu(b).Seconds()
			headersOnly(b, bc.stream())
			own := cpu(b).Seconds() - begin - making
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(spent*1e9/float64(bc.entries), "cpu-ns/entry")
			b.ReportMetric(own*1e9/float64(bc.entries), "headers-ns/entry")
			b.ReportMetric(library*1e9/float64(bc.entries), "archive/tar-ns/entry")
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(bc.entries), "B/entry")
			runtime.KeepAlive(table)
		})
	}
}

// headersOnly reads a tar as the scan does and makes nothing of it.
func headersOnly(b *testing.B, r io.Reader) {
	s := &scanner{tape: &tape{src: readerSource{onlyReader{r}}}, build: newBuilder(0)}
	s.headers.tape = s.tape
	for {
		hdr, err := s.headers.next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			b.Fatal(err)
		}
		end := s.tape.pos
		if hdr.Typeflag == tar.TypeReg {
			end += hdr.Size
		}
		s.headers.end = end
		s.tape.expect(end)
	}
}

// sourceTree is the tar of files of up to 16 KiB, 20 in a directory.
type sourceTree struct {
	manyEntries
	limit int // members
}

// Read implements io.Reader.
func (m *sourceTree) Read(p []byte) (int, error) {
	if len(m.pend) == 0 {
		if m.next > m.limit {
			return 0, io.EOF
		}
		m.out = m.out[:0]
		switch i := m.next; {
		case i == m.limit:
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
