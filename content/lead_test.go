package content

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestOneFetchesForAll(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		frontier int64 // of the transfer that fails, -1: there is none
		want     int64 // bytes that clients write in all
	}{
		"no transfer":       {-1, 5000},
		"nothing came":      {0, 5000},
		"a part came":       {3000, 2000},
		"all but one came":  {4999, 1},
		"all came, no link": {5000, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, d := randomBytes(t, 5000)
				f := &fakeFetcher{}
				if tt.frontier >= 0 {
					f.transfer = newTransfer(t, data)
				}
				s := newStore(t, t.TempDir(), Options{Fetcher: f})
				clients := five(data, d)
				for _, c := range clients {
					c.start(t, s)
				}
				synctest.Wait()
				switch {
				case tt.frontier == 5000:
					f.transfer.file = ""
					f.transfer.finish()
				case tt.frontier >= 0:
					f.transfer.fail(tt.frontier)
				}
				if tt.want > 0 {
					leader := answered(t, clients)
					if st := leader.session.Stat(); st.Offset != max(tt.frontier, 0) {
						t.Errorf("the leader goes on from %d, wanted %d", st.Offset, tt.frontier)
					}
					leader.status <- nil
				}
				if got := goOn(t, clients); got != tt.want {
					t.Errorf("clients wrote %d bytes, wanted %d", got, tt.want)
				}
				wantBlob(t, s, data, true)
				if tt.frontier >= 0 {
					if waits, closed := f.transfer.counts(); waits != 5 || closed != 5 {
						t.Errorf("%d waits, %d closes, wanted five of each", waits, closed)
					}
				}
				wantNothingLeft(t, s)
			})
		})
	}
}

// However a leader ends, another goes on from its bytes.
func TestTheNextGoesOn(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		end   func(t *testing.T, s *Store, leader *client)
		after int64 // where the next one begins
	}{
		"it leaves": {func(t *testing.T, _ *Store, c *client) {
			if err := c.session.Close(); err != nil {
				t.Fatal(err)
			}
		}, 4000},
		"aborted": {func(t *testing.T, s *Store, c *client) {
			if err := s.Abort(t.Context(), c.ref()); err != nil {
				t.Fatal(err)
			}
			if err := c.session.Close(); err != nil {
				t.Fatal(err)
			}
		}, 4000},
		"left and aborted": {func(t *testing.T, s *Store, c *client) {
			if err := errors.Join(c.session.Close(), s.Abort(t.Context(), c.ref())); err != nil {
				t.Fatal(err)
			}
		}, 4000},
		"silent": {func(_ *testing.T, s *Store, _ *client) { time.Sleep(s.giveUp) }, 4000},
		"its commit fails": {func(t *testing.T, _ *Store, c *client) {
			_, err := c.session.Commit(t.Context(), 1000, 5000, c.d, nil)
			wantErr(t, err, errdefs.ErrFailedPrecondition)
		}, 4000},
		// The transfer has more than it has then.
		"began anew": {func(t *testing.T, _ *Store, c *client) {
			if _, err := c.session.Write(t.Context(), 0, c.data[:100]); err != nil {
				t.Fatal(err)
			}
			if err := c.session.Close(); err != nil {
				t.Fatal(err)
			}
		}, 3000},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, d := randomBytes(t, 5000)
				tr := newTransfer(t, data)
				s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: tr}})
				clients := five(data, d)
				for _, c := range clients {
					c.start(t, s)
				}
				synctest.Wait()
				tr.fail(3000)
				first := answered(t, clients)
				if err := first.write(t.Context(), 1000); err != nil {
					t.Fatal(err)
				}
				rest := without(clients, first)
				synctest.Wait()
				tt.end(t, s, first)
				second := answered(t, rest)
				if st := second.session.Stat(); st.Offset != tt.after {
					t.Errorf("the next one goes on from %d, wanted %d", st.Offset, tt.after)
				}
				wantDigest(t, second.session, digest.FromBytes(data[:tt.after]))
				second.status <- nil
				if got := goOn(t, rest); got != 5000-tt.after {
					t.Errorf("the others wrote %d bytes, wanted %d", got, 5000-tt.after)
				}
				wantBlob(t, s, data, true)
				if err := first.session.Close(); err != nil {
					t.Fatal(err)
				}
				_ = s.Abort(t.Context(), first.ref()) // some left an ingest behind
				wantNothingLeft(t, s)
			})
		})
	}
}

