package transfer

import (
	"testing"
)

// FuzzLedger plays claim, take, landed and release against a map of single steps: who has each of them.
func FuzzLedger(f *testing.F) {
	f.Add(uint16(40), []byte{0, 3, 1, 7, 2, 0, 2, 1, 3, 0, 0, 9, 3, 1})
	f.Add(uint16(40), []byte{0, 1, 2, 0, 3, 0, 1, 1})
	f.Add(uint16(40), []byte{1, 2, 1, 2})
	f.Add(uint16(1), []byte{0, 0, 2, 0})
	f.Add(uint16(9), []byte{1, 4, 1, 0, 3, 0, 2, 0, 2, 1, 0, 200})
	f.Fuzz(func(t *testing.T, size uint16, ops []byte) {
		n := newNaive(int64(size) * step)
		for i := 0; i+1 < len(ops) && i < 2000; i += 2 {
			n.do(t, ops[i]%4, int64(ops[i+1]))
			n.compare(t)
		}
		for len(n.live) > 0 {
			n.release(0)
			n.compare(t)
		}
		n.finish(t)
	})
}

// step divides a block, so that spans end and begin inside blocks.
const step = blockSize / 4

// naive is what a ledger should be, one entry a step: missing, there, or the span that has it.
type naive struct {
	*ledger
	steps []*span
	live  []*span
}

var missing, there = &span{}, &span{}

func newNaive(size int64) *naive {
	n := &naive{ledger: newLedger(size), steps: make([]*span, size/step)}
	for i := range n.steps {
		n.steps[i] = missing
	}
	return n
}

func (n *naive) do(t *testing.T, op uint8, arg int64) {
	t.Helper()
	switch op {
	case 0:
		limit := arg * step
		n.took(t, n.claim(1+arg*step, limit), n.first(0, n.size), limit)
	case 1: // a block, as one that reads a plain stream
		off := arg * blockSize
		if off < n.size {
			end := min(blockEnd(off), n.size)
			n.took(t, n.take(off, end), n.first(off, end), end)
		}
	case 2:
		if len(n.live) > 0 {
			n.land(n.live[int(arg)%len(n.live)])
		}
	case 3:
		if len(n.live) > 0 {
			n.release(int(arg) % len(n.live))
		}
	}
}

// first is the first missing byte in a range, or -1.
func (n *naive) first(off, end int64) int64 {
	for ; off < end; off += step {
		if n.steps[off/step] == missing {
			return off
		}
	}
	return -1
}

func (n *naive) took(t *testing.T, s *span, first, limit int64) {
	t.Helper()
	if s == nil {
		if first >= 0 && first < limit {
			t.Fatalf("byte %d is missing and nothing was handed out below %d", first, limit)
		}
		return
	}
	if s.off != first || s.off >= limit || s.end <= s.off || s.end > n.size || s.end%blockSize != 0 && s.end != n.size {
		t.Fatalf("handed out [%d,%d), want it from %d, below %d", s.off, s.end, first, limit)
	}
	for i := s.off; i < s.end; i += step {
		if n.steps[i/step] != missing {
			t.Fatalf("byte %d was handed out twice", i)
		}
		n.steps[i/step] = s
	}
	if want := sum(s.off); s.crc != want {
		t.Fatalf("the span from %d has the sum %x, want %x", s.off, s.crc, want)
	}
	n.live = append(n.live, s)
}

// sum stands for the CRC-32C of a block's bytes before off.
func sum(off int64) uint32 {
	if off%blockSize == 0 {
		return 0
	}
	return uint32(off/step) + 1
}

func (n *naive) land(s *span) {
	n.steps[s.off/step] = there
	n.landed(s, s.off+step, sum(s.off+step))
	if s.off >= s.end {
		n.drop(s)
	}
}

func (n *naive) release(i int) {
	s := n.live[i]
	for k, who := range n.steps {
		if who == s {
			n.steps[k] = missing
		}
	}
	n.ledger.release(s)
	n.drop(s)
}

func (n *naive) drop(s *span) {
	for i, l := range n.live {
		if l == s {
			n.live = append(n.live[:i], n.live[i+1:]...)
			return
		}
	}
}

func (n *naive) compare(t *testing.T) {
	t.Helper()
	have, frontier, gap := int64(0), n.size, 0
	for i, who := range n.steps {
		off := int64(i) * step
		if who == there {
			have += step
		} else {
			frontier = min(frontier, off)
		}
		for gap < len(n.gaps) && n.gaps[gap].end <= off {
			gap++
		}
		if in := gap < len(n.gaps) && n.gaps[gap].off <= off; in != (who == missing) {
			t.Fatalf("byte %d: in a gap: %t, missing: %t", off, in, who == missing)
		}
	}
	if n.there() != have || n.frontier() != frontier || n.done() != (have == n.size) {
		t.Fatalf("%d there, frontier %d, done %t; want %d, %d", n.there(), n.frontier(), n.done(), have, frontier)
	}
	for i, g := range n.gaps {
		if i > 0 && n.gaps[i-1].end == g.off && g.crc == 0 {
			t.Fatalf("gaps that meet at %d were not joined", g.off)
		}
	}
}

// finish fetches the rest and finds nothing missing.
func (n *naive) finish(t *testing.T) {
	t.Helper()
	for s := n.claim(n.size, n.size); s != nil; s = n.claim(n.size, n.size) {
		n.took(t, s, n.first(0, n.size), n.size)
		for s.off < s.end {
			n.land(s)
		}
	}
	n.compare(t)
	if !n.done() {
		t.Fatal("not done")
	}
}
