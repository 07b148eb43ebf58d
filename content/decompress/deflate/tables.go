package deflate

import "math/bits"

// Sizes of the decoding tables. The first level is indexed by litBits or distBits bits of input; longer codes go on in
// subtables behind it. One of 2^w entries is there because a code is w bits longer than the first level, so it holds at least
// w+1 symbols; of the longest codes (15 bits: w = 4 for literals and lengths, 6 for distances) that makes 16 entries for 5 of
// 288 symbols, or 64 for 7 of 32, and shorter ones take less. Hence never more than 58 or 5 such subtables' worth.
const (
	litBits  = 11
	distBits = 9
	litSize  = 1<<litBits + 58*16
	distSize = 1<<distBits + 5*64

	maxCode  = 15  // bits of the longest code
	maxLit   = 286 // literal/length symbols a dynamic block may define
	maxDist  = 30
	endBlock = 256
)

// An entry of the literal/length table:
//
//	bits 0–7    how many bits of input it takes, extra bits of a length included
//	bits 8–9    how many literals it holds: 0, 1 or 2
//	bit 10      litMatch: a match follows the literals; its length less 3 is in bits 24–31
//	bit 11      litSpecial: none of these, see below
//	bits 16–23  the first literal
//	bits 24–31  the second literal
//
// So a literal and the length behind it may come of one look-up, and whatever an entry is, a decoder may first take its
// bits, store two bytes and advance by bits 8–9. A special entry has no literals; bits 12–13 say what it is:
const (
	litOne     = 1 << 8
	litTwo     = 2 << 8
	litCount   = 3 << 8
	litMatch   = 1 << 10
	litSpecial = 1 << 11

	kindMask    = 3 << 12
	kindSub     = 0 << 12 // bits 16–27: a subtable's offset behind the first level, bits 28–31: the bits that index it
	kindEnd     = 1 << 12 // end of block
	kindExtra   = 2 << 12 // bits 16–27: base of a length, bits 28–31: its extra bits, which are still in the input
	kindInvalid = 3 << 12
)

// An entry of the distance table:
//
//	bits 0–7    how many bits of input it takes, extra bits included
//	bits 8–13   63 less the number of extra bits
//	bit 14      distInvalid
//	bit 15      distSub: bits 16–27 are a subtable's offset, bits 8–11 the bits that index it
//	bits 16–31  base of the distance
const (
	distInvalid = 1 << 14
	distSub     = 1 << 15
)

// tables decode one block's symbols.
type tables struct {
	lit  [litSize]uint32
	dist [distSize]uint32
	// lens are the code lengths behind lit: pack and the checked decoder need those of literals.
	lens [288]uint8
}

