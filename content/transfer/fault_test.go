package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// retryLater is what a registry's 429 becomes.
type retryLater struct{ after time.Duration }

func (e retryLater) Error() string             { return fmt.Sprintf("429, retry after %s", e.after) }
func (e retryLater) RetryAfter() time.Duration { return e.after }
func (e retryLater) Unwrap() error             { return errdefs.ErrUnavailable }

var errReset = fmt.Errorf("connection reset: %w", errdefs.ErrUnavailable)

// TestOneHost has a single host misbehave in ways that a transfer survives. The clock is virtual.
func TestOneHost(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		reply func(ctx context.Context, call int, off, n int64) (fakeReply, error)
		sent  int64 // most bytes, above the blob's
		took  time.Duration
	}{
		{"short bodies", func(_ context.Context, _ int, off, n int64) (fakeReply, error) {
			return fakeReply{off: off, n: max(1, n/3), cut: max(1, n/3)}, nil
		}, 0, 0},
		{"cut in the middle", func(_ context.Context, _ int, _, _ int64) (fakeReply, error) {
			return fakeReply{cut: 700_001}, nil
		}, 0, 0},
		{"reset in the middle", func(_ context.Context, _ int, _, _ int64) (fakeReply, error) {
			return fakeReply{cut: 300_001, err: errReset}, nil
		}, 0, 0},
		{"every other request fails", func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
			if call%2 == 0 {
				return fakeReply{}, errReset
			}
			return fakeReply{}, nil
		}, 0, time.Minute},
		{"ranges ignored", func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{whole: true}, nil
		}, 0, 0},
		{"ranges ignored, no length", func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{whole: true, off: 0, n: -1}, nil
		}, 0, 0},
		{"ranges ignored and cut once", func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
			if call == 1 {
				return fakeReply{whole: true, cut: 3<<20 + 77}, nil
			}
			return fakeReply{whole: true}, nil
		}, 3<<20 + 77, time.Second},
		{"ranges ignored later on", func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
			return fakeReply{whole: call > 4}, nil
		}, 8 << 20, time.Second},
		{"retry after", func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
			if call == 3 {
				return fakeReply{}, retryLater{40 * time.Second}
			}
			return fakeReply{latency: 100 * time.Millisecond}, nil
		}, 0, time.Minute},
		{"a stalled connection", func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
			if call == 3 {
				return fakeReply{cut: 10, stall: true}, nil
			}
			return fakeReply{latency: 10 * time.Millisecond}, nil
		}, 0, 17 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, b := randomBlob(1, 8<<20+999)
				src := &fakeSource{host: "a", data: data, reply: tc.reply}
				m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
				start := time.Now()
				h := join(t, m, b, src)
				got, err := readAll(t, h)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("read %d bytes, %v", len(got), err)
				}
				if _, sent := src.stats(); sent > b.Size+tc.sent {
					t.Errorf("sent %d bytes, want at most %d + %d", sent, b.Size, tc.sent)
				}
				if took := time.Since(start); took > tc.took {
					t.Errorf("took %s, want at most %s", took, tc.took)
				}
			})
		})
	}
}

// TestWrongRanges has a host that sends other parts than it was asked for, from some request on, and the whole blob to
// who asks for that. None of the wrong bytes is stored, and the host is read as one plain stream.
func TestWrongRanges(t *testing.T) {
	t.Parallel()
	for name, from := range map[string]int{"always": 1, "later": 6} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, b := randomBlob(2, 8<<20+999)
				var whole atomic.Int32
				src := &fakeSource{host: "a", data: data, reply: func(_ context.Context, call int, off, n int64) (fakeReply, error) {
					switch {
					case n == b.Size:
						whole.Add(1)
					case call >= from:
						return fakeReply{off: off + 1, n: n}, nil
					}
					return fakeReply{}, nil
				}}
				m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
				h := join(t, m, b, src)
				wait(t, h)
				if got, err := readAll(t, h); err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %d bytes, %v", len(got), err)
				}
				if whole.Load() != 1 {
					t.Errorf("the whole blob was asked for %d times, want once", whole.Load())
				}
			})
		})
	}
}

