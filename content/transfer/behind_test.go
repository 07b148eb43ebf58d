package transfer

import (
	"errors"
	"io"
	"os"
	"sync"
	"testing"
)

// dropped records what is dropped from memory, and how far everybody was then.
type dropped struct {
	t       *testing.T
	job     *job
	mu      sync.Mutex
	upTo    int64
	all     bool // the file as a whole
	tooMuch bool
}

func (d *dropped) drop(_ *os.File, off, n int64) {
	d.job.mu.Lock()
	least := d.job.behind.hashed
	for _, r := range d.job.behind.readers {
		least = min(least, r.mark)
	}
	d.job.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if off == 0 && n == 0 {
		d.all, d.tooMuch = true, d.tooMuch || least < d.job.blob.Size
		return
	}
	if off != d.upTo || n%writebackStep != 0 {
		d.t.Errorf("%d bytes are dropped from %d on, want whole steps from %d on", n, off, d.upTo)
	}
	d.upTo = off + n
	d.tooMuch = d.tooMuch || d.upTo > least
}

func (d *dropped) so() (upTo int64, all, tooMuch bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.upTo, d.all, d.tooMuch
}

// Pages are dropped behind the hash and all who read and say how far they are, and the rest when the last of them is
// through.
func TestDropBehind(t *testing.T) {
	t.Parallel()
	const size = 96<<20 + 123
	data, b := randomBlob(71, size)
	for name, tc := range map[string]struct {
		tells     bool  // the reader says how far it is
		upTo      int64 // how far it reads
		idle      bool  // a second one reads the first byte only, and says nothing
		some, all bool  // what is dropped, before and at the end
	}{
		"all is read":               {tells: true, upTo: size, some: true, all: true},
		"nothing is said":           {upTo: size},
		"nobody reads":              {tells: true},
		"the reader stops":          {tells: true, upTo: 80 << 20, some: true},
		"another one may read more": {tells: true, upTo: size, idle: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 2})
			begin := make(chan struct{})
			d := &dropped{t: t}
			m.shared.dropPages = d.drop
			client := join(t, m, b, &fakeSource{host: "a", data: data, reply: holdFrom(8<<20, begin)})
			d.job = client.job
			h, other := join(t, m, b), join(t, m, b)
			defer func() { _ = other.Close() }()
			if tc.idle {
				if _, err := other.ReadAt(t.Context(), make([]byte, 1), 0); err != nil {
					t.Fatal(err)
				}
			}
			buf := make([]byte, 1<<20)
			for off := int64(0); off < tc.upTo; {
				n, err := h.ReadAt(t.Context(), buf[:min(int64(len(buf)), tc.upTo-off)], off)
				if err != nil && !errors.Is(err, io.EOF) {
					t.Fatal(err)
				}
				if off += int64(n); tc.tells {
					h.Discard(off)
				}
				if off == 8<<20 {
					close(begin)
				}
			}
			if tc.upTo == 0 {
				close(begin)
			}
			wait(t, client)
			if tc.some { // how much of it depends on who is how fast
				h.job.dropBehind(func() int64 { n, _, _ := d.so(); return n }(), size)
			}
			_ = h.Close()
			upTo, all, tooMuch := d.so()
			if (upTo > 0) != tc.some || all != tc.all {
				t.Errorf("%d bytes were dropped, then all: %t; want some: %t, all: %t", upTo, all, tc.some, tc.all)
			}
			if upTo > size-dropLag {
				t.Errorf("%d bytes were dropped, which were written just now", upTo)
			}
			if tooMuch {
				t.Error("something was dropped that somebody needs")
			}
		})
	}
}