// The silent one wakes up: whoever finishes first publishes, the other adopts.
func TestALeaderComesBack(t *testing.T) {
	t.Parallel()
	for name, firstWins := range map[string]bool{"first": true, "second": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, d := randomBytes(t, 5000)
				o := &fakeObserver{}
				s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{}, Observer: o})
				o.store = s
				clients := five(data, d)
				for _, c := range clients {
					c.start(t, s)
				}
				first := answered(t, clients)
				if err := first.write(t.Context(), 1000); err != nil {
					t.Fatal(err)
				}
				g := o.follower(t, 0)
				read := readAll(t.Context(), g)
				time.Sleep(s.giveUp + time.Second)
				if got := <-read; !bytes.Equal(got, data[:1000]) {
					t.Errorf("an unpack read %d bytes of it", len(got))
				}
				wantErr(t, g.Verified(t.Context()), errdefs.ErrAborted)
				rest := without(clients, first)
				second := answered(t, rest)
				if err := second.write(t.Context(), 500); err != nil {
					t.Fatal(err)
				}
				if st := second.session.Stat(); st.Offset != 1500 {
					t.Errorf("the second is at %d, wanted 1500", st.Offset)
				}
				winner, loser := first, second
				if !firstWins {
					winner, loser = second, first
				}
				if err := winner.finish(t.Context()); err != nil {
					t.Fatal(err)
				}
				// The followers need not wait for the other.
				followers := without(rest, second)
				if got := goOn(t, followers); got != 0 {
					t.Errorf("followers wrote %d bytes, wanted none", got)
				}
				if err := loser.finish(t.Context()); err != nil {
					t.Fatal(err)
				}
				wantBlob(t, s, data, true)
				for i := range o.growing {
					if err := o.follower(t, i).Close(); err != nil {
						t.Fatal(err)
					}
				}
				wantNothingLeft(t, s)
			})
		})
	}
}

// A leader's wrong bytes harm nobody but itself.
func TestALeaderWritesSomethingElse(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		spoiled bool  // it is the transfer's bytes that are wrong
		after   int64 // where the next one begins
	}{
		"the client's bytes":   {false, 3000},
		"the transfer's bytes": {true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, d := randomBytes(t, 5000)
				bad := slices.Clone(data)
				bad[100] ^= 1
				brought := data
				if tt.spoiled {
					brought = bad
				}
				tr := newTransfer(t, brought)
				s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: tr}})
				clients := five(data, d)
				for _, c := range clients {
					c.start(t, s)
				}
				synctest.Wait()
				tr.fail(3000)
				first := answered(t, clients)
				if tt.spoiled {
					if err := first.write(t.Context(), 2000); err != nil {
						t.Fatal(err)
					}
				} else { // it begins anew
					_, err := first.session.Write(t.Context(), 0, data[3000:3001])
					if err == nil {
						_, err = first.session.Write(t.Context(), 0, bad)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				rest := without(clients, first)
				second := answered(t, rest)
				if st := second.session.Stat(); st.Offset != tt.after {
					t.Errorf("the next one goes on from %d, wanted %d", st.Offset, tt.after)
				}
				second.status <- nil
				if got := goOn(t, rest); got != 5000-tt.after {
					t.Errorf("the others wrote %d bytes, wanted %d", got, 5000-tt.after)
				}
				wantBlob(t, s, data, true)
				_, err := first.session.Commit(t.Context(), first.session.Stat().Offset-first.session.shift, 5000, d, nil)
				wantErr(t, err, errdefs.ErrFailedPrecondition)
				if err := s.Abort(t.Context(), first.ref()); err != nil {
					t.Fatal(err)
				}
				wantNothingLeft(t, s)
			})
		})
	}
}

