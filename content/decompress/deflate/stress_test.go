package deflate

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/pprof"
	"sync"
	"testing"
	"time"
)

var stressFor = flag.Duration("stress", time.Second, "how long TestStress goes on")

// stressInputs are streams of all kinds, short, so that begins and ends are many.
func stressInputs(t *testing.T) (plain, packed [][]byte) {
	t.Helper()
	for seed := range uint64(6) {
		r := rand.New(rand.NewPCG(seed, 77))
		data := blend(r, 200_000+r.IntN(400_000))
		if seed%2 == 0 { // far matches keep markers alive: much is to be resolved
			data = prose(len(data))
		}
		in := mixed(t, r, data)
		switch seed {
		case 0, 1:
			in = squeezeGzip(t, data, 6)
		case 2:
			in = squeezeGzip(t, data, 0)
		case 3:
			in = join(tiny(t, data, 5000), make([]byte, 700))
		}
		plain, packed = append(plain, data), append(packed, in)
	}
	return plain, packed
}

// TestStress decodes many streams at once, cut into tiny chunks, with blocks that
// are released late, in any order and from another goroutine: whoever waits must be
// woken. If nothing moves for a minute, it shows where everybody stands.
func TestStress(t *testing.T) { //nolint:paralleltest // sets GOMAXPROCS
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	plain, packed := stressInputs(t)
	end := time.Now().Add(*stressFor)
	for round := uint64(0); time.Now().Before(end); round++ {
		runtime.GOMAXPROCS(1 << (round % 4))
		dog := time.AfterFunc(time.Minute, func() {
			_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
			panic("a stream hangs")
		})
		var wg sync.WaitGroup
		for k := range uint64(2) {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(round, k))
				i := r.IntN(len(packed))
				stressOne(t, r, packed[i], plain[i])
			})
		}
		wg.Wait()
		dog.Stop()
	}
}

// stressOne decodes one stream, all of it or up to some place.
func stressOne(t *testing.T, r *rand.Rand, in, want []byte) {
	t.Helper()
	chunk := 300 + r.IntN(1<<(8+r.IntN(8)))
	opts := []Option{WithWorkers(1 + r.IntN(4)), withSizes(chunk, smallSlab*(1+r.IntN(2)), 2+r.IntN(8))}
	var d *Reader
	if r.IntN(2) == 0 {
		d, _ = NewReader(bytes.NewReader(in), opts...)
	} else {
		d, _ = NewReaderAt(bytes.NewReader(in), opts...)
	}
	releases := make(chan func(), 1<<16) // never blocks: Next may wait for them
	var wg sync.WaitGroup
	late := rand.New(rand.NewPCG(r.Uint64(), 0))
	wg.Go(func() { releaseLate(late, releases) })
	limit := len(want)
	if r.IntN(4) == 0 {
		limit = r.IntN(limit)
	}
	at := 0
	for at <= limit {
		b, release, err := d.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || !bytes.HasPrefix(want[at:], b) {
			t.Errorf("at %d of %d: %d bytes, %v", at, len(want), len(b), err)
			break
		}
		at += len(b)
		releases <- release
	}
	if limit == len(want) && at != limit {
		t.Errorf("%d bytes, want %d", at, limit)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	close(releases)
	wg.Wait()
}

// releaseLate releases what it gets, some of it at once and some after others.
func releaseLate(r *rand.Rand, releases <-chan func()) {
	var held []func()
	for open := true; open || len(held) > 0; {
		select {
		case f, ok := <-releases:
			if open = ok; ok {
				held = append(held, f)
			} else {
				releases = nil
			}
		default:
			if len(held) == 0 {
				f, ok := <-releases
				if open = ok; ok {
					held = append(held, f)
				}
				continue
			}
			for range r.IntN(20) {
				runtime.Gosched()
			}
			i := r.IntN(len(held))
			held[i]()
			held = append(held[:i], held[i+1:]...)
		}
	}
}
