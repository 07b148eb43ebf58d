package transfer

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// simHost is a host in virtual time: so many bytes a second for a connection and for all of them together, a latency,
// and a number of requests at once above which it answers 429.
type simHost struct {
	perConn, total float64
	latency        func(active int) time.Duration
	most           int
	tenth          bool  // answers 503 to one request in ten
	cut            int64 // ends every connection after that many bytes

	mu       sync.Mutex
	active   int
	peak     int
	refused  int
	requests []time.Time
}

func (s *simHost) enter(d int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.active += d
	s.peak = max(s.peak, s.active)
	if d > 0 {
		s.requests = append(s.requests, time.Now())
	}
	return s.active
}

// take is how long a connection needs for n bytes.
func (s *simHost) take(n int64) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	rate := s.perConn
	if s.total > 0 {
		rate = min(rate, s.total/float64(s.active))
	}
	return time.Duration(float64(n) / rate * float64(time.Second))
}

// fetch brings bytes in chunks over as many connections as there are to be had.
func (s *simHost) fetch(t *testing.T, hs *Hosts, image string, bytes, chunk int64) {
	t.Helper()
	h := hs.host("a")
	j := newJob("", Blob{Digest: digest.FromString(fmt.Sprint(image, bytes, time.Now())), Size: bytes}, Options{}, &shared{hosts: hs})
	j.image = image
	w := newWaiter(j)
	defer hs.leave(w)
	var wg sync.WaitGroup
	defer wg.Wait()
	var mu sync.Mutex
	for {
		mu.Lock()
		n := min(chunk, bytes)
		bytes -= n
		mu.Unlock()
		if n == 0 {
			wg.Wait()
			if bytes == 0 {
				return
			}
			continue
		}
		for got := (*hostState)(nil); got == nil; {
			wait := time.Duration(1 << 62)
			if v := hs.look(h); v.until.After(time.Now()) {
				wait = time.Until(v.until)
			}
			var err error
			if got, err = hs.acquire(t.Context(), w, []*hostState{h}, 4, nil, wait); err != nil {
				t.Error(err)
				return
			}
		}
		wg.Go(func() {
			if !s.request(hs, h, j, n) {
				mu.Lock()
				defer mu.Unlock()
				bytes += n
			}
		})
	}
}

func (s *simHost) request(hs *Hosts, h *hostState, j *job, n int64) bool {
	defer hs.release(h, j)
	begun := time.Now()
	active := s.enter(1)
	defer s.enter(-1)
	time.Sleep(s.latency(active))
	s.mu.Lock()
	refused := s.most > 0 && active > s.most || s.tenth && len(s.requests)%10 == 0
	if refused {
		s.refused++
	}
	s.mu.Unlock()
	if refused {
		hs.failure(h, begun, 0, retryLater{})
		return false
	}
	hs.answered(h, time.Since(begun))
	first := time.Now()
	const step = 8 << 10 // of 32 KiB a slow line brings each connection two in a window, or three: that looks like a gain
	for left := n; left > 0; left -= step {
		part := min(left, step)
		time.Sleep(s.take(part))
		hs.arrived(h, part)
	}
	hs.brought(h, n, time.Since(first))
	if s.cut > 0 && n == s.cut {
		hs.failure(h, begun, n, errReset)
	}
	return true
}

func every(d time.Duration) func(int) time.Duration { return func(int) time.Duration { return d } }

