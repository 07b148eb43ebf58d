package decompress

import (
	"runtime"
	"runtime/metrics"
)

// spare says whether this process leaves a processor idle: no more goroutines run or wait to run than there are processors.
// The caller, which runs, is one of them, so on two processors the stream's own chain may run beside it and nothing else.
// Those in the kernel are not counted, though some are busy there: others wait for good, as the one that receives signals
// does, and nothing tells them apart. It takes some 100 ns.
func spare() bool {
	samples := []metrics.Sample{
		{Name: "/sched/goroutines/running:goroutines"},
		{Name: "/sched/goroutines/runnable:goroutines"},
	}
	metrics.Read(samples)
	var busy uint64
	for _, s := range samples {
		if s.Value.Kind() != metrics.KindUint64 { // a runtime that does not count them
			return true
		}
		busy += s.Value.Uint64()
	}
	return busy <= uint64(runtime.GOMAXPROCS(0))
}
