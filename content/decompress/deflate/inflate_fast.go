package deflate

import "unsafe"

const (
	inMargin   = 32
	freshInput = 1024
)

var (
	nearMul  = [16]uint64{1, 0x0101010101010101, 0x0001000100010001, 1 | 1<<24 | 1<<48, 1 | 1<<32, 1 | 1<<40, 1 | 1<<48, 1 | 1<<56, 1, 1, 1, 1, 1, 1, 1, 1}
	nearStep = [16]uint8{8, 8, 8, 6, 8, 5, 6, 7, 8, 8, 8, 8, 8, 8, 8, 8}
)

func (f *inflater) fastBytes(out []byte, n, most int) (newN int, done bool, err error) {
	inEnd := int64(len(f.in) - inMargin)
	if most < len(f.in) {
		inEnd = min(inEnd, f.at>>3+int64(most))
	}
	outEnd := len(out) - outMargin
	pos := f.at >> 3
	if pos > inEnd || n > outEnd {
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
		if dist >= 16 {
			*(*[16]byte)(to) = *(*[16]byte)(from)
			for length > 16 {
				to = unsafe.Add(to, 16)
				from = unsafe.Add(from, 16)
				length -= 16
				*(*[16]byte)(to) = *(*[16]byte)(from)
			}
		} else if dist >= 8 {
			for {
				*(*uint64)(to) = *(*uint64)(from)
				if length -= 8; length <= 0 {
					break
				}
				to = unsafe.Add(to, 8)
				from = unsafe.Add(from, 8)
			}
		} else {
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