var lengthBase = [29]uint16{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
var lengthExtra = [29]uint8{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}

// fixedTables are those of block type 1 (RFC 1951, 3.2.6).
var fixedTables = newFixedTables()

func newFixedTables() *tables {
	var lit [288]uint8
	for i := range lit {
		switch {
		case i < 144:
			lit[i] = 8
		case i < 256:
			lit[i] = 9
		case i < 280:
			lit[i] = 7
		default:
			lit[i] = 8
		}
	}
	var dist [32]uint8
	for i := range dist {
		dist[i] = 5
	}
	t := new(tables)
	if t.buildLit(lit[:]) != nil || t.buildDist(dist[:]) != nil {
		panic("deflate: the fixed codes are complete")
	}
	t.pack()
	return t
}

// code is a set of code lengths, sorted: what both tables are built from.
type code struct {
	count  [maxCode + 1]uint16
	sorted [288]uint16 // symbols by length, then by value
	max    uint        // longest length
}

// init sorts lens and judges them as zlib does: over-subscribed codes never pass, incomplete ones only if they are a
// single code of one bit, or none at all.
//
// The halves of lens are counted and sorted side by side: most symbols have one of two or three lengths, so that each
// would wait for the count that the one before has just stored.
func (c *code) init(lens []uint8) error {
	half := len(lens) / 2
	low, high := lens[:half], lens[half:]
	var next [2][maxCode + 1]uint16
	for i, l := range low {
		next[0][l&15]++
		next[1][high[i]&15]++
	}
	if len(high) > half {
		next[1][high[half]&15]++
	}
	at, left := uint16(0), 1
	c.max = 0
	for l := 1; l <= maxCode; l++ {
		n := next[0][l] + next[1][l]
		c.count[l] = n
		left = left<<1 - int(n)
		if left < 0 {
			return errOversubscribed
		}
		if n > 0 {
			c.max = uint(l)
		}
		next[0][l], next[1][l], at = at, at+next[0][l], at+n
	}
	if left > 0 && c.max > 1 {
		return errIncomplete
	}
	// Symbols without a code go to the end: no branch on that.
	next[0][0], next[1][0] = at, at+next[0][0]
	for i, l := range low {
		h := high[i] & 15
		c.sorted[next[0][l&15]] = uint16(i)
		c.sorted[next[1][h]] = uint16(half + i)
		next[0][l&15]++
		next[1][h]++
	}
	if len(high) > half {
		c.sorted[next[1][high[half]&15]] = uint16(2 * half)
	}
	return nil
}

// fill lays both tables out: entries has each symbol's entry without the bits of its code, which are added; in a subtable,
// those behind the first level. link makes the entry that leads to a subtable, invalid is that of bits which begin no code.
//
// The first level grows with the length of the codes: one of l bits repeats every 1<<l entries, and a copy of all of them at
// once is cheaper than to store each at its distances.
func (c *code) fill(table []uint32, root uint, entries *[288]uint32, invalid uint32, link func(offset, width uint) uint32) {
	table[0] = invalid
	var (
		word uint // the next code
		size = 1
		i    int
	)
	for l := uint(1); l <= root; l++ {
		copy(table[size:2*size], table[:size])
		size *= 2
		first := table[:size]
		for _, sym := range c.sorted[i : i+int(c.count[l])] {
			first[uint(bits.Reverse16(uint16(word)))>>(16-l)] = entries[sym] + uint32(l)
			word++
		}
		i += int(c.count[l])
		word <<= 1
	}
	if c.max > root {
		c.fillSubs(table, root, entries, word, i, link)
	}
}

// fillSubs goes on with the codes that are longer than the first level.
func (c *code) fillSubs(table []uint32, root uint, entries *[288]uint32, word uint, i int, link func(offset, width uint) uint32) {
	var (
		used  = uint(1) << root
		group = ^uint(0) // the first-level index of the current subtable
		sub   []uint32
		left  = c.count
	)
	for l := root + 1; l <= c.max; l++ {
		for ; left[l] > 0; left[l]-- {
			rev := uint(bits.Reverse16(uint16(word))) >> (16 - l)
			if low := rev & (1<<root - 1); low != group {
				group = low
				width := subWidth(&left, l-root, root, c.max)
				table[low] = link(used-1<<root, width)
				sub = table[used : used+1<<width]
				used += 1 << width
			}
			spread(sub, rev>>root, l-root, entries[c.sorted[i]]+uint32(l-root))
			i++
			word++
		}
		word <<= 1
	}
}

// subWidth is how many bits index a subtable whose first code has width bits behind the first level: left counts the codes
// not placed yet, and the subtable takes those that complete it.
func subWidth(left *[maxCode + 1]uint16, width, root, longest uint) uint {
	room := 1 << width
	for width+root < longest {
		room -= int(left[(width+root)&15])
		if room <= 0 {
			break
		}
		width++
		room <<= 1
	}
	return width
}

func (t *tables) buildLit(lens []uint8) error {
	var c code
	if err := c.init(lens); err != nil {
		return err
	}
	copy(t.lens[:], lens)
	c.fill(t.lit[:], litBits, &litEntries, litSpecial|kindInvalid|1, func(offset, width uint) uint32 {
		return uint32(litSpecial | kindSub | offset<<16 | width<<28 | litBits)
	})
	t.widen(&c)
	return nil
}

// litEntries are without the bits of the code.
var litEntries = func() (entries [288]uint32) {
	for sym := range entries {
		switch {
		case sym < endBlock:
			entries[sym] = litOne | uint32(sym)<<16
		case sym == endBlock:
			entries[sym] = litSpecial | kindEnd
		case sym >= maxLit:
			entries[sym] = litSpecial | kindInvalid
		default:
			base, extra := uint32(lengthBase[sym-257]), uint32(lengthExtra[sym-257])
			if extra == 0 {
				entries[sym] = litMatch | (base-3)<<24
			} else {
				entries[sym] = litSpecial | kindExtra | base<<16 | extra<<28
			}
		}
	}
	return entries
}()

// firstExtra is the first length symbol with extra bits.
const firstExtra = 265

// widen has lengths that fit the first level with their extra bits take an entry for each value of those.
func (t *tables) widen(c *code) {
	word, i := uint(0), 0
	for l := uint(1); l < litBits; l++ {
		n := uint(c.count[l])
		word, i = word+n, i+int(n)
		// Lengths are the last symbols of those with l bits.
		for k := uint(1); k <= n; k++ {
			sym := uint(c.sorted[i-int(k)])
			if sym < firstExtra {
				break
			}
			if sym >= maxLit || l+uint(lengthExtra[sym-257]) > litBits {
				continue
			}
			base, extra := uint(lengthBase[sym-257]), uint(lengthExtra[sym-257])
			rev := uint(bits.Reverse16(uint16(word-k))) >> (16 - l)
			for v := range uint(1) << extra {
				spread(t.lit[:1<<litBits], rev|v<<l, l+extra, uint32(l+extra|litMatch|(base+v-3)<<24))
			}
		}
		word <<= 1
	}
}

func spread(table []uint32, i, length uint, entry uint32) {
	for ; i < uint(len(table)); i += 1 << length {
		table[i] = entry
	}
}

// joins says whether pack would find enough to join: it looks at some of the entries.
func (t *tables) joins() bool {
	found := 0
	for i := uint32(0); i < 64; i++ {
		at := i * 1181 & (1<<litBits - 1)
		if _, ok := t.join(at); ok {
			found++
		}
	}
	return found >= 64/10
}

// join is entry i with the literal or length behind it, if both fit the first level.
func (t *tables) join(i uint32) (e uint32, ok bool) {
	e = t.lit[i&(1<<litBits-1)]
	next := t.lit[i>>(e&63)&(1<<litBits-1)]
	if e&(litMatch|litSpecial) != 0 || next&litSpecial != 0 || e&255+next&255 > litBits {
		return e, false
	}
	if next&litMatch != 0 {
		return (e + next&255) | litMatch | next&0xff000000, true
	}
	return (e+next&255)&^litCount | litTwo | (next>>16&255)<<24, true
}

// pack joins each literal with the literal or length behind it where both fit the first level. It pays once a block has
// thousands of symbols, so it is not part of building.
func (t *tables) pack() {
	// Downwards: i >> length is below i (or i itself, 0), hence not joined yet.
	for i := 1<<litBits - 1; i >= 0; i-- {
		if e, ok := t.join(uint32(i)); ok {
			t.lit[i] = e
		}
	}
}

func (t *tables) buildDist(lens []uint8) error {
	var c code
	if err := c.init(lens); err != nil {
		return err
	}
	c.fill(t.dist[:], distBits, &distEntries, distInvalid|1, func(offset, width uint) uint32 {
		return uint32(distSub | offset<<16 | width<<8 | distBits)
	})
	return nil
}

// distEntries are without the bits of the code.
var distEntries = func() (entries [288]uint32) {
	for sym := range uint32(len(entries)) {
		if sym >= maxDist {
			entries[sym] = distInvalid
			continue
		}
		base, extra := sym+1, uint32(0)
		if sym >= 4 {
			extra = sym/2 - 1
			base = (2+sym&1)<<extra + 1
		}
		entries[sym] = base<<16 | (63-extra)<<8 | extra
	}
	return entries
}()
