package plugin

import (
	"os"
	"runtime/metrics"

	"github.com/containerd/log"

	"github.com/gantryd/gantry/plugin/status"
)

// processReport says what gantryd itself takes. The names are of runtime/metrics.
func processReport() status.Process {
	samples := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/gc/cycles/total:gc-cycles"}, {Name: "/sched/goroutines:goroutines"},
	}
	metrics.Read(samples)
	p := status.Process{
		HeapLive: int64(samples[0].Value.Uint64()), Collections: int64(samples[1].Value.Uint64()), Goroutines: int64(samples[2].Value.Uint64()),
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		log.L.WithError(err).Debug("open files are not counted")
		return p
	}
	p.OpenFiles = int64(len(open)) - 1 // the folder itself
	return p
}
