package deflate

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// mark is a place where decoding can begin.
type mark struct {
	bit    int64 // from the start of the stream
	member bool  // a gzip header stands there, not a block's
}

// blockStart makes the starts of a stored block comparable: between its three
// header bits and its length up to seven bits of padding are zero as well, so
// the header could be read at each of those. It is taken to stand right before
// the length. bit is a block boundary in in; ok is false if in ends too early.
func blockStart(in []byte, bit int64) (at int64, ok bool) {
	if (bit+2)>>3 >= int64(len(in)) {
		return bit, false
	}
	if peek(in, bit)&7 != 0 {
		return bit, true
	}
	at = (bit+3+7)&^7 - 3
	if pad := uint(at - bit); peek(in, bit)&(1<<(pad+3)-1) != 0 {
		return bit, true // padding that is not zero: the finder does not see it either
	}
	return at, true
}

// findStep is how many bytes are searched between two looks at whether the
// search is still wanted.
const findStep = 4 << 10

// find returns the first place in in, the bytes of a segment, that looks like
// the start of a block or of a member. It need not be one.
func find(in []byte, wanted func() bool) (m mark, ok bool) {
	stored := -1 // the next one, if it is behind seen
	seen := 0    // up to where stored blocks were searched
	for lo := 0; lo < len(in) && wanted(); lo += findStep {
		hi := min(lo+findStep, len(in))
		if stored < lo && seen < hi {
			seen = min(lo+storedAhead, len(in))
			stored = findStored(in, lo, seen)
		}
		if p := findMember(in, lo, hi); p >= 0 {
			return mark{int64(p) * 8, true}, true
		}
		if stored >= lo {
			return mark{bit: int64(stored)*8 - 3}, true
		}
		if bit := findDynamic(in, int64(lo)*8, int64(hi)*8); bit >= 0 {
			return mark{bit: bit}, true
		}
	}
	return m, false
}

// storedAhead is how far stored blocks are looked for before the slower search
// for dynamic blocks: in data that does not compress, one is not farther away. If
// there was another block before it, the chunk before simply decodes that too.
const storedAhead = 64<<10 + 16

// findDynamic returns the first bit from lo on and before hi where the header of
// a dynamic block stands that is not the last one, wholly within in; -1 if none.
func findDynamic(in []byte, lo, hi int64) int64 {
	hi = min(hi, int64(len(in))*8-128) // the smallest header takes more
	const step = 48                    // of 64 bits, since dynamicStarts and HCLEN look 17 bits ahead
	for base := lo &^ 7; base < hi; base += step {
		word := binary.LittleEndian.Uint64(in[base>>3:])
		m := dynamicStarts(word) & (1<<step - 1)
		if base < lo {
			m &= ^uint64(0) << (lo - base)
		}
		for ; m != 0; m &= m - 1 {
			i := bits.TrailingZeros64(m)
			bit := base + int64(i)
			if bit >= hi {
				return -1
			}
			if completePre(in, bit, uint(word>>(i+13)&15)+4) && checkLengths(in, bit) {
				return bit
			}
		}
	}
	return -1
}

// dynamicStarts tells of all bits of w at once whether such a header may begin
// there: one bit 0 (final), two of value 2 (type), HLIT and HDIST of five bits
// each, which are not 30 or 31: these have four ones at the top.
func dynamicStarts(w uint64) uint64 {
	tooMany := w >> 4 & (w >> 5) & (w >> 6) & (w >> 7)
	tooFar := w >> 9 & (w >> 10) & (w >> 11) & (w >> 12)
	return ^w & ^(w >> 1) & (w >> 2) &^ tooMany &^ tooFar
}

// completePre says whether the n lengths of code length codes, 17 bits behind
// bit, make a complete code.
func completePre(in []byte, bit int64, n uint) bool {
	bit += 17
	lens := binary.LittleEndian.Uint64(in[bit>>3:]) >> (bit & 7) & (1<<(3*n) - 1)
	return preSum(lens) == 128
}

// findStored returns the first byte from lo on and before hi where the length of
// a stored block may stand, -1 if none. Length, complement and three zero bits
// before them are met by chance once in half a MiB, so another block must follow.
func findStored(in []byte, lo, hi int) int {
	hi = min(hi, len(in)-4)
	for p := max(lo, 1); p < hi; p++ {
		// Eight places at once: in few of them is a byte the complement of the second after it.
		for p+10 <= len(in) && p < hi {
			same := ^(binary.LittleEndian.Uint64(in[p:]) ^ binary.LittleEndian.Uint64(in[p+2:]))
			if zero := (same - lowBits) &^ same & highBits; zero&(zero>>8) != 0 {
				break
			}
			p += 7 // the last one needs a look at the byte behind it
		}
		for end := min(p+8, hi); p < end; p++ {
			if isStored(in, p) {
				return p
			}
		}
		p--
	}
	return -1
}

const (
	lowBits  = 0x0101_0101_0101_0101
	highBits = 0x8080_8080_8080_8080
)

// isStored says whether the length of a stored block may stand at p.
func isStored(in []byte, p int) bool {
	v := binary.LittleEndian.Uint32(in[p:])
	return (v^v>>16)&0xffff == 0xffff && in[p-1]&0xe0 == 0 && blockFollows(in, int64(p+4+int(v&0xffff))*8)
}

// blockFollows says whether a block header may stand at bit. Of places behind in
// it says so, too.
func blockFollows(in []byte, bit int64) bool {
	i := int(bit >> 3)
	if len(in)-i < 512 {
		return true
	}
	switch peek(in, bit) >> 1 & 3 {
	case 0:
		v := binary.LittleEndian.Uint32(in[i+1:]) // bit is the first of a byte
		return (v^v>>16)&0xffff == 0xffff && in[i]&^1 == 0
	case 2:
		return checkHeader(in, bit)
	}
	return false
}

// findMember returns the first byte from lo on and before hi where a gzip header
// may stand, -1 if none.
func findMember(in []byte, lo, hi int) int {
	magic := []byte{0x1f, 0x8b, 8}
	for p := lo; p < hi; p++ {
		i := bytes.Index(in[p:min(hi+2, len(in))], magic)
		if i < 0 {
			return -1
		}
		p += i
		if p+headerSize <= len(in) && in[p+3]&flagReserved == 0 && plausibleMember(in[p:]) {
			return p
		}
	}
	return -1
}

// plausibleMember looks at a header that ends with its fixed part: a block type
// that exists must follow.
func plausibleMember(in []byte) bool {
	if in[3] != 0 || len(in) < headerSize+512 {
		return true
	}
	switch in[headerSize] >> 1 & 3 {
	case 0:
		v := binary.LittleEndian.Uint32(in[headerSize+1:])
		return (v^v>>16)&0xffff == 0xffff
	case 2:
		return checkHeader(in, headerSize*8)
	}
	return in[headerSize]>>1&3 == 1
}
