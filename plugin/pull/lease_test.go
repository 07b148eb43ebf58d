package pull

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"

	"github.com/gantryd/gantry/content/decompress"
)

// Two goroutines of each unpack wait for this and that: never does an unpack have two workers, nor do all of them
// together have more than there are, and in the end none is missing.
func TestLease(t *testing.T) {
	t.Parallel()
	const workers, unpacks = 2, 5
	sem := semaphore.NewWeighted(workers)
	var wg sync.WaitGroup
	for range unpacks {
		wg.Go(func() {
			l := &lease{workers: sem}
			if err := l.work(t.Context()); err != nil {
				t.Error(err)
				return
			}
			defer l.rest()
			var both sync.WaitGroup
			for range 2 {
				both.Go(func() {
					for range 500 {
						if err := l.idle(t.Context(), func() error { return nil }); err != nil {
							t.Error(err)
						}
					}
				})
			}
			both.Wait()
			if !l.held {
				t.Error("the unpack goes on without a worker")
			}
		})
	}
	wg.Wait()
	if !sem.TryAcquire(workers) {
		t.Error("a worker was not given back")
	}
}

func TestLeaseLendsItsWorker(t *testing.T) {
	t.Parallel()
	sem := semaphore.NewWeighted(1)
	l := &lease{workers: sem}
	if err := l.work(t.Context()); err != nil {
		t.Fatal(err)
	}
	why, given := errors.New("why"), errors.New("given up")
	err := l.idle(t.Context(), func() error {
		if !sem.TryAcquire(1) {
			t.Error("it is kept while its holder waits")
		}
		sem.Release(1)
		return why
	})
	if !errors.Is(err, why) || !l.held {
		t.Errorf("got %v (a worker: %v), want %v", err, l.held, why)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	err = l.idle(ctx, func() error {
		cancel(given)
		return sem.Acquire(t.Context(), 1)
	})
	if !errors.Is(err, given) || l.held {
		t.Errorf("got %v (a worker: %v), want %v", err, l.held, given)
	}
	l.rest()
	l.rest()
	sem.Release(1)
	if err := l.idle(t.Context(), func() error { return nil }); err != nil || l.held {
		t.Errorf("after the end: %v, a worker: %v", err, l.held)
	}
}

func TestClock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var c clock
		wait := func(outputs, inputs int, d time.Duration) {
			c.change(outputs, inputs)
			time.Sleep(d)
		}
		wait(0, 1, time.Second)    // reads ahead: nobody minds
		wait(1, 0, 2*time.Second)  // starved
		wait(0, -1, 4*time.Second) // decompresses
		wait(0, 1, 8*time.Second)  // starved
		wait(-1, 0, 16*time.Second)
		wait(0, -1, 32*time.Second) // nobody waits
		starved, decoding := c.spent()
		if starved != 10*time.Second || decoding != 4*time.Second {
			t.Errorf("got %s starved, %s decoding", starved, decoding)
		}
	})
}

// stalling sends a part of its bytes, and the others when it is told to.
type stalling struct {
	data  []byte
	part  int64
	gate  chan struct{}
	asked atomic.Bool // for what lies behind the part
}

func (s *stalling) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < s.part {
		return copy(p, s.data[off:s.part]), nil
	}
	s.asked.Store(true)
	select {
	case <-s.gate:
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	n, err := bytes.NewReader(s.data).ReadAt(p, off)
	if n > 0 {
		return n, nil
	}
	return n, err
}

func (s *stalling) End() (int64, bool)           { return 0, false }
func (*stalling) Verified(context.Context) error { return nil }
func (*stalling) Lasts() bool                    { return true }
func (*stalling) Close() error                   { return nil }

