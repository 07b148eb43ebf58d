package decompress

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"testing"
)

// numbers plans jobs whose output is their number.
type numbers struct {
	mem           *memory
	next, end     int
	running, most atomic.Int32
	fails         int // this job's decoding fails; no job's if it is -1
}

var errJob = errors.New("job fails")

func (n *numbers) close() {}

func (n *numbers) plan(must bool) (*job, error) {
	if n.next == n.end {
		return nil, io.EOF
	}
	out, err := n.mem.get(1, must)
	if err != nil {
		return nil, err
	}
	number := n.next
	n.next++
	return &job{out: out, run: func(j *job) (int, error) {
		n.most.Store(max(n.most.Load(), n.running.Add(1)))
		defer n.running.Add(-1)
		if number == n.fails {
			return 0, errJob
		}
		j.out.b[0] = byte(number)
		return 1, nil
	}}, nil
}

func TestJobsComeInOrder(t *testing.T) {
	t.Parallel()
	for _, workers := range []int{1, 2, 5} {
		for _, fails := range []int{-1, 0, 100} {
			t.Run(fmt.Sprintf("%d workers, job %d fails", workers, fails), func(t *testing.T) {
				t.Parallel()
				mem, err := newMemory(t.Context(), NewBudget(DefaultBudget), idleHere)
				if err != nil {
					t.Fatal(err)
				}
				n := &numbers{mem: mem, end: 200, fails: fails}
				a := newAhead(n, workers)
				var got []byte
				var b block
				for b, err = a.next(); err == nil; b, err = a.next() {
					got = append(got, b.data...)
					b.release()
				}
				a.close()
				mem.close()
				want, wantErr := make([]byte, n.end), io.EOF
				for i := range want {
					want[i] = byte(i)
				}
				if fails >= 0 {
					want, wantErr = want[:fails], errJob
				}
				if !bytes.Equal(got, want) || !errors.Is(err, wantErr) {
					t.Errorf("got %d numbers and %v, want %d and %v", len(got), err, len(want), wantErr)
				}
				if most := int(n.most.Load()); most > workers {
					t.Errorf("%d jobs ran at once on %d workers", most, workers)
				}
				if held := mem.budget.Held(); held != 0 {
					t.Errorf("%d bytes are held at the end", held)
				}
			})
		}
	}
}

// TestXXH32 has values of the reference implementation, whole and in pieces.
func TestXXH32(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]uint32{
		"":    0x02cc5d05,
		"a":   0x550d7456,
		"abc": 0x32d153ff,
		"Nobody inspects the spammish repetition": 0xe2293b2f,
	} {
		if got := xxh32Of([]byte(text)); got != want {
			t.Errorf("%q: %08x, want %08x", text, got, want)
		}
		x := newXXH32()
		for _, c := range []byte(text) {
			x.write([]byte{c})
		}
		if got := x.sum(); got != want {
			t.Errorf("%q, byte by byte: %08x, want %08x", text, got, want)
		}
	}
}
