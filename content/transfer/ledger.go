package transfer

import (
	"slices"
	"sort"
)

// blockSize is the unit of the state file: what a crash may cost, per connection.
const blockSize = 256 << 10

// span is a run of missing bytes [off, end). It ends on a block border or at the blob's end; when it starts inside a
// block, crc is the CRC-32C of that block's bytes before off.
type span struct {
	off, end int64
	crc      uint32
	held     int64 // its connection writes up to here now
	recorded bool  // nobody fetches it: it is being compared with its records
}

// ledger says which bytes are missing and who fetches them. Every byte of the blob is there, in exactly one
// gap, or in exactly one live span. Its memory grows with the number of gaps, not with the blob's size.
// Not safe for concurrent use.
type ledger struct {
	size int64
	gaps []*span // sorted, disjoint, nobody works on them
	live map[*span]struct{}
}

func newLedger(size int64) *ledger {
	l := &ledger{size: size, live: map[*span]struct{}{}}
	if size > 0 {
		l.gaps = []*span{{end: size}}
	}
	return l
}

// claim takes up to want bytes of the first gap, if that gap starts before limit; nil if there is none.
func (l *ledger) claim(want, limit int64) *span {
	if len(l.gaps) == 0 || l.gaps[0].off >= limit {
		return nil
	}
	off := l.gaps[0].off
	end := (off + want) / blockSize * blockSize
	if end <= off {
		end = blockEnd(off)
	}
	return l.take(off, end)
}

// take carves what is unclaimed of the first gap that meets [off, end) and makes it live; nil if there is none.
// off must be a block border or the start of a gap.
func (l *ledger) take(off, end int64) *span {
	i := sort.Search(len(l.gaps), func(i int) bool { return l.gaps[i].end > off })
	if i == len(l.gaps) || l.gaps[i].off >= end {
		return nil
	}
	g := l.gaps[i]
	s := &span{off: g.off, end: min(g.end, end), crc: g.crc}
	var rest []*span
	if g.off < off {
		rest = append(rest, &span{off: g.off, end: off, crc: g.crc})
		s.off, s.crc = off, 0
	}
	if s.end < g.end {
		rest = append(rest, &span{off: s.end, end: g.end})
	}
	l.gaps = slices.Replace(l.gaps, i, i+1, rest...)
	l.live[s] = struct{}{}
	return s
}

// landed moves the start of a live span up to off; crc is that of the unfinished block's bytes before off.
func (l *ledger) landed(s *span, off int64, crc uint32) {
	s.off, s.crc = off, crc
	if s.off >= s.end {
		delete(l.live, s)
	}
}

// release gives back what is missing of a live span. The span must not be used afterwards.
func (l *ledger) release(s *span) {
	if _, ok := l.live[s]; !ok {
		return
	}
	delete(l.live, s)
	i := sort.Search(len(l.gaps), func(i int) bool { return l.gaps[i].off >= s.end })
	if i < len(l.gaps) && l.gaps[i].off == s.end {
		l.gaps[i] = &span{off: s.off, end: l.gaps[i].end, crc: s.crc}
	} else {
		l.gaps = slices.Insert(l.gaps, i, s)
	}
	if i > 0 && l.gaps[i-1].end == s.off && s.crc == 0 && s.off%blockSize == 0 {
		l.gaps[i-1].end = l.gaps[i].end
		l.gaps = slices.Delete(l.gaps, i, i+1)
	}
}

// frontier is the first missing byte.
func (l *ledger) frontier() int64 {
	f := l.size
	if len(l.gaps) > 0 {
		f = l.gaps[0].off
	}
	for s := range l.live {
		f = min(f, s.off)
	}
	return f
}

// wanted is the first byte that is missing if all records are true.
func (l *ledger) wanted() int64 {
	f := l.size
	if len(l.gaps) > 0 {
		f = l.gaps[0].off
	}
	for s := range l.live {
		if !s.recorded {
			f = min(f, s.off)
		}
	}
	return f
}

// there counts the bytes that are there, in order or not.
func (l *ledger) there() int64 {
	n := l.size
	for _, g := range l.gaps {
		n -= g.end - g.off
	}
	for s := range l.live {
		n -= s.end - s.off
	}
	return n
}

// unclaimed counts the missing bytes that nobody works on.
func (l *ledger) unclaimed() int64 {
	n := int64(0)
	for _, g := range l.gaps {
		n += g.end - g.off
	}
	return n
}

// split makes a gap of the end of a live span; at is a block border within it.
func (l *ledger) split(s *span, at int64) {
	rest := &span{off: at, end: s.end}
	s.end = at
	l.live[rest] = struct{}{}
	l.release(rest)
}

func (l *ledger) done() bool { return len(l.gaps) == 0 && len(l.live) == 0 }

// blockEnd is the end of the block that holds off.
func blockEnd(off int64) int64 { return off/blockSize*blockSize + blockSize }