// The first layer has the memory and lent its worker while its bytes stall; the second has the worker and waits for memory.
func TestMemoryAndWorkersDoNotWaitForEachOther(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	f.budget, f.workers = decompress.NewBudget(4<<20), semaphore.NewWeighted(1) // one reader at a time has its minimum
	f.Start(t.Context(), f.images)
	var unpacks []*unpack
	var sources []*stalling
	for i := range uint64(2) {
		l, _ := f.addLayer(t, i, 1<<20)
		s := &stalling{data: f.blobs[l.Digest], part: 1000, gate: make(chan struct{})}
		u, err := f.unpack(t.Context(), f.unpackKey("default", l.Digest, l.Size), func() (byteSource, error) { return s, nil })
		if err != nil {
			t.Fatal(err)
		}
		unpacks, sources = append(unpacks, u), append(sources, s)
		if i == 0 {
			eventually(t, "the first layer to stall without a worker", func() bool {
				if !s.asked.Load() || !f.workers.TryAcquire(1) {
					return false
				}
				f.workers.Release(1)
				return true
			})
		} else {
			eventually(t, "the second to wait", func() bool { return u.phase.Load() == phaseUnpacking })
		}
	}
	close(sources[0].gate)
	close(sources[1].gate)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for i, u := range unpacks {
		if _, err := u.wait(ctx); err != nil {
			t.Errorf("layer %d: %v", i, err)
		}
	}
	if n := f.budget.Held(); n != 0 {
		t.Errorf("%d bytes of the budget are still held", n)
	}
}

// late has all its bytes and knows so; io.EOF it says only when they are verified.
type late struct {
	*stalling
	vouch chan struct{}
}

func (s late) End() (int64, bool) { return int64(len(s.data)), true }
func (s late) Verified(ctx context.Context) error {
	return slowToVouch{vouch: s.vouch}.Verified(ctx)
}

// The layer file is durable while the blob is still being verified, but on record only afterwards.
func TestTheLayerDoesNotWaitForTheBlob(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1<<20)
	f.Start(t.Context(), f.images)
	s := late{&stalling{data: f.blobs[l.Digest], part: l.Size}, make(chan struct{})}
	u, err := f.unpack(t.Context(), f.unpackKey("default", l.Digest, l.Size), func() (byteSource, error) { return s, nil })
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the layer file", func() bool {
		_, err := f.layers.Get(t.Context(), id)
		return err == nil
	})
	if got, err := f.layers.Lookup(l.Digest); err == nil {
		t.Errorf("%s is on record although nobody vouched for the blob", got)
	}
	close(s.vouch)
	if got, err := u.wait(t.Context()); err != nil || got.DiffID != id {
		t.Errorf("got %v, %v", got, err)
	}
}

// What ended an unpack is told, not that its reader was told to stop.
func TestTheReasonIsNotThatReadingEnded(t *testing.T) {
	t.Parallel()
	f := &follower{u: &unpack{}, lease: &lease{}}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errEnded)
	f.u.changed = make(chan struct{})
	if _, err := f.reader(ctx).Read(make([]byte, 1)); !errors.Is(err, errEnded) {
		t.Errorf("got %v, want %v", err, errEnded)
	}
	if err := f.explain(io.ErrUnexpectedEOF); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v, want %v", err, io.ErrUnexpectedEOF)
	}
}

// `gantry status` tells how long the layer took after its last byte, its first snapshot included.
func TestTail(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1<<20)
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	if err := f.take(t, "default", l); err != nil {
		t.Fatal(err)
	}
	u := f.running(f.unpackKey("default", l.Digest, l.Size))
	if u != nil {
		if _, err := u.wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	before := f.Recent()
	if len(before) != 1 || before[0].TailSeconds <= 0 || before[0].TailSeconds > before[0].Seconds.Total || before[0].Seconds.Index != 0 {
		t.Fatalf("got %+v", before)
	}
	f.Adopted("7", id, 2*time.Second)
	f.Adopted("8", id, time.Hour) // another image of the layer
	f.Adopted("7", id, time.Second)
	f.Adopted("9", "sha256:other", time.Hour)
	after := f.Recent()[0]
	if after.Seconds.Index != 3 || after.TailSeconds != before[0].TailSeconds+3 {
		t.Errorf("got index %v, tail %v; it was %v before", after.Seconds.Index, after.TailSeconds, before[0].TailSeconds)
	}
}
