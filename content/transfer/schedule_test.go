package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// paced answers every request at that pace, in bytes a second.
func paced(rate int64) func(context.Context, int, int64, int64) (fakeReply, error) {
	return func(context.Context, int, int64, int64) (fakeReply, error) {
		return fakeReply{latency: time.Duration(64<<10) * time.Second / time.Duration(rate)}, nil
	}
}

// TestRetryAfterHoldsForAll has one transfer told to come back later: no other one asks before, also of another
// manager.
func TestRetryAfterHoldsForAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		one, oneBlob := randomBlob(1, 4<<20)
		two, twoBlob := randomBlob(2, 4<<20)
		hosts := NewHosts(HostLimits{})
		start := time.Now()
		first := &fakeSource{host: "a", data: one, reply: func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
			if call == 1 {
				return fakeReply{}, retryLater{5 * time.Second}
			}
			return fakeReply{}, nil
		}}
		second := &fakeSource{host: "a", data: two, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
			if d := time.Since(start); d < 5*time.Second {
				t.Errorf("asked after %s", d)
			}
			return fakeReply{}, nil
		}}
		h := join(t, newManager(t, t.TempDir(), Options{Hosts: hosts}), oneBlob, first)
		time.Sleep(time.Second)
		other := join(t, newManager(t, t.TempDir(), Options{Hosts: hosts}), twoBlob, second)
		wait(t, h)
		wait(t, other)
		if took := time.Since(start); took > 6*time.Second {
			t.Errorf("took %s", took)
		}
	})
}

// TestAbsentHostIsKnown has nobody listen at a mirror: the first transfer finds out, the next ones do not try.
func TestAbsentHostIsKnown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, t.TempDir(), Options{})
		refuse := func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{}, fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
		}
		for i := range byte(3) {
			data, b := randomBlob(i, 1<<20)
			mirror := &fakeSource{host: "mirror", reply: refuse}
			origin := &fakeSource{host: "origin", tier: 1, data: data}
			start := time.Now()
			wait(t, join(t, m, b, mirror, origin))
			calls, _ := mirror.stats()
			if most := map[bool]int{true: absentTries}[i == 0]; calls > most {
				t.Errorf("blob %d: the mirror was asked %d times, want at most %d", i, calls, most)
			}
			if took := time.Since(start); took > time.Second {
				t.Errorf("blob %d: took %s", i, took)
			}
		}
	})
}

// TestSilentMirror has mirrors that take requests and never answer, before a good server: the first blob loses a moment,
// those after it none.
func TestSilentMirror(t *testing.T) {
	t.Parallel()
	silent := func(ctx context.Context, _ int, _, _ int64) (fakeReply, error) {
		<-ctx.Done()
		return fakeReply{}, context.Cause(ctx)
	}
	for name, last := range map[string]int{"from the start": 0, "half-way": 8} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
				for i := range 4 {
					data, b := randomBlob(byte(i), 16<<20)
					mirror := &fakeSource{host: "mirror", data: data, reply: func(ctx context.Context, call int, off, n int64) (fakeReply, error) {
						if i > 0 || call > last {
							return silent(ctx, call, off, n)
						}
						return fakeReply{latency: 10 * time.Millisecond}, nil
					}}
					origin := &fakeSource{host: "origin", tier: 1, data: data}
					start := time.Now()
					wait(t, join(t, m, b, mirror, origin))
					took, most := time.Since(start), 2*time.Second
					if last > 0 {
						most = 6 * time.Second
					}
					if i > 0 {
						most = 0
					}
					if took > most {
						t.Errorf("blob %d: took %s, want at most %s", i, took, most)
					}
				}
			})
		})
	}
}

