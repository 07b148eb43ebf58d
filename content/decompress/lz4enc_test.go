package decompress

import (
	"encoding/binary"
)

// lz4Encoder writes LZ4 blocks whose matches reach back over all that was
// encoded before, up to 64 KiB: neither library writes such blocks. It is greedy
// and knows one candidate for each hash.
type lz4Encoder struct {
	data  []byte       // all of the content
	seen  [1 << 14]int // by the hash of four bytes, one behind where they were last
	loose bool         // blocks may end with a match, as Apple's do
}

func newLZ4Encoder(data []byte) *lz4Encoder {
	return &lz4Encoder{data: data}
}

// block encodes data[from:to].
func (e *lz4Encoder) block(from, to int) []byte {
	var out []byte
	literal := from
	last := to - 12 // of the format: the last match begins 12 bytes before the end
	if e.loose {
		last = to - 4
	}
	for at := from; at <= last; {
		key := binary.LittleEndian.Uint32(e.data[at:])
		seen := &e.seen[key*2654435761>>18]
		candidate := *seen - 1
		*seen = at + 1
		if candidate < 0 || at-candidate > 65535 || binary.LittleEndian.Uint32(e.data[candidate:]) != key {
			at++
			continue
		}
		end := to
		if !e.loose {
			end = to - 5 // and the last five bytes are literals
		}
		n := 4
		for at+n < end && e.data[candidate+n] == e.data[at+n] {
			n++
		}
		out = sequence(out, e.data[literal:at], at-candidate, n)
		at += n
		literal = at
	}
	if e.loose && literal == to && len(out) > 0 {
		return out
	}
	return sequence(out, e.data[literal:to], 0, 0)
}

// sequence appends literals and a match, none if it has no offset.
func sequence(out, literals []byte, offset, n int) []byte {
	token := byte(min(len(literals), 15)) << 4
	if offset > 0 {
		token |= byte(min(n-4, 15))
	}
	out = append(out, token)
	out = length(out, len(literals)-15)
	out = append(out, literals...)
	if offset > 0 {
		out = append(out, byte(offset), byte(offset>>8))
		out = length(out, n-4-15)
	}
	return out
}

func length(out []byte, n int) []byte {
	if n < 0 {
		return out
	}
	for ; n >= 255; n -= 255 {
		out = append(out, 255)
	}
	return append(out, byte(n))
}

// blocks encodes data in blocks of 64 KiB and has each added to out. Those that
// do not shrink are stored.
func (e *lz4Encoder) blocks(size int, add func(raw, block []byte, stored bool)) {
	for from := 0; from < len(e.data); from += size {
		to := min(from+size, len(e.data))
		raw := e.data[from:to]
		if b := e.block(from, to); len(b) < len(raw) {
			add(raw, b, false)
		} else {
			add(raw, raw, true)
		}
	}
}

// linkedFrame is a frame of linked blocks of 64 KiB, with block checksums and
// that of the content.
func linkedFrame(data []byte) []byte {
	out := binary.LittleEndian.AppendUint32(nil, magicLZ4)
	descriptor := []byte{1<<6 | 1<<4 | 1<<2, 4 << 4}
	out = append(append(out, descriptor...), byte(xxh32Of(descriptor)>>8))
	newLZ4Encoder(data).blocks(64<<10, func(_, block []byte, stored bool) {
		size := uint32(len(block))
		if stored {
			size |= 1 << 31
		}
		out = binary.LittleEndian.AppendUint32(out, size)
		out = append(out, block...)
		out = binary.LittleEndian.AppendUint32(out, xxh32Of(block))
	})
	out = binary.LittleEndian.AppendUint32(out, 0)
	return binary.LittleEndian.AppendUint32(out, xxh32Of(data))
}

// apple is data in Apple's framing, in blocks of the given size.
func apple(data []byte, size int) []byte {
	var out []byte
	e := newLZ4Encoder(data)
	e.loose = true
	e.blocks(size, func(raw, block []byte, stored bool) {
		if stored {
			out = binary.LittleEndian.AppendUint32(append(out, appleStored...), uint32(len(raw)))
		} else {
			out = binary.LittleEndian.AppendUint32(append(out, appleBlock...), uint32(len(raw)))
			out = binary.LittleEndian.AppendUint32(out, uint32(len(block)))
		}
		out = append(out, block...)
	})
	return append(out, appleEnd...)
}
