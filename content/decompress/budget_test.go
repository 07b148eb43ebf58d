package decompress

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/gantryd/gantry/integration/short"
)

// windowed is a frame that needs a window of that many bytes.
func windowed(t testing.TB, data []byte, window int) []byte {
	t.Helper()
	return streamed(t, data, zstd.WithWindowSize(window))
}

// TestBudgetSharedByMany has far more readers than the budget can serve at once,
// most of them with windows of which it holds one.
func TestBudgetSharedByMany(t *testing.T) {
	t.Parallel()
	data := sample(3 << 20)
	large, small := windowed(t, data, 32<<20), windowed(t, data, 1<<20)
	frames := bytes.Repeat(zst(t, data[:512<<10]), 6)
	streams := [][]byte{
		large, small, join(large, small, large), join(small, large), lz(t, data, lz4.BlockSizeOption(lz4.Block4Mb)),
		lz(t, data, lz4.LegacyOption(true)), apple(data, 2<<20), frames, join(frames, large), data, gz(t, data, gzip.Header{}),
	}
	for _, size := range []int64{1, 20 << 20, 140 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			b := NewBudget(size)
			var peak atomic.Int64
			var wg sync.WaitGroup
			for i := range 4 * len(streams) {
				wg.Go(func() {
					r, err := NewReader(t.Context(), bytes.NewReader(streams[i%len(streams)]), WithBudget(b), withWorkers(2))
					if err != nil {
						t.Error(err)
						return
					}
					defer func() { _ = r.Close() }()
					peak.Store(max(peak.Load(), b.Held()))
					if _, err := r.WriteTo(io.Discard); err != nil {
						t.Errorf("stream %d: %v", i%len(streams), err)
					}
					peak.Store(max(peak.Load(), b.Held()))
				})
			}
			wg.Wait()
			if peak.Load() > max(size, 2) {
				t.Errorf("held %d of %d bytes", peak.Load(), size)
			}
			if n := b.Held(); n != 0 {
				t.Errorf("%d bytes are held at the end", n)
			}
		})
	}
}

// TestScarceMemoryGivesTheSameBytes leaves the readers with their minimum only.
func TestScarceMemoryGivesTheSameBytes(t *testing.T) {
	t.Parallel()
	n := short.Size(1<<20, 1<<18)
	data := sample(6 * n)
	for name, in := range map[string][]byte{
		"frames":      join(zst(t, data[:3*n]), streamed(t, data[3*n:3*n+9]), streamed(t, data[3*n+9:5*n]), zst(t, data[5*n:])),
		"small first": join(zst(t, data[:100]), zst(t, data[100:5*n]), streamed(t, data[5*n:5*n+50]), streamed(t, data[5*n+50:])),
		"gzip":        gz(t, data, gzip.Header{}),
		"independent": lz(t, data, lz4.BlockSizeOption(lz4.Block4Mb)),
		"linked":      linkedFrame(data),
		"apple":       apple(data, 5*n),
	} {
		for _, workers := range []int{1, 2, 8} {
			t.Run(fmt.Sprintf("%s/%d", name, workers), func(t *testing.T) {
				t.Parallel()
				r, err := NewReader(t.Context(), bytes.NewReader(in), WithBudget(NewBudget(1)), withWorkers(workers))
				if err != nil {
					t.Fatal(err)
				}
				defer closed(t, r)
				if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, error %v; want %d", len(got), err, len(data))
				}
			})
		}
	}
}

// TestWaitsEndWithTheirContext cancels who waits for a share, for the lane and
// for blocks that nobody gives back.
func TestWaitsEndWithTheirContext(t *testing.T) {
	t.Parallel()
	data := sample(8 << 20)
	large := windowed(t, data, 32<<20)
	stop := errors.New("told to stop")
	for _, c := range []struct {
		name   string
		budget int64
		in     []byte
		block  func(*testing.T, *Budget) func() // occupies the budget
	}{
		{"share", 8 << 20, data, func(t *testing.T, b *Budget) func() {
			g, err := b.common.wait(t.Context(), 8<<20)
			if err != nil {
				t.Fatal(err)
			}
			return g.release
		}},
		{"lane", 32 << 20, large, func(t *testing.T, b *Budget) func() {
			g, err := b.lane.wait(t.Context(), 32<<20)
			if err != nil {
				t.Fatal(err)
			}
			return g.release
		}},
		{"blocks", 8 << 20, data, func(*testing.T, *Budget) func() { return func() {} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := NewBudget(c.budget)
				free := c.block(t, b)
				ctx, cancel := context.WithCancelCause(t.Context())
				got := make(chan error)
				go func() { got <- hoard(ctx, c.in, b) }()
				synctest.Wait() // it waits
				cancel(stop)
				if err := <-got; !errors.Is(err, stop) || errors.Is(err, ErrCorrupt) {
					t.Errorf("got %v, want the cause", err)
				}
				free()
				if n := b.Held(); n != 0 {
					t.Errorf("%d bytes are held at the end", n)
				}
			})
		})
	}
}

