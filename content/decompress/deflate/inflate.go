package deflate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"unsafe"
)

var (
	errCorrupt       = errors.New("corrupt deflate stream")
	errUnexpectedEOF = io.ErrUnexpectedEOF

	errOversubscribed = fmt.Errorf("%w: over-subscribed code", errCorrupt)
	errIncomplete     = fmt.Errorf("%w: incomplete code", errCorrupt)
	errNoEnd          = fmt.Errorf("%w: no code for the end of the block", errCorrupt)
	errBlockType      = fmt.Errorf("%w: invalid block type", errCorrupt)
	errStoredLength   = fmt.Errorf("%w: stored length does not match its complement", errCorrupt)
	errTooMany        = fmt.Errorf("%w: too many length or distance codes", errCorrupt)
	errRepeat         = fmt.Errorf("%w: invalid repeat of a code length", errCorrupt)
	errSymbol         = fmt.Errorf("%w: invalid literal or length code", errCorrupt)
	errDistance       = fmt.Errorf("%w: invalid distance code", errCorrupt)
	errTooFar         = fmt.Errorf("%w: distance too far back", errCorrupt)
)

const (
	windowSize = 32 << 10
	// marker flags a value of decodeMarked that stands for a byte of the unknown window.
	marker = 0x8000
	// outMargin is the room that decoding a symbol may need: the longest match, the literals before it in one round of the
	// fast loop, and what its wide copies write too far. Callers leave it free behind what they want to decode.
	outMargin = 258 + 62
)

// status is why decoding stopped.
type status uint8

const (
	needInput status = iota // all usable input is decoded
	outFull                 // fewer than outMargin values are free in out
	atBlock                 // at a block boundary, at or behind the bit that was asked for
	ended                   // behind the final block
)

// state is where in the stream an inflater stands.
type state uint8

const (
	inHeader state = iota // at a block boundary
	inStored
	inSymbols
	atEnd
)

// inflater decodes DEFLATE blocks of one raw stream, within one goroutine. It keeps no reference to output between calls.
//
// Its place in the input is one bit position and nothing is buffered between calls, so input may move and grow.
type inflater struct {
	in    []byte
	at    int64 // the next undecoded bit
	eof   bool  // in is all there is
	state state
	final bool // the block at hand is the last one
	left  int  // bytes of a stored block not copied yet
	plain int  // bytes of stored blocks that were copied
	clean int  // where decodeMarked's output has no marker any more

	t     *tables // of the block at hand: &own or fixedTables
	fresh bool    // no symbol of it is decoded yet
	own   tables
	lens  [320]uint8
}

// reset starts at the given bit of in, where a block header stands; bit may be any, not only a multiple of 8.
func (f *inflater) reset(in []byte, bit int64) {
	f.in, f.at, f.eof = in, bit, false
	f.state, f.final, f.left, f.plain, f.clean = inHeader, false, 0, 0, 0
}

// extend replaces the input by the same bytes and more of them, which may have moved; eof says that no more will follow.
// drop is how many bytes went from its front since: bit positions shift by 8 times that.
func (f *inflater) extend(in []byte, drop int, eof bool) {
	f.in, f.eof = in, eof
	f.at -= int64(drop) * 8
}

// bit is the position of the next undecoded bit, from the start of the input.
func (f *inflater) bit() int64 { return f.at }

// decode appends to out[:n], whose last 32 KiB (all of it if n is less) are the window; a distance beyond it is an error.
// It returns the new n and why it stopped; with stop >= 0 it stops at every block boundary at or behind that bit, also where
// it begins. Bytes of out behind the returned n may have been written to. needInput leaves at most a few bytes undecoded, or
// a block header that is not complete; if no more input can come, errUnexpectedEOF goes with it. After an error (n is then
// what was decoded until there) the inflater must be reset.
func (f *inflater) decode(out []byte, n int, stop int64) (int, status, error) {
	for {
		if st, more, err := f.enter(stop); !more {
			return n, st, err
		}
		var done bool
		var err error
		if f.state == inStored {
			n, done = f.storedBytes(out, n)
		} else {
			n, done, err = f.symbols(out, n)
		}
		if err != nil {
			return n, needInput, err
		}
		if !done {
			st, err := f.starved(len(out) - n)
			return n, st, err
		}
		f.leave()
	}
}