// Where namespaces do not share, each has a leader of its own.
func TestIsolatedNamespacesFollowTheirOwn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, d := randomBytes(t, 5000)
		s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{}, Isolated: true})
		var clients []*client
		leaders := map[string]int{}
		for i, ns := range []string{"a", "b", "a", "b"} {
			c := newClient(ns, data, d)
			ctx := c.context(t.Context())
			var err error
			// Two clients of one namespace have refs of their own.
			if c.session, err = s.Open(ctx, fmt.Sprintf("%s/%d/layer-%s", ns, i, d), 5000, ""); err != nil {
				t.Fatal(err)
			}
			go func() {
				_, err := c.session.Status(ctx)
				c.status <- err
			}()
			clients = append(clients, c)
		}
		synctest.Wait()
		for _, c := range clients {
			if c.leads(t) {
				leaders[c.namespace]++
				c.status <- nil
			}
		}
		if leaders["a"] != 1 || leaders["b"] != 1 {
			t.Errorf("leaders %v, wanted one a namespace", leaders)
		}
		if got := goOn(t, clients); got != 10000 {
			t.Errorf("clients wrote %d bytes, wanted 5000 a namespace", got)
		}
		// What another namespace has is no secret of this store's, but not given away.
		late := newClient("c", data, d).start(t, s)
		answered(t, []*client{late})
		if st := late.session.Stat(); st.Offset != 0 {
			t.Errorf("a third namespace got %d bytes", st.Offset)
		}
		late.status <- nil
		goOn(t, []*client{late})
		wantNothingLeft(t, s)
	})
}

// Who comes late follows at once: no transfer fetches what a client fetches.
func TestLateComers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, d := randomBytes(t, 5000)
		f := &fakeFetcher{}
		s := newStore(t, t.TempDir(), Options{Fetcher: f})
		first := newClient("first", data, d)
		var err error
		// It writes without having asked.
		if first.session, err = s.Open(first.context(t.Context()), first.ref(), 5000, ""); err != nil {
			t.Fatal(err)
		}
		if err := first.write(t.Context(), 1000); err != nil {
			t.Fatal(err)
		}
		second := newClient("second", data, d).start(t, s)
		synctest.Wait()
		if second.leads(t) {
			t.Fatal("the second is to fetch too")
		}
		for first.session.Stat().Offset < 5000 {
			if err := first.write(t.Context(), 1000); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		// All is there though nobody has committed, also for a third.
		third := newClient("third", data, d).start(t, s)
		if got := goOn(t, []*client{second, third}); got != 0 {
			t.Errorf("late comers wrote %d bytes", got)
		}
		if err := first.finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := len(f.asked()); n != 1 { // the third, when nobody led
			t.Errorf("%d transfers were asked for, wanted 1", n)
		}
		wantNothingLeft(t, s)
	})
}

// A follower shows its leader's progress, and leaves alone whom it follows.
func TestFollowing(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		end  func(s *Store, ref string, cancel context.CancelFunc)
		want error
	}{
		"the client leaves": {func(_ *Store, _ string, cancel context.CancelFunc) { cancel() }, context.Canceled},
		"aborted":           {func(s *Store, ref string, _ context.CancelFunc) { _ = s.Abort(context.Background(), ref) }, errdefs.ErrAborted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				data, d := randomBytes(t, 5000)
				s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, data).fail(3000)}})
				first := newClient("first", data, d).start(t, s)
				answered(t, []*client{first})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				second := newClient("second", data, d)
				var err error
				if second.session, err = s.Open(ctx, second.ref(), 5000, ""); err != nil {
					t.Fatal(err)
				}
				go func() {
					_, err := second.session.Status(ctx)
					second.status <- err
				}()
				synctest.Wait()
				for _, want := range []int64{3000, 3500, 4000} {
					st, err := s.Status(ctx, second.ref())
					if err != nil || st.Offset != want || st.Total != 5000 {
						t.Errorf("status %+v, %v, wanted offset %d", st, err, want)
					}
					list, err := s.ListStatuses(ctx, "ref=="+second.ref())
					if err != nil || len(list) != 1 || list[0].Offset != want {
						t.Errorf("statuses %+v, %v, wanted offset %d", list, err, want)
					}
					time.Sleep(s.giveUp - time.Second) // slow, but alive
					if err := first.write(t.Context(), 500); err != nil {
						t.Fatal(err)
					}
				}
				tt.end(s, second.ref(), cancel)
				if err := <-second.status; !is(err, tt.want) {
					t.Errorf("the STAT ended with %v, wanted %v", err, tt.want)
				}
				if err := second.session.Close(); err != nil {
					t.Fatal(err)
				}
				if err := first.finish(t.Context()); err != nil {
					t.Fatal(err)
				}
				_ = s.Abort(t.Context(), second.ref())
				wantBlob(t, s, data, true)
				wantNothingLeft(t, s)
			})
		})
	}
}

