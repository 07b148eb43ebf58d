package deflate

import (
	"math/bits"
	"math/rand/v2"
	"testing"

	"github.com/gantryd/gantry/integration/short"
)

// randomCode is the code lengths of a complete code of n symbols; deep makes long codes likely.
func randomCode(r *rand.Rand, n int, deep bool) []uint8 {
	lens := []uint8{1, 1}
	for len(lens) < n {
		i := r.IntN(len(lens))
		if deep {
			i = max(i, r.IntN(len(lens)), r.IntN(len(lens)), len(lens)-1-r.IntN(3))
		}
		if lens[i] == maxCode {
			i = r.IntN(len(lens))
		}
		if lens[i] < maxCode {
			lens[i]++
			lens = append(lens, lens[i])
		}
	}
	r.Shuffle(n, func(i, j int) { lens[i], lens[j] = lens[j], lens[i] })
	return lens
}

// canonical are the codes of RFC 1951, 3.2.2, with the first bit lowest.
func canonical(lens []uint8) []uint16 {
	codes := make([]uint16, len(lens))
	next := uint(0)
	for l := uint8(1); l <= maxCode; l++ {
		for sym, have := range lens {
			if have == l {
				codes[sym] = bits.Reverse16(uint16(next)) >> (16 - l)
				next++
			}
		}
		next <<= 1
	}
	return codes
}

// TestTables looks up every symbol of random complete codes, long ones among them: a table that had no room for its
// subtables would panic.
func TestTables(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(31, 37))
	for round := range short.Size(800, 80) {
		var f inflater
		f.t = &f.own
		lit := randomCode(r, 257+r.IntN(30), round%2 == 0)
		dist := randomCode(r, 2+r.IntN(29), round%4 < 2)
		if err := f.own.buildLit(lit); err != nil {
			t.Fatal(err)
		}
		if err := f.own.buildDist(dist); err != nil {
			t.Fatal(err)
		}
		if round%3 == 0 {
			f.own.pack()
		}
		litCodes, distCodes := canonical(lit), canonical(dist)
		for sym := range lit {
			d := r.IntN(len(dist))
			for _, extra := range []uint{0, r.Uint(), ^uint(0)} {
				lookUp(t, &f, sym, d, uint64(litCodes[sym]), uint64(distCodes[d]), uint(lit[sym]), uint(dist[d]), extra)
			}
		}
	}
}

// lookUp decodes sym with those extra bits set, and if it is a length distance symbol d likewise.
func lookUp(t *testing.T, f *inflater, sym, d int, litCode, distCode uint64, litLen, distLen, set uint) {
	t.Helper()
	w := bw().put(uint(litCode), litLen)
	wantLength, wantDist := 0, 0
	if sym > endBlock {
		extra := uint(lengthExtra[sym-257])
		dextra := uint(max(0, d/2-1))
		lbits, dbits := set&(1<<extra-1), set&(1<<dextra-1)
		w.put(lbits, extra).put(uint(distCode), distLen).put(dbits, dextra)
		wantLength = int(lengthBase[sym-257]) + int(lbits)
		wantDist = d + 1
		if d >= 4 {
			wantDist = (2+d&1)<<dextra + int(dbits) + 1
		}
	}
	used := int64(w.bit)
	w.put(0, 64)
	f.in, f.at = w.b, 0
	s, ok, err := f.next()
	if sym < endBlock {
		if !ok || s.count == 0 || int(s.lits[0]) != sym || s.length != 0 {
			t.Fatalf("literal %d: got %+v, %v", sym, s, err)
		}
		return
	}
	if !ok || err != nil || s.bits != used || s.count != 0 || s.end != (sym == endBlock) || s.length != wantLength || s.dist != wantDist {
		t.Fatalf("symbol %d, distance symbol %d: got %+v, %v; want length %d, distance %d, %d bits", sym, d, s, err, wantLength, wantDist, used)
	}
}