func TestTiers(t *testing.T) {
	t.Parallel()
	fail := func(err error) func(context.Context, int, int64, int64) (fakeReply, error) {
		return func(context.Context, int, int64, int64) (fakeReply, error) { return fakeReply{}, err }
	}
	silent := func(ctx context.Context, _ int, _, _ int64) (fakeReply, error) {
		<-ctx.Done()
		return fakeReply{}, context.Cause(ctx)
	}
	const rate = 1 << 20
	for _, tc := range []struct {
		name        string
		one, two    func(context.Context, int, int64, int64) (fakeReply, error)
		mirrors     [2]bool // have a part
		origin      bool    // has a part
		from, under time.Duration
	}{
		{"mirrors share", paced(rate), paced(rate), [2]bool{true, true}, false, 0, 3 * time.Second},
		{"one mirror is left", fail(errdefs.ErrNotFound), paced(rate), [2]bool{false, true}, false, 0, 6 * time.Second},
		{"no mirror has it", fail(errdefs.ErrNotFound), fail(errdefs.ErrPermissionDenied), [2]bool{}, true, 0, 5 * time.Second},
		{"mirrors fail", fail(errReset), fail(errReset), [2]bool{}, true, downTime, 8 * time.Second},
		{"mirrors say later", fail(retryLater{time.Hour}), fail(retryLater{time.Hour}), [2]bool{}, true, 0, 5 * time.Second},
		{"mirrors are silent", silent, silent, [2]bool{}, true, 0, 15 * time.Second},
		{"a slow mirror", paced(rate), paced(rate / 20), [2]bool{true, true}, false, 0, 7 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, b := randomBlob(3, 32<<20)
				m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 8})
				one := &fakeSource{host: "one", data: data, reply: tc.one}
				two := &fakeSource{host: "two", data: data, reply: tc.two}
				origin := &fakeSource{host: "origin", tier: 1, data: data, reply: paced(rate)}
				start := time.Now()
				h := join(t, m, b, origin, one, two)
				wait(t, h)
				took := time.Since(start)
				_, sent1 := one.stats()
				_, sent2 := two.stats()
				_, sent3 := origin.stats()
				t.Logf("%d + %d from the mirrors, %d from the origin in %s", sent1, sent2, sent3, took)
				if [2]bool{sent1 > 0, sent2 > 0} != tc.mirrors || (sent3 > 0) != tc.origin {
					t.Errorf("%d and %d bytes from the mirrors, %d from the origin", sent1, sent2, sent3)
				}
				if sent := sent1 + sent2 + sent3; sent > b.Size+2*recordStep {
					t.Errorf("sent %d bytes for %d", sent, b.Size)
				}
				if took < tc.from || took > tc.under {
					t.Errorf("took %s, want %s to %s", took, tc.from, tc.under)
				}
			})
		})
	}
}

// TestCrawlingEnd has the last chunk come at a crawl while others were fast: its end is fetched by another connection
// and no byte comes twice but for what the slow socket held.
func TestCrawlingEnd(t *testing.T) {
	t.Parallel()
	for name, crawl := range map[string]fakeReply{
		"slow":        {latency: 10 * time.Second},
		"still":       {cut: 100_000, stall: true},
		"first chunk": {latency: 10 * time.Second},
		// The one connection that is left, for it cannot be split, brings the host's pace down to its own.
		"trickle":        {latency: time.Second, piece: 1000},
		"trickle, twice": {latency: time.Second, piece: 1000},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, b := randomBlob(3, 32<<20)
				bad := int64(29 << 20)
				if name == "first chunk" {
					bad = 0
				}
				var crawls atomic.Int64
				src := &fakeSource{host: "a", data: data, reply: func(_ context.Context, _ int, off, _ int64) (fakeReply, error) {
					again := name == "trickle, twice" && off%blockSize != 0
					if off >= bad && (crawls.CompareAndSwap(0, 1) || again && crawls.CompareAndSwap(1, 2)) {
						return crawl, nil
					}
					return fakeReply{latency: 10 * time.Millisecond}, nil
				}}
				m := newManager(t, t.TempDir(), Options{ChunkSize: 2 << 20, ConnectionsPerHost: 4})
				start := time.Now()
				h := join(t, m, b, src)
				got, err := readAll(t, h)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("read %d bytes, %v", len(got), err)
				}
				_, sent := src.stats()
				t.Logf("sent %d for %d in %s", sent, b.Size, time.Since(start))
				if sent > b.Size+recordStep {
					t.Errorf("sent %d bytes for %d", sent, b.Size)
				}
				most := 6 * time.Second
				if crawl.piece > 0 {
					most = time.Duration(crawls.Load()) * 17 * time.Second
				}
				if took := time.Since(start); took > most {
					t.Errorf("took %s, want at most %s", took, most)
				}
			})
		})
	}
}

