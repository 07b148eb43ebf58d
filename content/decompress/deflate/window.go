package deflate

import (
	"encoding/binary"
	"sync"
	"unsafe"
)

// slab is memory for output: bytes once they are known, 16-bit symbols as long
// as they may be markers. Both slices are the same memory, so that markers are
// replaced in place and no second buffer is touched.
type slab struct {
	b []byte
	u []uint16
}

// newSlab makes one of size bytes, which is even.
func newSlab(size int) *slab {
	u := make([]uint16, size/2)
	return &slab{u: u, b: unsafe.Slice((*byte)(unsafe.Pointer(&u[0])), size)}
}

const (
	fourMarkers = uint64(marker) * 0x0001_0001_0001_0001
	lowPairs    = 0x0000_ffff_0000_ffff
)

// values is what each symbol stands for: bytes for themselves, markers for the
// bytes of a window. A table look-up has no branch that could be mispredicted.
type values [1 << 16]byte

var valueTables = sync.Pool{New: func() any {
	v := new(values)
	for i := range 256 {
		v[i] = byte(i)
	}
	return v
}}

// newValues returns a table from the pool.
func newValues(win *window) *values {
	v := valueTables.Get().(*values)
	copy(v[marker:], win.buf[:])
	return v
}

// resolve turns the symbols lo to hi of s into bytes at the same indices. A byte
// is never written behind the symbol that is read next, because it takes half
// the room.
func (s *slab) resolve(lo, hi int, v *values) {
	i := lo
	for ; i+8 <= hi; i += 8 {
		src := s.b[2*i : 2*i+16 : 2*i+16]
		x, y := binary.LittleEndian.Uint64(src), binary.LittleEndian.Uint64(src[8:])
		var z uint64
		if (x|y)&fourMarkers == 0 {
			z = pack(x) | pack(y)<<32
		} else {
			z = v.four(x) | v.four(y)<<32
		}
		binary.LittleEndian.PutUint64(s.b[i:i+8:i+8], z)
	}
	for ; i < hi; i++ {
		s.b[i] = v[s.u[i]]
	}
}

// pack takes the low bytes of four symbols that are no markers.
func pack(x uint64) uint64 {
	x = (x | x>>8) & lowPairs
	return (x | x>>16) & 0xffff_ffff
}

// four looks up four symbols.
func (v *values) four(x uint64) uint64 {
	return uint64(v[uint16(x)]) | uint64(v[uint16(x>>16)])<<8 | uint64(v[uint16(x>>32)])<<16 | uint64(v[uint16(x>>48)])<<24
}

func plain(u uint16, win *[windowSize]byte) byte {
	if u&marker != 0 {
		return win[u&(windowSize-1)]
	}
	return byte(u)
}

// window is up to 32 KiB of known bytes, at the end of buf.
type window struct {
	n   int
	buf [windowSize]byte
}

func (w *window) bytes() []byte { return w.buf[windowSize-w.n:] }

// set takes the last bytes of p.
func (w *window) set(p []byte) {
	p = p[max(0, len(p)-windowSize):]
	w.n = len(p)
	copy(w.bytes(), p)
}

// setResolved takes the window that ends after the symbols syms, which follow
// the window before. before may be nil if syms hold no marker in their last 32
// Ki.
func (w *window) setResolved(syms []uint16, before *window) {
	syms = syms[max(0, len(syms)-windowSize):]
	keep := windowSize - len(syms)
	w.n = windowSize
	if before == nil {
		before = new(window)
		w.n = len(syms)
	}
	copy(w.buf[:keep], before.buf[len(syms):])
	for i, u := range syms {
		w.buf[keep+i] = plain(u, &before.buf)
	}
}