// containerd opens the writers of all layers and fetches three at a time: a leader
// whose turn at its own client has not come is not silent.
func TestALeaderThatQueues(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		one, d1 := randomBytes(t, 1000*(queue-2))
		two, d2 := randomBytes(t, 4000)
		s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{}})
		a1, a2 := newClient("a", one, d1).start(t, s), newClient("a", two, d2).start(t, s)
		answered(t, []*client{a1})
		answered(t, []*client{a2})
		b := newClient("b", two, d2).start(t, s)
		for range queue - 2 {
			time.Sleep(s.giveUp - time.Second)
			if err := a1.write(t.Context(), 1000); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(s.giveUp - time.Second)
		if b.leads(t) {
			t.Fatal("the second client is to fetch what the first has yet to begin")
		}
		if err := a1.finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		answered(t, []*client{b})
		b.status <- nil
		if got := goOn(t, []*client{b}); got != 4000 {
			t.Errorf("wrote %d bytes, wanted 4000", got)
		}
		if err := a2.finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantNothingLeft(t, s)
	})
}

// It does not queue for ever, and once it has begun nothing else counts.
func TestALeaderThatQueuesForLong(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		begins bool
		after  int // times GiveUp
	}{
		"never begins": {false, queue},
		"stops":        {true, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				one, d1 := randomBytes(t, 5000)
				two, d2 := randomBytes(t, 4000)
				s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{}, GiveUp: time.Minute})
				a1, a2 := newClient("a", one, d1).start(t, s), newClient("a", two, d2).start(t, s)
				answered(t, []*client{a1})
				answered(t, []*client{a2})
				if tt.begins {
					if err := a2.write(t.Context(), 1); err != nil {
						t.Fatal(err)
					}
				}
				b := newClient("b", two, d2).start(t, s)
				for i := range 2 * tt.after {
					synctest.Wait()
					if b.leads(t) {
						t.Fatalf("replaced after %d half minutes", i)
					}
					if err := a1.write(t.Context(), 100); err != nil {
						t.Fatal(err)
					}
					time.Sleep(30 * time.Second)
				}
				answered(t, []*client{b})
				for _, c := range []*client{a1, a2, b} {
					if err := c.session.Close(); err != nil {
						t.Fatal(err)
					}
					if err := s.Abort(t.Context(), c.ref()); err != nil {
						t.Fatal(err)
					}
				}
				wantNothingLeft(t, s)
			})
		})
	}
}

// The leader is aborted when its blob has just come into blobs/: that is gone, but
// not its bytes.
func TestALeaderIsAbortedInTheEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, d := randomBytes(t, 5000)
		s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{}})
		clients := five(data, d)
		for _, c := range clients {
			c.start(t, s)
		}
		first := answered(t, clients)
		rest := without(clients, first)
		var once sync.Once
		s.onSync = func(path string) {
			if path == filepath.Dir(s.blobPath(d)) {
				once.Do(func() {
					if err := s.Abort(t.Context(), first.ref()); err != nil {
						t.Error(err)
					}
				})
			}
		}
		wantErr(t, first.finish(t.Context()), errdefs.ErrAborted)
		if got := goOn(t, rest); got != 0 {
			t.Errorf("the others wrote %d bytes, wanted none", got)
		}
		wantBlob(t, s, data, true)
		wantNothingLeft(t, s)
	})
}