// TestTrickle has a host send next to nothing: that counts as a stall where another try may be better, and not where
// all are slow.
func TestTrickle(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		other bool // there is a better host in the second tier
		calls int
		took  time.Duration
	}{
		{"another host", true, 3, 20 * time.Second},
		{"nobody else", false, 1, 1100 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, b := randomBlob(3, 1<<20)
				slow := &fakeSource{host: "slow", data: data, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
					return fakeReply{latency: time.Second, piece: 1000}, nil
				}}
				srcs := []Source{slow}
				if tc.other {
					srcs = append(srcs, &fakeSource{host: "fast", tier: 1, data: data})
				}
				start := time.Now()
				wait(t, join(t, newManager(t, t.TempDir(), Options{}), b, srcs...))
				if calls, _ := slow.stats(); calls > tc.calls {
					t.Errorf("the slow host was asked %d times, want at most %d", calls, tc.calls)
				}
				if took := time.Since(start); took > tc.took {
					t.Errorf("took %s, want at most %s", took, tc.took)
				}
			})
		})
	}
}

// TestFairShares lets transfers of two images compete for one host, and looks at who has how many connections.
func TestFairShares(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 8})
		var open [4]int
		var mu sync.Mutex
		for i, image := range []string{"big", "big", "big", "small"} {
			data, b := randomBlob(byte(i), 24<<20)
			src := &fakeSource{host: "a", data: data, reply: paced(256 << 10), inFlight: func(d int) {
				mu.Lock()
				defer mu.Unlock()
				open[i] += d
			}}
			h, err := m.Join(t.Context(), image, b, src)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = h.Close() })
		}
		time.Sleep(13 * time.Second) // three rounds of chunks
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		if big := open[0] + open[1] + open[2]; big != 4 || open[3] != 4 || min(open[0], open[1], open[2]) == 0 {
			t.Errorf("connections %v, want the images to have 4 each and every blob some", open)
		}
	})
}

// TestSlowHostLeavesRoom has a slow host take all connections it can get: another one finds room at once.
func TestSlowHostLeavesRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		hosts := NewHosts(HostLimits{PerHost: 16, Total: 16})
		m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, Hosts: hosts})
		for i := range byte(2) {
			data, b := randomBlob(i, 24<<20)
			join(t, m, b, &fakeSource{host: fmt.Sprint("slow", i), data: data, reply: paced(10 << 10)})
		}
		time.Sleep(100 * time.Second)
		data, b := randomBlob(9, 4<<20)
		start := time.Now()
		wait(t, join(t, m, b, &fakeSource{host: "fast", data: data, reply: paced(1 << 20)}))
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("took %s beside a slow host", took)
		}
		hosts.mu.Lock()
		defer hosts.mu.Unlock()
		if hosts.used > 16 {
			t.Errorf("%d connections, want at most 16", hosts.used)
		}
	})
}

// TestChunksShrink looks at the requests for a blob: many at first and smaller ones at the end.
func TestChunksShrink(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(1, 64<<20)
		src := &fakeSource{host: "a", data: data, reply: paced(25 << 20)}
		m := newManager(t, t.TempDir(), Options{ConnectionsPerHost: 4})
		wait(t, join(t, m, b, src))
		first, last := src.ranges[1], src.ranges[len(src.ranges)-1]
		if first.end-first.off < 4<<20 || last.end-last.off > chunkMin {
			t.Errorf("the first request is for %d bytes, the last for %d", first.end-first.off, last.end-last.off)
		}
		if n := len(src.ranges); n > 40 {
			t.Errorf("%d requests", n)
		}
	})
}

