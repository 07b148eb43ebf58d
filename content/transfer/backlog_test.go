package transfer

import (
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// A reader that moves is not left behind, and one that has stopped holds nothing up.
func TestBacklog(t *testing.T) {
	t.Parallel()
	const size, step = 160 << 20, 1 << 20
	data, b := randomBlob(73, size)
	for name, tc := range map[string]struct {
		stopAt int64 // where the reader stops for good
		most   int64 // bytes that may lie before it, once it has moved
	}{
		// The chunk that is under way when it falls behind still comes.
		"it moves":    {stopAt: size, most: backlogMax + 2*step},
		"it stops":    {stopAt: 8 << 20, most: size},
		"it is quick": {stopAt: size, most: size},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newManager(t, t.TempDir(), Options{ChunkSize: step, ConnectionsPerHost: 1})
				h := join(t, m, b, &fakeSource{host: "a", data: data})
				defer func() { _ = h.Close() }()
				buf, most := make([]byte, step), int64(0)
				for off := int64(0); off < tc.stopAt; {
					n, err := h.ReadAt(t.Context(), buf, off)
					if err != nil && !errors.Is(err, io.EOF) {
						t.Fatal(err)
					}
					off += int64(n)
					h.Discard(off)
					if name != "it is quick" {
						time.Sleep(10 * time.Millisecond)
					}
					if off > backlogMax {
						most = max(most, h.Frontier()-off)
					}
				}
				if most > tc.most {
					t.Errorf("%d bytes lay before the reader, want %d at most", most, tc.most)
				}
				if name == "it moves" && most < backlogMax/2 {
					t.Errorf("only %d bytes lay before the reader: nothing was held back", most)
				}
				begin := time.Now()
				wait(t, h)
				if took := time.Since(begin); took > 2*patientFor {
					t.Errorf("complete %s after the reader stopped, want no more than its patience", took)
				}
			})
		})
	}
}

// A reader that has stopped holds nothing up, although another one moves: the moving one would get bytes only each time
// that it is given up for having stopped.
func TestBacklogOfAnother(t *testing.T) {
	t.Parallel()
	const size, step = 160 << 20, 1 << 20
	data, b := randomBlob(74, size)
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, t.TempDir(), Options{ChunkSize: step, ConnectionsPerHost: 2})
		h := join(t, m, b, &fakeSource{host: "a", data: data})
		defer func() { _ = h.Close() }()
		other := join(t, m, b)
		defer func() { _ = other.Close() }()
		buf := make([]byte, step)
		if n, err := other.ReadAt(t.Context(), buf, 0); err != nil {
			t.Fatal(err)
		} else {
			other.Discard(int64(n))
		}
		begin := time.Now()
		for off := int64(0); off < size; {
			n, err := h.ReadAt(t.Context(), buf, off)
			if err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			off += int64(n)
			h.Discard(off)
			time.Sleep(time.Millisecond)
		}
		if took := time.Since(begin); took > 4*patientFor {
			t.Errorf("the blob took %s beside a reader that has stopped, want %s at most", took, 4*patientFor)
		}
	})
}
