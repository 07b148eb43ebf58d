package decompress

import (
	"encoding/binary"
	"math/bits"
)

// The primes of XXH32 (doc/xxhash_spec.md of the xxHash project).
const (
	xxPrime1 = 2654435761
	xxPrime2 = 2246822519
	xxPrime3 = 3266489917
	xxPrime4 = 668265263
	xxPrime5 = 374761393
)

// xxh32 is the checksum of the LZ4 frame format: XXH32 with seed 0. The library
// has one for itself only.
type xxh32 struct {
	lanes [4]uint32
	total uint64
	rest  [16]byte // total%16 bytes that do not make a stripe yet
}

func newXXH32() xxh32 {
	var prime1 uint32 = xxPrime1
	return xxh32{lanes: [4]uint32{prime1 + xxPrime2, xxPrime2, 0, -prime1}}
}

func (x *xxh32) write(p []byte) {
	have := int(x.total % 16)
	x.total += uint64(len(p))
	if have > 0 {
		n := copy(x.rest[have:], p)
		if p = p[n:]; have+n < 16 {
			return
		}
		x.stripes(x.rest[:])
	}
	whole := len(p) &^ 15
	x.stripes(p[:whole])
	copy(x.rest[:], p[whole:])
}

// stripes takes in p, whose length is a multiple of 16.
func (x *xxh32) stripes(p []byte) {
	a, b, c, d := x.lanes[0], x.lanes[1], x.lanes[2], x.lanes[3]
	for len(p) >= 16 {
		a = bits.RotateLeft32(a+binary.LittleEndian.Uint32(p)*xxPrime2, 13) * xxPrime1
		b = bits.RotateLeft32(b+binary.LittleEndian.Uint32(p[4:])*xxPrime2, 13) * xxPrime1
		c = bits.RotateLeft32(c+binary.LittleEndian.Uint32(p[8:])*xxPrime2, 13) * xxPrime1
		d = bits.RotateLeft32(d+binary.LittleEndian.Uint32(p[12:])*xxPrime2, 13) * xxPrime1
		p = p[16:]
	}
	x.lanes = [4]uint32{a, b, c, d}
}

func (x *xxh32) sum() uint32 {
	var h uint32 = xxPrime5 // the third lane, which is the seed, plus it
	if x.total >= 16 {
		h = bits.RotateLeft32(x.lanes[0], 1) + bits.RotateLeft32(x.lanes[1], 7) +
			bits.RotateLeft32(x.lanes[2], 12) + bits.RotateLeft32(x.lanes[3], 18)
	}
	h += uint32(x.total)
	p := x.rest[:x.total%16]
	for ; len(p) >= 4; p = p[4:] {
		h = bits.RotateLeft32(h+binary.LittleEndian.Uint32(p)*xxPrime3, 17) * xxPrime4
	}
	for _, c := range p {
		h = bits.RotateLeft32(h+uint32(c)*xxPrime5, 11) * xxPrime1
	}
	h = (h ^ h>>15) * xxPrime2
	h = (h ^ h>>13) * xxPrime3
	return h ^ h>>16
}

func xxh32Of(p []byte) uint32 {
	x := newXXH32()
	x.write(p)
	return x.sum()
}
