package transfer

import (
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestChunk(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for name, c := range map[string]struct {
		size, chunkSize int64
		pace            float64 // bytes a second
		latency         time.Duration
		conns           int
		want            int64
	}{
		"unknown host, small blob":     {36 * mib, 0, 0, 0, 8, 2304 << 10},
		"unknown host, large blob":     {1024 * mib, 0, 0, 0, 8, 8 * mib},
		"slow host gets little":        {1024 * mib, 0, 10_000, 0, 8, mib},
		"fast host gets more":          {1024 * mib, 0, 50 * mib, 0, 8, 20 * mib},
		"far host gets more":           {1024 * mib, 0, 5 * mib, 200 * time.Millisecond, 8, 15 * mib},
		"never more than the maximum":  {10240 * mib, 0, 1 << 40, 0, 8, 64 * mib},
		"no more than half its share":  {64 * mib, 0, 1 << 40, 0, 8, 4 * mib},
		"blob below the least request": {1000, 0, 1 << 40, 0, 1, mib},
		"what the administrator says":  {1024 * mib, 2 * mib, 1 << 40, 0, 8, 2 * mib},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hosts := NewHosts(HostLimits{})
			o := Options{ChunkSize: c.chunkSize}
			j := newJob("", Blob{Digest: digest.FromString(name), Size: c.size}, o, &shared{hosts: hosts})
			h := &host{shared: hosts.host("a")}
			if c.pace > 0 {
				hosts.brought(h.shared, int64(c.pace), time.Second)
			}
			if c.latency > 0 {
				hosts.answered(h.shared, c.latency)
			}
			if got := j.chunk(h, c.conns); got != c.want {
				t.Errorf("chunk of %d bytes, want %d", got, c.want)
			}
		})
	}
}

func TestPace(t *testing.T) {
	t.Parallel()
	hosts := NewHosts(HostLimits{})
	h := hosts.host("a")
	hosts.brought(h, 100, 0) // the clock did not move
	if want := 100_000.0; h.pace != want {
		t.Errorf("pace %v, want %v", h.pace, want)
	}
	hosts.brought(h, 50_000, time.Second)
	if want := 75_000.0; h.pace != want {
		t.Errorf("pace %v after a slower reply, want %v", h.pace, want)
	}
}
