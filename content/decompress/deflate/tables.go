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
	n      int         // how many of sorted are used
	max    uint        // longest length
}

// init sorts lens and judges them as zlib does: over-subscribed codes never pass, incomplete ones only if they are a
// single code of one bit, or none at all.
func (c *code) init(lens []uint8) error {
	c.count = [maxCode + 1]uint16{}
	for _, l := range lens {
		c.count[l&15]++
	}
	var next [maxCode + 2]uint16
	left := 1
	c.max = 0
	for l := 1; l <= maxCode; l++ {
		left = left<<1 - int(c.count[l])
		if left < 0 {
			return errOversubscribed
		}
		next[l+1] = next[l] + c.count[l]
		if c.count[l] > 0 {
			c.max = uint(l)
		}
	}
	c.n = int(next[maxCode+1])
	if left > 0 && c.max > 1 {
		return errIncomplete
	}
	for sym, l := range lens {
		if l != 0 {
			c.sorted[next[l&15]] = uint16(sym)
			next[l&15]++
		}
	}
	return nil
}

// complete says that every sequence of bits begins with a code.
func (c *code) complete() bool { return c.max > 0 && (c.max > 1 || c.count[1] == 2) }

// fill is how both tables are laid out: put writes the entries of one symbol, whose reversed code is rev and which takes
// length bits in table (already less the bits of the first level); link makes the entry that leads to a subtable.
func (c *code) fill(table []uint32, root uint, put func(table []uint32, sym, rev, length uint), link func(offset, width uint) uint32) {
	var (
		word  uint // the next code
		used  = uint(1) << root
		group = ^uint(0) // the first-level index of the current subtable
		sub   []uint32
		left  = c.count
		i     int
	)
	for l := uint(1); l <= c.max; l++ {
		for ; left[l] > 0; left[l]-- {
			rev := uint(bits.Reverse16(uint16(word))) >> (16 - l)
			sym := uint(c.sorted[i])
			i++
			word++
			if l <= root {
				put(table[:1<<root], sym, rev, l)
				continue
			}
			if low := rev & (1<<root - 1); low != group {
				group = low
				width := subWidth(&left, l-root, root, c.max)
				table[low] = link(used-1<<root, width)
				sub = table[used : used+1<<width]
				used += 1 << width
			}
			put(sub, sym, rev>>root, l-root)
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
	if !c.complete() {
		for i := range t.lit[:1<<litBits] {
			t.lit[i] = litSpecial | kindInvalid | 1
		}
	}
	c.fill(t.lit[:], litBits, putLit, func(offset, width uint) uint32 {
		return uint32(litSpecial | kindSub | offset<<16 | width<<28 | litBits)
	})
	return nil
}

func putLit(table []uint32, sym, rev, length uint) {
	switch {
	case sym < endBlock:
		spread(table, rev, length, uint32(length|litOne|sym<<16))
	case sym == endBlock:
		spread(table, rev, length, uint32(length|litSpecial|kindEnd))
	case sym >= maxLit:
		spread(table, rev, length, uint32(length|litSpecial|kindInvalid))
	default:
		base, extra := uint(lengthBase[sym-257]), uint(lengthExtra[sym-257])
		if 1<<(length+extra) > len(table) {
			spread(table, rev, length, uint32(length|litSpecial|kindExtra|base<<16|extra<<28))
			return
		}
		for v := range uint(1) << extra {
			spread(table, rev|v<<length, length+extra, uint32(length+extra|litMatch|(base+v-3)<<24))
		}
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
	if !c.complete() {
		for i := range t.dist[:1<<distBits] {
			t.dist[i] = distInvalid | 1
		}
	}
	c.fill(t.dist[:], distBits, putDist, func(offset, width uint) uint32 {
		return uint32(distSub | offset<<16 | width<<8 | distBits)
	})
	return nil
}

func putDist(table []uint32, sym, rev, length uint) {
	if sym >= maxDist {
		spread(table, rev, length, uint32(distInvalid|length))
		return
	}
	base, extra := sym+1, uint(0)
	if sym >= 4 {
		extra = sym/2 - 1
		base = (2+sym&1)<<extra + 1
	}
	spread(table, rev, length, uint32(base<<16|(63-extra)<<8|(length+extra)))
}