// decodeMarked is decode without a known window. Values below 256 are bytes; marker|i stands for byte i of the 32 KiB before
// out[0] (32767 is the byte right before it). clean is the index in out from which on there is no marker (n if the last
// value is one): once n-clean >= 32 KiB, or at any other return if the window has become known, the caller may go on with
// decode, on bytes.
func (f *inflater) decodeMarked(out []uint16, n int, stop int64) (newN, clean int, st status, err error) {
	from := n
	for {
		var more, done bool
		if st, more, err = f.enter(stop); !more {
			break
		}
		if f.state == inStored {
			n, done = f.storedMarked(out, n)
		} else {
			n, done, err = f.symbolsMarked(out, n)
		}
		if err != nil {
			st = needInput
			break
		}
		if !done {
			st, err = f.starved(len(out) - n)
			break
		}
		f.leave()
	}
	if last := lastMarker(out[from:n]); last >= 0 {
		f.clean = from + last + 1
	}
	return n, f.clean, st, err
}

// lastMarker is the index of the last marker in values, -1 if there is none.
func lastMarker(values []uint16) int {
	i := len(values)
	for ; i >= 16; i -= 16 {
		v := (*[4]uint64)(unsafe.Pointer(unsafe.SliceData(values[i-16 : i]))) // 16 values
		if (v[0]|v[1]|v[2]|v[3])&0x8000800080008000 != 0 {
			break
		}
	}
	for i--; i >= 0 && values[i] < marker; i-- {
	}
	return i
}

// starved is why symbols or stored bytes stopped although their block goes on, with free values left in the output.
func (f *inflater) starved(free int) (status, error) {
	if free == 0 || free < outMargin && f.state != inStored {
		return outFull, nil
	}
	return f.short()
}

// short is the answer to too little input.
func (f *inflater) short() (status, error) {
	if f.eof {
		return needInput, errUnexpectedEOF
	}
	return needInput, nil
}

// leave ends a block.
func (f *inflater) leave() {
	f.state = inHeader
	if f.final {
		f.state = atEnd
	}
}

// enter goes into the next block, if the inflater stands at a boundary. more says that there is something to decode.
func (f *inflater) enter(stop int64) (st status, more bool, err error) {
	switch f.state {
	case atEnd:
		return ended, false, nil
	case inHeader:
	default:
		return 0, true, nil
	}
	if stop >= 0 && f.at >= stop {
		return atBlock, false, nil
	}
	r := bitReader{in: f.in, at: f.at}
	final, kind := r.take(1), r.take(2)
	next := inSymbols
	if !r.over() {
		switch kind {
		case 0:
			next = inStored
			f.left, err = r.storedHeader()
		case 1:
			f.t = fixedTables
		case 2:
			f.t = &f.own
			err = f.dynamicHeader(&r)
		default:
			err = errBlockType
		}
	}
	if r.over() {
		st, err = f.short()
		return st, false, err
	}
	if err != nil {
		return needInput, false, err
	}
	f.final, f.state, f.at, f.fresh = final == 1, next, r.at, true
	return 0, true, nil
}

// bitReader reads block headers. Behind the end of its input it reads zeros and remembers that in over: what was made of
// them, errors included, is void then.
type bitReader struct {
	in []byte
	at int64
}

// over says that more was taken than there is.
func (r *bitReader) over() bool { return r.at > int64(len(r.in))*8 }

// take reads n bits, at most 32.
func (r *bitReader) take(n uint) uint {
	v := uint(peek(r.in, r.at)) & (1<<n - 1)
	r.at += int64(n)
	return v
}

// peek returns at least 57 bits of in from the given one, zeros behind its end.
func peek(in []byte, bit int64) uint64 {
	i := bit >> 3
	if i+8 <= int64(len(in)) {
		return binary.LittleEndian.Uint64(in[i:]) >> (bit & 7)
	}
	if i >= int64(len(in)) {
		return 0
	}
	var b [8]byte
	copy(b[:], in[i:])
	return binary.LittleEndian.Uint64(b[:]) >> (bit & 7)
}

func (r *bitReader) storedHeader() (int, error) {
	r.at = (r.at + 7) &^ 7
	n, c := r.take(16), r.take(16)
	if n != ^c&0xffff {
		return 0, errStoredLength
	}
	return int(n), nil
}

// storedBytes copies what there is of a stored block.
func (f *inflater) storedBytes(out []byte, n int) (newN int, done bool) {
	i := int(f.at >> 3)
	c := copy(out[n:], f.in[i:min(len(f.in), i+f.left)])
	f.at += int64(c) * 8
	f.left -= c
	f.plain += c
	return n + c, f.left == 0
}

// storedMarked is storedBytes for decodeMarked.
func (f *inflater) storedMarked(out []uint16, n int) (newN int, done bool) {
	i := int(f.at >> 3)
	c := min(f.left, len(f.in)-i, len(out)-n)
	widen(out[n:n+c], f.in[i:i+c])
	f.at += int64(c) * 8
	f.left -= c
	f.plain += c
	return n + c, f.left == 0
}

func widen(to []uint16, from []byte) {
	to = to[:len(from)]
	for i, b := range from {
		to[i] = uint16(b)
	}
}
