package transfer

import (
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestNextChunk(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for name, c := range map[string]struct {
		size, chunkSize int64
		pace            float64 // bytes a second
		want            int64
	}{
		"unknown host, small blob":     {36 * mib, 0, 0, 1280 << 10},
		"unknown host, large blob":     {1024 * mib, 0, 0, 8 * mib},
		"slow host gets no less":       {1024 * mib, 0, 10_000, 8 * mib},
		"fast host gets more":          {1024 * mib, 0, 24 * mib, 12 * mib},
		"never more than the maximum":  {1024 * mib, 0, 1 << 40, 16 * mib},
		"no more than its share":       {36 * mib, 0, 1 << 40, 4864 << 10},
		"blob below the least request": {1000, 0, 1 << 40, mib},
		"what the administrator says":  {1024 * mib, 2 * mib, 1 << 40, 2 * mib},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := Options{ChunkSize: c.chunkSize, ConnectionsPerHost: 8}
			j := newJob("", Blob{Digest: digest.FromString(name), Size: c.size}, o, &shared{})
			if got := j.nextChunk(&host{pace: c.pace}); got != c.want {
				t.Errorf("chunk of %d bytes, want %d", got, c.want)
			}
		})
	}
}

func TestPace(t *testing.T) {
	t.Parallel()
	j := newJob("", Blob{}, Options{}, &shared{})
	h := &host{}
	j.paced(h, 100, 0) // the clock did not move
	if want := 100_000.0; h.pace != want {
		t.Errorf("pace %v, want %v", h.pace, want)
	}
	j.paced(h, 50_000, time.Second)
	if want := 75_000.0; h.pace != want {
		t.Errorf("pace %v after a slower reply, want %v", h.pace, want)
	}
}