// TestStuckSaysWhy has a transfer end that never asked itself: it tells what another one saw.
func TestStuckSaysWhy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, b := randomBlob(1, 4<<20)
		_, c := randomBlob(2, 4<<20)
		m := newManager(t, t.TempDir(), Options{GiveUp: 3 * time.Second})
		later := func(context.Context, int, int64, int64) (fakeReply, error) { return fakeReply{}, retryLater{time.Hour} }
		one := join(t, m, b, &fakeSource{host: "a", reply: later})
		time.Sleep(time.Second)
		two := join(t, m, c, &fakeSource{host: "a", reply: later})
		for _, h := range []*Handle{one, two} {
			err := h.Wait(t.Context())
			if !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "host a, attempt 1: 429") || !strings.Contains(err.Error(), h.Digest().String()) {
				t.Errorf("got %v", err)
			}
		}
	})
}

// TestWaitersHearOfRetryAfter has a transfer wait for a host when another one is told to come back later, and then goes
// away.
func TestWaitersHearOfRetryAfter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		one, oneBlob := randomBlob(1, 1<<20)
		two, twoBlob := randomBlob(2, 1<<20)
		m := newManager(t, t.TempDir(), Options{ConnectionsPerHost: 1, Grace: time.Nanosecond})
		first := join(t, m, oneBlob, &fakeSource{host: "a", data: one, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
			time.Sleep(2 * time.Second)
			return fakeReply{}, retryLater{10 * time.Second}
		}})
		time.Sleep(time.Second)
		start := time.Now()
		second := join(t, m, twoBlob, &fakeSource{host: "a", data: two})
		time.Sleep(2 * time.Second)
		_ = first.Close()
		wait(t, second)
		if took := time.Since(start); took < 11*time.Second || took > 12*time.Second {
			t.Errorf("took %s, want 11s", took)
		}
	})
}

// TestSlowFirstAnswer has a host take its time before it sends anything: nobody knows a better one, so it is let be.
func TestSlowFirstAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(1, 4<<20)
		src := &fakeSource{host: "a", data: data, reply: func(ctx context.Context, _ int, _, _ int64) (fakeReply, error) {
			return fakeReply{}, sleep(ctx, 4*time.Second)
		}}
		wait(t, join(t, newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20}), b, src))
		if calls, _ := src.stats(); calls != 4 {
			t.Errorf("%d requests, want 4", calls)
		}
	})
}

// TestKillCostsLittle copies the root as a kill leaves it while every connection is in the middle of a block: what is
// fetched again is less than a step of each.
func TestKillCostsLittle(t *testing.T) {
	t.Parallel()
	const conns, arrived = 4, 200_000
	data, b := randomBlob(1, 4<<20)
	root := t.TempDir()
	m := newManager(t, root, Options{ChunkSize: 1 << 20, ConnectionsPerHost: conns})
	src := &fakeSource{host: "a", data: data, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
		return fakeReply{cut: arrived, stall: true}, nil
	}}
	join(t, m, b, src)
	const kept = arrived / recordStep * recordStep
	eventually(t, "all connections to be in the middle", func() bool { return m.List()[0].Received == conns*kept })
	if n := m.List()[0].Connections; n != conns {
		t.Errorf("the list says %d connections, want %d", n, conns)
	}
	again := &fakeSource{host: "b", data: data}
	wait(t, join(t, newManager(t, copyRoot(t, root), Options{}), b, again))
	if _, sent := again.stats(); sent != b.Size-conns*kept {
		t.Errorf("fetched %d bytes after the kill, want %d", sent, b.Size-conns*kept)
	}
}
