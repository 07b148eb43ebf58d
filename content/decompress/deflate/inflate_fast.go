package deflate

import (
	"encoding/binary"
	"unsafe"
)

// The fast loops, fastBytes and its twin fastMarked: whoever changes one changes both. They are not one generic function
// because they differ in each store.
//
// Bits. bb holds the next bits of input, nb (its low six bits) how many of them count. A refill ORs in the eight bytes at pos
// and advances by whole bytes; afterwards nb is 56 to 63, yet all 64 bits of bb are real input, so looking further than nb is
// allowed. Between two refills at most 50 bits are taken: two first-level entries of 11 and a distance of 15 + 13; then 11
// more are looked at, for the next entry. A special entry takes up to 11 + 15 + 5 and is followed by a refill of its own.
//
// Why no access is out of range, although none is checked:
//   - input: a round begins with pos <= len(in)-32 and has at most two refills, of eight bytes each, that advance by up to 7;
//   - output: a round begins with n <= len(out)-outMargin. It writes up to four literals and a match of 258, at most 15 values
//     too far (whole copies of 16), or two values where an entry has fewer literals: 277 in all, below outMargin;
//   - window: dist > n is refused (or goes to the checked markedCopy), so copies begin at out[0] or behind it;
//   - tables: first-level indexes are masked; those of subtables are bounds-checked.
//
// What limits it (AMD EPYC Zen 4, CPU time, go1.26, GOAMD64=v1): on a tar of Go's sources, gzip -6, 4.4 ns for each of 19.8 M
// symbols, 12 to 16 cycles (half of them are matches of 13 bytes): mispredicted branches, of which a match has two or three (is
// it one? how long? how near?). On literals of nearly 8 bits 2.6 ns each, 7 to 9 cycles: the latency of and + load + shift
// from one code to the next.
//
// Tried without gain: three look-ups for each refill (-7 %: the match path then needs a refill of its own); pointers that
// advance instead of indexes, with copies from below 16 bytes in a function of their own (-6 %: Go's calls spill all registers);
// a first level of 12 bits (+40 % on base64, -2 to -8 % on all else: table building and L1); joining literals in every block
// (-4 % where few join, hence joins).
const (
	inMargin = 32
	// freshInput is how much of a block is decoded before its table may be packed: small blocks would not earn it back.
	freshInput = 1024
)

// littleEndian: the loops load and store words as this machine has them; elsewhere the checked decoder does all the work.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// A match from less than 8 bytes back repeats a pattern: times nearMul it fills a word, of which nearStep bytes are whole periods.
var (
	nearMul  = [16]uint64{1, 0x0101010101010101, 0x0001000100010001, 1 | 1<<24 | 1<<48, 1 | 1<<32, 1 | 1<<40, 1 | 1<<48, 1 | 1<<56, 1, 1, 1, 1, 1, 1, 1, 1}
	nearStep = [16]uint8{8, 8, 8, 6, 8, 5, 6, 7, 8, 8, 8, 8, 8, 8, 8, 8}
)

