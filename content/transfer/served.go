package transfer

import (
	"math/bits"
	"slices"
	"strings"
)

// served remembers of each block whose bytes it holds, in one byte a block: a code that stands for a set of hosts. It
// grows with what has arrived, not with the size that somebody claims. Not safe for concurrent use.
type served struct {
	hosts []string // bit i+1 of a set stands for hosts[i]
	sets  []uint64 // by code
	from  []uint8  // code by block
}

const (
	byNobody  = 0                     // code: the block is not there
	byEarlier = 1                     // bit and code: bytes that were on disk before this transfer began
	bySomeone = uint64(1) << 63       // bit: one of more hosts than can be told apart
	someone   = 2                     // code of that bit alone
	maxHosts  = 62                    // bits between the two
	maxCodes  = 1 << 8                // in a byte
	earlier   = "an earlier transfer" // as people read it
)

func (s *served) note(block uint32, host string) {
	i := slices.Index(s.hosts, host)
	if i < 0 && len(s.hosts) < maxHosts {
		i = len(s.hosts)
		s.hosts = append(s.hosts, host)
	}
	if i < 0 {
		s.add(block, bySomeone)
		return
	}
	s.add(block, 1<<(i+1))
}

// inherit notes that a block was there already; who served it is kept if it is known.
func (s *served) inherit(block uint32) {
	if s.code(block) == byNobody {
		s.add(block, byEarlier)
	}
}

// forget notes that a block is not there any more.
func (s *served) forget(block uint32) {
	if int(block) < len(s.from) {
		s.from[block] = byNobody
	}
}

func (s *served) code(block uint32) uint8 {
	if int(block) < len(s.from) {
		return s.from[block]
	}
	return byNobody
}

func (s *served) add(block uint32, bit uint64) {
	if s.sets == nil {
		s.sets = []uint64{byNobody: 0, byEarlier: byEarlier, someone: bySomeone}
	}
	if n := int(block) + 1; n > len(s.from) {
		s.from = append(s.from, make([]uint8, n-len(s.from))...)
	}
	set := s.sets[s.from[block]] | bit
	code := slices.Index(s.sets, set)
	switch {
	case code >= 0:
	case len(s.sets) < maxCodes:
		code = len(s.sets)
		s.sets = append(s.sets, set)
	default:
		code = someone
	}
	s.from[block] = uint8(code)
}

// names lists who may have served a block with that code; more than one if it was put together from pieces.
func (s *served) names(code uint8) []string {
	if int(code) >= len(s.sets) {
		return nil
	}
	return s.list(s.sets[code])
}

func (s *served) list(set uint64) []string {
	var names []string
	for i, h := range s.hosts {
		if set&(1<<(i+1)) != 0 {
			names = append(names, h)
		}
	}
	slices.Sort(names)
	if set&byEarlier != 0 {
		names = append(names, earlier)
	}
	if set&bySomeone != 0 {
		names = append(names, "another host")
	}
	return names
}

// everybody names all whose bytes are there.
func (s *served) everybody() string {
	var all uint64
	for _, code := range s.from {
		all |= s.sets[code]
	}
	if bits.OnesCount64(all) == 0 {
		return "nobody"
	}
	return strings.Join(s.list(all), " and ")
}

func (s *served) clone() served {
	return served{hosts: slices.Clone(s.hosts), sets: slices.Clone(s.sets), from: slices.Clone(s.from)}
}
