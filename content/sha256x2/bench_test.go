package sha256x2

import (
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkStreams prints the rates of one stream, and of two with and without pairs, by the clock and by the CPU time that
// the process used: MB/cpu-s is what counts where all cores are busy.
func BenchmarkStreams(b *testing.B) {
	const size, step = 64 << 20, 1 << 20
	data := make([]byte, step)
	for _, bm := range []struct {
		name    string
		streams int
		pool    *Pool
	}{
		{"one", 1, &Pool{}},
		{"two-unpaired", 2, &Pool{single: true}},
		{"two-paired", 2, &Pool{}},
		{"four-unpaired", 4, &Pool{single: true}},
		{"four-paired", 4, &Pool{}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.SetBytes(int64(size * bm.streams))
			alone, paired := bm.pool.Hashed()
			before := cpu(b)
			for b.Loop() {
				var g sync.WaitGroup
				for range bm.streams {
					g.Go(func() {
						h := bm.pool.New()
						for range size / step {
							_, _ = h.Write(data)
						}
					})
				}
				g.Wait()
			}
			b.ReportMetric(float64(b.N*size*bm.streams)/1e6/(cpu(b)-before).Seconds(), "MB/cpu-s")
			a, p := bm.pool.Hashed()
			if a, p = a-alone, p-paired; a+p > 0 {
				b.ReportMetric(100*float64(p)/float64(a+p), "%paired")
			}
		})
	}
}

// BenchmarkBlocks is the function of two lanes alone.
func BenchmarkBlocks(b *testing.B) {
	needLanes(b)
	var h [2][8]uint32
	data := make([]byte, 2*slice)
	b.SetBytes(2 * slice)
	for b.Loop() {
		blocks2(&h[0], &h[1], &data[0], &data[slice], slice/64)
	}
}

func cpu(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