// TestOtherSizes has a host that says now and then that the blob has another size. It sent some of it as asked, so that is no
// word against who stated the size: the blob is complete, and no more than once asked for as a whole.
func TestOtherSizes(t *testing.T) {
	t.Parallel()
	for name, says := range map[string]func(call int) bool{
		"at first":       func(call int) bool { return call == 1 },
		"once":           func(call int) bool { return call == 4 },
		"now and then":   func(call int) bool { return call%4 == 0 },
		"from some time": func(call int) bool { return call > 3 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, b := randomBlob(3, 8<<20+999)
				src := &fakeSource{host: "a", data: data, reply: func(_ context.Context, call int, _, n int64) (fakeReply, error) {
					if n < b.Size && says(call) {
						return fakeReply{}, fmt.Errorf("blob of 1 byte: %w", ErrWrongSize)
					}
					return fakeReply{}, nil
				}}
				m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
				h := join(t, m, b, src)
				wait(t, h)
				if got, err := readAll(t, h); err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %d bytes, %v", len(got), err)
				}
			})
		})
	}
}

// TestOutage has the only host fail for some time in the middle: the transfer goes on soon after it is well again.
func TestOutage(t *testing.T) {
	t.Parallel()
	const out = 20 * time.Second
	for name, err := range map[string]error{"answers 500": errdefs.ErrUnavailable, "is not there": syscall.ECONNREFUSED} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, b := randomBlob(3, 16<<20)
				start := time.Now()
				src := &fakeSource{host: "a", data: data, reply: func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
					if call > 8 && time.Since(start) < out {
						return fakeReply{}, err
					}
					return fakeReply{latency: time.Millisecond}, nil
				}}
				m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
				wait(t, join(t, m, b, src))
				if took := time.Since(start); took > out+backoffMax+time.Second {
					t.Errorf("took %s, want little more than the outage's %s", took, out)
				}
				if calls, sent := src.stats(); sent != b.Size || calls > 16+30 {
					t.Errorf("sent %d bytes for %d in %d requests", sent, b.Size, calls)
				}
			})
		})
	}
}

// TestMistakenHostStaysPlain has a right reply, asked for before the first mistake, come after it: the host is not asked for
// ranges again.
func TestMistakenHostStaysPlain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(3, 8<<20)
		var mistaken, after atomic.Bool
		src := &fakeSource{host: "a", data: data, reply: func(_ context.Context, call int, off, n int64) (fakeReply, error) {
			switch {
			case n == b.Size:
			case call == 2:
				mistaken.Store(true)
				return fakeReply{off: off + 1, n: n}, nil
			case call == 3:
				time.Sleep(time.Second)
			case mistaken.Load():
				after.Store(true)
			}
			return fakeReply{}, nil
		}}
		m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, Hosts: NewHosts(HostLimits{PerHost: 2})})
		h := join(t, m, b, src)
		wait(t, h)
		if got, err := readAll(t, h); err != nil || !bytes.Equal(got, data) {
			t.Errorf("read %d bytes, %v", len(got), err)
		}
		if after.Load() {
			t.Error("a range was asked for after the host had mistaken one")
		}
	})
}

// TestGivesUp shows when and how a transfer ends that cannot be completed.
func TestGivesUp(t *testing.T) {
	t.Parallel()
	refuse := func(err error) func(context.Context, int, int64, int64) (fakeReply, error) {
		return func(context.Context, int, int64, int64) (fakeReply, error) { return fakeReply{}, err }
	}
	half := func(after error) func(context.Context, int, int64, int64) (fakeReply, error) {
		return func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
			if call > 4 {
				return fakeReply{}, after
			}
			return fakeReply{}, nil
		}
	}
	for _, tc := range []struct {
		name     string
		reply    func(context.Context, int, int64, int64) (fakeReply, error)
		is       error
		says     string
		from, to time.Duration
		frontier int64
	}{
		{"not found", refuse(errdefs.ErrNotFound), errdefs.ErrNotFound, "host a, attempt 1", 0, 0, 0},
		{"unauthenticated", refuse(errdefs.ErrUnauthenticated), errdefs.ErrUnauthenticated, "host a", 0, 0, 0},
		{"forbidden half-way", half(errdefs.ErrPermissionDenied), errdefs.ErrPermissionDenied, "host a", 0, 0, 4 << 20},
		{"unreachable", refuse(errReset), errdefs.ErrUnavailable, "connection reset", 5 * time.Second, 5 * time.Second, 0},
		{"silent", func(ctx context.Context, _ int, _, _ int64) (fakeReply, error) {
			<-ctx.Done()
			return fakeReply{}, context.Cause(ctx)
		}, errdefs.ErrUnavailable, "host a, attempt 1: no reply", 5 * time.Second, 5 * time.Second, 0},
		{"dies half-way", half(errReset), errdefs.ErrUnavailable, "no progress for 2m0s, 4194304 of 8389607 bytes are there", 2 * time.Minute, 2*time.Minute + time.Second, 4 << 20},
		{"another place", func(_ context.Context, _ int, off, n int64) (fakeReply, error) {
			return fakeReply{off: off + 1, n: n}, nil
		}, ErrWrongRange, "attempt 2: asked for 8389607 bytes from 0", 0, 0, 0},
		{"more than asked for", func(_ context.Context, _ int, off, n int64) (fakeReply, error) {
			return fakeReply{off: off, n: n + 1}, nil
		}, ErrWrongRange, "attempt 2: asked for 8389607 bytes from 0, the reply says 8389608", 0, 0, 0},
		{"whole, always cut at the same place", func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{whole: true, cut: 1 << 20}, nil
		}, errdefs.ErrUnavailable, "ended the reply early", 0, 10 * time.Second, 1 << 20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, b := randomBlob(2, 8<<20+999)
				src := &fakeSource{host: "a", data: data, reply: tc.reply}
				m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1})
				start := time.Now()
				h := join(t, m, b, src)
				err := h.Wait(t.Context())
				if !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), b.Digest.String()) {
					t.Errorf("got %v, want %v saying %q", err, tc.is, tc.says)
				}
				if took := time.Since(start); took < tc.from || took > tc.to {
					t.Errorf("took %s, want %s to %s", took, tc.from, tc.to)
				}
				partlyThere(t, h, data, tc.frontier)
				if l := m.List(); len(l) != 1 || l[0].Phase != PhaseFailed || l[0].Frontier != tc.frontier {
					t.Errorf("list: %+v", l)
				}
				// It goes on from there with a better host.
				good := &fakeSource{host: "b", data: data}
				again := join(t, m, b, good)
				wait(t, again)
				if _, sent := good.stats(); sent != b.Size-tc.frontier {
					t.Errorf("the second transfer fetched %d bytes, want %d", sent, b.Size-tc.frontier)
				}
				partlyThere(t, h, data, tc.frontier)
			})
		})
	}
}