// TestConnectionsFindTheirLevel fetches from hosts of different kinds and looks at where the number of connections
// comes to rest, how far it went, and what that cost.
func TestConnectionsFindTheirLevel(t *testing.T) {
	t.Parallel()
	const mb = 1e6
	for _, tc := range []struct {
		name     string
		host     *simHost
		bytes    int64
		chunk    int64
		low, top int           // where it may rest
		peak     int           // the most at once
		took     time.Duration // at most
	}{
		{"capped connections", &simHost{perConn: 25 * mb, total: 250 * mb, latency: every(20 * time.Millisecond)}, 900 * mb, 8 << 20, 9, 16, 18, 4300 * time.Millisecond},
		{"two are enough", &simHost{perConn: 25 * mb, total: 50 * mb, latency: every(20 * time.Millisecond)}, 900 * mb, 8 << 20, 2, 8, 12, 20 * time.Second},
		{"one is enough", &simHost{perConn: 100 * mb, total: 100 * mb, latency: every(5 * time.Millisecond)}, 900 * mb, 8 << 20, 2, 8, 12, 9600 * time.Millisecond},
		{"no end", &simHost{perConn: 10 * mb, latency: every(20 * time.Millisecond)}, 2000 * mb, 8 << 20, 32, 32, 32, 8 * time.Second},
		{"far away", &simHost{perConn: 5 * mb, total: 80 * mb, latency: every(300 * time.Millisecond)}, 2000 * mb, 16 << 20, 12, 32, 32, 38 * time.Second},
		{"slow line", &simHost{perConn: 2 * mb, total: 2 * mb, latency: every(50 * time.Millisecond)}, 200 * mb, 1 << 20, 2, 8, 12, 110 * time.Second},
		{"queues", &simHost{perConn: 25 * mb, total: 100 * mb, latency: func(n int) time.Duration {
			return 20*time.Millisecond + time.Duration(max(0, n-4))*20*time.Millisecond
		}}, 2000 * mb, 8 << 20, 2, 8, 12, 24 * time.Second},
		{"503 to one in ten", &simHost{perConn: 25 * mb, total: 250 * mb, latency: every(20 * time.Millisecond), tenth: true}, 2000 * mb, 8 << 20, 2, 16, 18, 20 * time.Second},
		{"cut every 4 MiB", &simHost{perConn: 25 * mb, total: 250 * mb, latency: every(20 * time.Millisecond), cut: 4 << 20}, 2000 * mb, 4 << 20, 3, 16, 18, 20 * time.Second},
		{"refuses more than five", &simHost{perConn: 25 * mb, latency: every(20 * time.Millisecond), most: 5}, 2000 * mb, 8 << 20, 2, 7, 8, 24 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				hs := NewHosts(HostLimits{})
				start := time.Now()
				var wg sync.WaitGroup
				for i := range 3 {
					wg.Go(func() { tc.host.fetch(t, hs, fmt.Sprint("image", i%2), tc.bytes/3, tc.chunk) })
				}
				limit := rest(hs, &wg)
				took := time.Since(start)
				t.Logf("rests at %d, peak %d, took %s, refused %d of %d", limit, tc.host.peak, took, tc.host.refused, len(tc.host.requests))
				if limit < tc.low || limit > tc.top {
					t.Errorf("rests at %d connections, want %d to %d", limit, tc.low, tc.top)
				}
				if tc.host.peak > tc.peak {
					t.Errorf("%d connections at once, want at most %d", tc.host.peak, tc.peak)
				}
				if took > tc.took {
					t.Errorf("took %s, want at most %s", took, tc.took)
				}
			})
		})
	}
}

// rest waits for the transfers and says where the limit was in the middle of their second half: at any one moment it may be on
// trial.
func rest(hs *Hosts, transfers *sync.WaitGroup) int {
	done := make(chan struct{})
	go func() {
		transfers.Wait()
		close(done)
	}()
	var limits []int
	for {
		select {
		case <-time.After(10 * time.Millisecond):
			hs.mu.Lock()
			limits = append(limits, hs.hosts["a"].control.limit)
			hs.mu.Unlock()
		case <-done:
			half := limits[len(limits)/2:]
			slices.Sort(half)
			return half[len(half)/2]
		}
	}
}

// TestHostsAreForgotten bounds what is kept: names of hosts come from labels.
func TestHostsAreForgotten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		hs := NewHosts(HostLimits{})
		first := hs.host("first")
		first.used = 1
		for i := range 2 * knownHosts {
			time.Sleep(time.Millisecond)
			hs.host(fmt.Sprint(i))
		}
		if len(hs.hosts) > knownHosts {
			t.Errorf("%d hosts are remembered, want at most %d", len(hs.hosts), knownHosts)
		}
		if hs.host("first") != first {
			t.Error("a host in use was forgotten")
		}
		first.used = 0
		time.Sleep(2 * forgetHost)
		if hs.host("first") == first {
			t.Error("what a host was worth is kept for ever")
		}
	})
}
