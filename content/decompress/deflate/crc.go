package deflate

import (
	"hash/crc32"
	"math/bits"
)

// sum is the CRC-32 of n bytes.
type sum struct {
	crc uint32
	n   int64
}

func sumOf(p []byte) sum { return sum{crc32.ChecksumIEEE(p), int64(len(p))} }

// add appends bytes.
func (s *sum) add(p []byte) {
	s.crc = crc32.Update(s.crc, crc32.IEEETable, p)
	s.n += int64(len(p))
}

// then is the sum of the bytes of s followed by those of next. The CRC is the
// remainder of a polynomial, so s only has to be multiplied by x to the power
// of the bits that follow it: about a microsecond, whatever the lengths.
func (s sum) then(next sum) sum {
	if s.n == 0 {
		return next
	}
	if next.n == 0 {
		return s
	}
	return sum{crcMul(crcShift(next.n), s.crc) ^ next.crc, s.n + next.n}
}

// crcMul multiplies two polynomials modulo that of CRC-32. Bit 31 is x^0, as
// the CRC of gzip is reflected.
func crcMul(a, b uint32) uint32 {
	var p uint32
	for a != 0 {
		k := bits.LeadingZeros32(a)
		a &^= 1 << (31 - k)
		p ^= crcTimesX(b, k)
	}
	return p
}

// crcTimesX multiplies by x^k, k below 32.
func crcTimesX(b uint32, k int) uint32 {
	for range k {
		b = b>>1 ^ crc32.IEEE&-(b&1)
	}
	return b
}

// crcPowers[i] is x^(8 * 2^i).
var crcPowers = func() (t [63]uint32) {
	p := uint32(1) << (31 - 8) // x^8
	for i := range t {
		t[i] = p
		p = crcMul(p, p)
	}
	return t
}()

// crcShift is x^(8n): what n bytes shift those before them by.
func crcShift(n int64) uint32 {
	p := uint32(1) << 31 // x^0
	for i := 0; n != 0; i, n = i+1, n>>1 {
		if n&1 != 0 {
			p = crcMul(crcPowers[i], p)
		}
	}
	return p
}