// cloned returns a file that got the contiguous part from off on, and what CloneTo said.
func cloned(t *testing.T, h *Handle, off int64) (got []byte, n int64, err error) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "clone"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := f.Truncate(off); err != nil {
		t.Fatal(err)
	}
	n, cloneErr := h.CloneTo(t.Context(), f, off)
	got, err = os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return got, n, cloneErr
}

// partlyThere wants the contiguous part of a failed transfer to be readable and nothing else.
func partlyThere(t *testing.T, h *Handle, data []byte, frontier int64) {
	t.Helper()
	if h.Frontier() != frontier {
		t.Errorf("frontier %d, want %d", h.Frontier(), frontier)
	}
	for _, off := range []int64{0, frontier / 3, frontier} {
		if got, n, err := cloned(t, h, off); n != frontier-off || err != nil || !bytes.Equal(got[off:], data[off:frontier]) {
			t.Errorf("from %d on: copied %d bytes, %v; want %d", off, n, err, frontier-off)
		}
	}
	got, err := readAll(t, h)
	if int64(len(got)) != frontier || err == nil || !errors.Is(err, h.Wait(t.Context())) {
		t.Errorf("read %d bytes, %v; want %d and the transfer's error", len(got), err, frontier)
	}
}

func TestFailover(t *testing.T) {
	t.Parallel()
	silent := func(ctx context.Context, _ int, _, _ int64) (fakeReply, error) {
		<-ctx.Done()
		return fakeReply{}, context.Cause(ctx)
	}
	for _, tc := range []struct {
		name  string
		first func(context.Context, int, int64, int64) (fakeReply, error)
		took  time.Duration
	}{
		{"not found", func(context.Context, int, int64, int64) (fakeReply, error) { return fakeReply{}, errdefs.ErrNotFound }, 0},
		{"unreachable", func(context.Context, int, int64, int64) (fakeReply, error) { return fakeReply{}, errReset }, time.Second},
		{"silent", silent, 3 * time.Second},
		{"lies about the place", func(context.Context, int, int64, int64) (fakeReply, error) { return fakeReply{off: 5, n: 5}, nil }, 0},
		{"throttles", func(context.Context, int, int64, int64) (fakeReply, error) { return fakeReply{}, retryLater{time.Hour} }, 0},
		{"dies half-way", func(ctx context.Context, call int, off, n int64) (fakeReply, error) {
			if call > 3 {
				return silent(ctx, call, off, n)
			}
			return fakeReply{}, nil
		}, 16 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, b := randomBlob(3, 8<<20)
				one := &fakeSource{host: "mirror", data: data, reply: tc.first}
				two := &fakeSource{host: "origin", data: data}
				m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
				start := time.Now()
				wait(t, join(t, m, b, one, two))
				if took := time.Since(start); took > tc.took {
					t.Errorf("took %s, want at most %s", took, tc.took)
				}
				_, sent1 := one.stats()
				_, sent2 := two.stats()
				if sent1+sent2 != b.Size {
					t.Errorf("sent %d + %d, want %d", sent1, sent2, b.Size)
				}
			})
		})
	}
}