// hoard reads without giving anything back before the end.
func hoard(ctx context.Context, in []byte, b *Budget) error {
	r, err := NewReader(ctx, bytes.NewReader(in), WithBudget(b), withWorkers(1))
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	for {
		_, release, err := r.Next()
		if err != nil {
			return err
		}
		defer release()
	}
}

// TestBlocksOutliveTheReader keeps blocks beyond Close: they stay as they are, and
// are paid for.
func TestBlocksOutliveTheReader(t *testing.T) {
	t.Parallel()
	data := sample(short.Size(5, 2) << 20)
	for name, in := range map[string][]byte{"tar": data, "frames": join(zst(t, data[:1<<20]), zst(t, data[1<<20:])), "lz4": lz(t, data), "apple": apple(data, 64<<10), "gzip": gz(t, data, gzip.Header{})} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := NewBudget(DefaultBudget)
			r, err := NewReader(t.Context(), bytes.NewReader(in), WithBudget(b), withWorkers(2))
			if err != nil {
				t.Fatal(err)
			}
			first, release, err := r.Next()
			if err != nil {
				t.Fatal(err)
			}
			_, second, err := r.Next()
			if err != nil {
				t.Fatal(err)
			}
			second()
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(first, data[:len(first)]) {
				t.Error("the block changed")
			}
			if b.Held() == 0 {
				t.Error("nothing is held for the block")
			}
			release()
			if n := b.Held(); n != 0 {
				t.Errorf("%d bytes are held at the end", n)
			}
		})
	}
}

// TestNextWaitsForBlocks gives blocks back late, from another goroutine.
func TestNextWaitsForBlocks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data := sample(12 << 20)
		r, err := NewReader(t.Context(), bytes.NewReader(data), WithBudget(NewBudget(1)))
		if err != nil {
			t.Fatal(err)
		}
		blocks := make(chan func(), 100)
		end := make(chan error)
		go func() {
			for {
				_, release, err := r.Next()
				if err != nil {
					end <- err
					return
				}
				blocks <- release
			}
		}()
		synctest.Wait()
		if n := len(blocks); n != baseBlocks/blockSize {
			t.Errorf("%d blocks without a release, want %d", n, baseBlocks/blockSize)
		}
		for {
			select {
			case release := <-blocks:
				release()
				synctest.Wait()
				continue
			case err := <-end:
				if !errors.Is(err, io.EOF) {
					t.Error(err)
				}
			}
			break
		}
		_ = r.Close()
	})
}

// TestScarceMemoryDoesNotHoldUpFrames has frames that barely shrink: what was gathered of them takes so much of the
// reader's minimum that it cannot wait for a buffer of the output beside it.
func TestScarceMemoryDoesNotHoldUpFrames(t *testing.T) {
	t.Parallel()
	noise := make([]byte, 2<<20)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(noise); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{700 << 10, 1100 << 10, 1300 << 10, 1500 << 10, 1900 << 10, 2 << 20} {
		for _, workers := range []int{1, 2} {
			t.Run(fmt.Sprintf("%d/%d", size>>10, workers), func(t *testing.T) {
				t.Parallel()
				in, want := bytes.Repeat(zst(t, noise[:size]), 2), bytes.Repeat(noise[:size], 2)
				synctest.Test(t, func(t *testing.T) {
					// Who waits for himself waits for nothing else: the time comes at once.
					ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
					defer cancel()
					r, err := NewReader(ctx, bytes.NewReader(in), WithBudget(NewBudget(1)), withWorkers(workers))
					if err != nil {
						t.Fatal(err)
					}
					defer closed(t, r)
					if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
						t.Errorf("%d bytes, error %v; want %d", len(got), err, len(want))
					}
				})
			})
		}
	}
}
