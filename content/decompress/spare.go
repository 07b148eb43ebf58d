package decompress

import (
	"runtime"
	"runtime/metrics"
)

// spare says whether this process leaves a processor idle: there are no more goroutines that run, wait for a processor
// or are in the kernel (where the writers of layers are) than processors. It takes some 100 ns. The caller, which
// runs, is one of them, so on two processors the stream's own chain may run beside it and nothing else.
func spare() bool {
	samples := []metrics.Sample{
		{Name: "/sched/goroutines/running:goroutines"},
		{Name: "/sched/goroutines/runnable:goroutines"},
		{Name: "/sched/goroutines/not-in-go:goroutines"},
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