// TestLaterSource has a second waiter save a transfer whose only host is dead.
func TestLaterSource(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(3, 8<<20)
		m := newManager(t, t.TempDir(), Options{})
		h := join(t, m, b, &fakeSource{host: "a", reply: func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{}, errReset
		}})
		time.Sleep(4 * time.Second)
		join(t, m, b, &fakeSource{host: "b", data: data})
		wait(t, h)
	})
}

func TestMismatch(t *testing.T) {
	t.Parallel()
	flip := func(first, last int) func(context.Context, int, int64, int64) (fakeReply, error) {
		return func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
			return fakeReply{flip: call >= first && call <= last}, nil
		}
	}
	type mirror struct {
		host  string
		reply func(context.Context, int, int64, int64) (fakeReply, error)
	}
	for _, tc := range []struct {
		name string
		from []mirror
		good bool
		says []string
	}{
		{"one host, wrong once", []mirror{{"a", flip(2, 2)}}, true, nil},
		{"one host, always wrong", []mirror{{"a", flip(1, 1000)}}, false, []string{"digest mismatch: a sent"}},
		{"first wrong, second good", []mirror{{"a", flip(1, 1000)}, {"b", nil}}, true, nil},
		{"both wrong", []mirror{{"a", flip(1, 1000)}, {"b", flip(1, 1000)}}, false, []string{"a sent", "b sent"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			data, b := randomBlob(4, 4<<20)
			var srcs []Source
			for _, f := range tc.from {
				srcs = append(srcs, &fakeSource{host: f.host, data: data, reply: f.reply})
			}
			m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
			h, other := join(t, m, b, srcs...), join(t, m, b)
			var got []byte
			var err error
			restarts := 0
			for got, err = readAll(t, h); errors.Is(err, ErrRestarted); got, err = readAll(t, h) {
				restarts++
			}
			if tc.good {
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %d bytes, %v", len(got), err)
				}
				wait(t, h)
				wait(t, other) // has read nothing wrong
				return
			}
			for _, want := range append(tc.says, b.Digest.String()) {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want it to say %q", err, want)
				}
			}
			if err := other.Wait(t.Context()); !errdefs.IsDataLoss(err) {
				t.Errorf("got %v, want data loss", err)
			}
			if _, err := os.Stat(dataPath(m, b)); !os.IsNotExist(err) {
				t.Errorf("the data was not dropped: %v", err)
			}
			if _, n, err := cloned(t, other, 0); n != 0 {
				t.Errorf("copied %d wrong bytes, %v", n, err)
			}
		})
	}
}

// TestRestartIsNoticed has a reader read all but the end before the mismatch is found.
func TestRestartIsNoticed(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(5, 4<<20)
	hold := make(chan struct{})
	src := &fakeSource{host: "a", data: data}
	src.reply = func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
		if call == 4 {
			<-hold
		}
		return fakeReply{flip: call == 1}, nil
	}
	m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1})
	h := join(t, m, b, src)
	buf := make([]byte, 10)
	if _, err := h.ReadAt(t.Context(), buf, 2<<20); err != nil {
		t.Fatal(err)
	}
	close(hold)
	if err := h.Wait(t.Context()); !errors.Is(err, ErrRestarted) {
		t.Errorf("wait: %v, want ErrRestarted", err)
	}
	for range 2 {
		if _, err := h.ReadAt(t.Context(), buf, 2<<20); !errors.Is(err, ErrRestarted) {
			t.Errorf("read: %v, want ErrRestarted", err)
		}
	}
	if got, err := readAll(t, h); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read again: %d bytes, %v", len(got), err)
	}
	wait(t, h)
}

// TestAbsentForAnotherBlob has a transfer learn from one before it that nobody listens. Host and attempt are said once.
func TestAbsentForAnotherBlob(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, t.TempDir(), Options{ConnectionsPerHost: 1})
		var err error
		for seed := range byte(2) {
			data, b := randomBlob(seed, 1<<20)
			h := join(t, m, b, &fakeSource{host: "a", data: data, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
				return fakeReply{}, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, syscall.ECONNREFUSED)
			}})
			err = h.Wait(t.Context())
		}
		if err == nil || strings.Count(err.Error(), "attempt") != 1 || strings.Count(err.Error(), "host a") != 1 {
			t.Errorf("got %v, want host and attempt in it once", err)
		}
	})
}