// fastBytes decodes symbols while input and output are far from their ends, and not many more than most bytes of input.
// done says that the block ended. It is long because Go inlines no function of this size and calls cost more than symbols.
func (f *inflater) fastBytes(out []byte, n, most int) (newN int, done bool, err error) {
	inEnd := int64(len(f.in) - inMargin)
	if most < len(f.in) {
		inEnd = min(inEnd, f.at>>3+int64(most))
	}
	outEnd := len(out) - outMargin
	pos := f.at >> 3
	if pos < 0 || pos > inEnd || n > outEnd || !littleEndian {
		return n, false, nil
	}
	t := f.t
	in := unsafe.Pointer(unsafe.SliceData(f.in))
	o := unsafe.Pointer(unsafe.SliceData(out))
	bb := *(*uint64)(unsafe.Add(in, pos)) >> (f.at & 7)
	nb := uint64(56 - f.at&7)
	pos += 7
	e := t.lit[bb&(1<<litBits-1)]
	for pos <= inEnd && n <= outEnd {
		bb |= *(*uint64)(unsafe.Add(in, pos)) << (nb & 63)
		pos += int64(^nb >> 3 & 7)
		nb |= 56

		*(*uint16)(unsafe.Add(o, n)) = uint16(e >> 16)
		bb >>= e & 63
		nb -= uint64(e)
		n += int(e >> 8 & 3)
		if e&(litMatch|litSpecial) == 0 {
			e = t.lit[bb&(1<<litBits-1)]
			*(*uint16)(unsafe.Add(o, n)) = uint16(e >> 16)
			bb >>= e & 63
			nb -= uint64(e)
			n += int(e >> 8 & 3)
			if e&(litMatch|litSpecial) == 0 {
				e = t.lit[bb&(1<<litBits-1)]
				continue
			}
		}
		// A match, unless the entry is special.
		length := int(e>>24) + 3
		if e&litSpecial != 0 {
			if e&kindMask == kindSub {
				e = t.lit[1<<litBits+e>>16&0xfff+uint32(bb)&(1<<(e>>28)-1)]
				*(*uint16)(unsafe.Add(o, n)) = uint16(e >> 16)
				bb >>= e & 63
				nb -= uint64(e)
				n += int(e >> 8 & 3)
				if e&(litMatch|litSpecial) == 0 {
					e = t.lit[bb&(1<<litBits-1)]
					continue
				}
			}
			length = int(e>>24) + 3
			if e&litSpecial != 0 {
				if e&kindMask == kindEnd {
					done = true
					break
				}
				if e&kindMask == kindInvalid {
					err = errSymbol
					break
				}
				length = int(e>>16&0xfff) + int(bb&(1<<(e>>28)-1))
				bb >>= e >> 28
				nb -= uint64(e >> 28)
			}
			bb |= *(*uint64)(unsafe.Add(in, pos)) << (nb & 63)
			pos += int64(^nb >> 3 & 7)
			nb |= 56
		}
		d := t.dist[bb&(1<<distBits-1)]
		if d&(distSub|distInvalid) != 0 {
			if d&distSub != 0 {
				bb >>= distBits
				nb -= distBits
				d = t.dist[1<<distBits+d>>16&0xfff+uint32(bb)&(1<<(d>>8&15)-1)]
			}
			if d&distInvalid != 0 {
				err = errDistance
				break
			}
		}
		extra := bb << (-d & 63) >> 1 >> (d >> 8 & 63)
		dist := int(d>>16) + int(extra)
		bb >>= d & 63
		nb -= uint64(d)
		e = t.lit[bb&(1<<litBits-1)]
		if dist > n {
			err = errTooFar
			break
		}
		to := unsafe.Add(o, n)
		from := unsafe.Add(to, -dist)
		n += length
		switch {
		case dist >= 16:
			*(*[16]byte)(to) = *(*[16]byte)(from)
			for length > 16 {
				to = unsafe.Add(to, 16)
				from = unsafe.Add(from, 16)
				length -= 16
				*(*[16]byte)(to) = *(*[16]byte)(from)
			}
		case dist >= 8:
			for {
				*(*uint64)(to) = *(*uint64)(from)
				if length -= 8; length <= 0 {
					break
				}
				to = unsafe.Add(to, 8)
				from = unsafe.Add(from, 8)
			}
		default:
			v := *(*uint64)(from)
			s := uint(64 - 8*dist)
			v = v << (s & 63) >> (s & 63) * nearMul[dist&15]
			step := int(nearStep[dist&15])
			for {
				*(*uint64)(to) = v
				if length -= step; length <= 0 {
					break
				}
				to = unsafe.Add(to, step)
			}
		}
	}
	f.at = pos*8 - int64(nb&63)
	return n, done, err
}
