package deflate

import "unsafe"

// fastMarked is fastBytes for decodeMarked: see there.
func (f *inflater) fastMarked(out []uint16, n, most int) (newN int, done bool, err error) {
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

		*(*uint32)(unsafe.Add(o, 2*n)) = (e>>16 | e>>16<<8) & 0xff00ff
		bb >>= e & 63
		nb -= uint64(e)
		n += int(e >> 8 & 3)
		if e&(litMatch|litSpecial) == 0 {
			e = t.lit[bb&(1<<litBits-1)]
			*(*uint32)(unsafe.Add(o, 2*n)) = (e>>16 | e>>16<<8) & 0xff00ff
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
				*(*uint32)(unsafe.Add(o, 2*n)) = (e>>16 | e>>16<<8) & 0xff00ff
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
			n = markedCopy(out, n, dist, length)
			continue
		}
		to := unsafe.Add(o, 2*n)
		from := unsafe.Add(to, -2*dist)
		n += length
		switch {
		case dist >= 16:
			*(*[16]byte)(to) = *(*[16]byte)(from)
			*(*[16]byte)(unsafe.Add(to, 16)) = *(*[16]byte)(unsafe.Add(from, 16))
			for length > 16 {
				to = unsafe.Add(to, 32)
				from = unsafe.Add(from, 32)
				length -= 16
				*(*[16]byte)(to) = *(*[16]byte)(from)
				*(*[16]byte)(unsafe.Add(to, 16)) = *(*[16]byte)(unsafe.Add(from, 16))
			}
		case dist >= 4:
			for {
				*(*uint64)(to) = *(*uint64)(from)
				if length -= 4; length <= 0 {
					break
				}
				to = unsafe.Add(to, 8)
				from = unsafe.Add(from, 8)
			}
		default:
			v := *(*uint64)(from)
			s := uint(64 - 16*dist)
			v = v << (s & 63) >> (s & 63) * nearMul[(2*dist)&15]
			step := int(nearStep[(2*dist)&15])
			for {
				*(*uint64)(to) = v
				if length -= step / 2; length <= 0 {
					break
				}
				to = unsafe.Add(to, step)
			}
		}
	}
	f.at = pos*8 - int64(nb&63)
	return n, done, err
}
