package deflate

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
)

// Header flags, RFC 1952, section 2.3.1.
const (
	flagHCRC     = 1 << 1
	flagExtra    = 1 << 2
	flagName     = 1 << 3
	flagComment  = 1 << 4
	flagReserved = 0xe0 // gzip(1) refuses them; the first once meant encryption
)

const (
	headerSize  = 10
	trailerSize = 8
)

var (
	errNotGzip   = fmt.Errorf("%w: no gzip header", ErrCorrupt)
	errMethod    = fmt.Errorf("%w: unknown compression method", ErrCorrupt)
	errFlags     = fmt.Errorf("%w: reserved header flags", ErrCorrupt)
	errHeaderSum = fmt.Errorf("%w: header checksum does not match", ErrCorrupt)
	errChecksum  = fmt.Errorf("%w: CRC-32 does not match", ErrCorrupt)
	errLength    = fmt.Errorf("%w: length does not match", ErrCorrupt)
	errTruncated = fmt.Errorf("%w: %w", ErrCorrupt, io.ErrUnexpectedEOF)
)

// trailer is what stands behind a member.
type trailer struct{ crc, size uint32 }

// check compares it with the member's bytes.
func (t trailer) check(s sum) error {
	switch {
	case s.crc != t.crc:
		return errChecksum
	case uint32(s.n) != t.size:
		return errLength
	}
	return nil
}

// member parses gzip headers and trailers of one chunk's input, byte by byte
// where they are cut by the edges of segments.
type member struct {
	feed
	pos int // in feed.in
}

// need makes n bytes visible from pos on; ok is false if the input ends before.
func (m *member) need(n int) (ok bool, err error) {
	for len(m.in)-m.pos < n {
		if m.eof {
			return false, m.err
		}
		if err := m.advance(); err != nil {
			return false, err
		}
	}
	return true, nil
}

func (m *member) advance() error {
	drop, err := m.more(m.pos)
	m.pos -= drop
	return err
}

// must is need for bytes that a whole stream has.
func (m *member) must(n int) error {
	ok, err := m.need(n)
	if err == nil && !ok {
		return errTruncated
	}
	return err
}

// another says whether a member stands at pos, as gzip(1) finds out: zeros, and
// two or more bytes that are no magic, are padding. padded says that there is some.
func (m *member) another() (yes, padded bool, err error) {
	ok, err := m.need(1)
	if err != nil || !ok {
		return false, false, err
	}
	if m.in[m.pos] == 0 {
		return false, true, nil
	}
	if err := m.must(2); err != nil {
		return false, false, err
	}
	yes = m.in[m.pos] == 0x1f && m.in[m.pos+1] == 0x8b
	return yes, !yes, nil
}

// header reads the header at pos.
func (m *member) header() error {
	if err := m.must(headerSize); err != nil {
		return err
	}
	h := m.in[m.pos : m.pos+headerSize]
	flags := h[3]
	switch {
	case h[0] != 0x1f || h[1] != 0x8b:
		return errNotGzip
	case h[2] != 8:
		return errMethod
	case flags&flagReserved != 0:
		return errFlags
	}
	var crc uint32
	if flags&flagHCRC != 0 {
		crc = crc32.ChecksumIEEE(h)
	}
	m.pos += headerSize
	if flags == 0 {
		return nil
	}
	return m.optional(flags, crc)
}

// optional reads what the flags announce. crc is that of the header before.
func (m *member) optional(flags byte, crc uint32) error {
	if flags&flagExtra != 0 {
		if err := m.must(2); err != nil {
			return err
		}
		n := int(binary.LittleEndian.Uint16(m.in[m.pos:]))
		if err := m.skip(2+n, &crc); err != nil {
			return err
		}
	}
	for _, flag := range [...]byte{flagName, flagComment} {
		if flags&flag == 0 {
			continue
		}
		if err := m.skipString(&crc); err != nil {
			return err
		}
	}
	if flags&flagHCRC == 0 {
		return nil
	}
	if err := m.must(2); err != nil {
		return err
	}
	if binary.LittleEndian.Uint16(m.in[m.pos:]) != uint16(crc) {
		return errHeaderSum
	}
	m.pos += 2
	return nil
}

// skip passes n bytes.
func (m *member) skip(n int, crc *uint32) error {
	for n > 0 {
		if err := m.must(1); err != nil {
			return err
		}
		c := min(n, len(m.in)-m.pos)
		*crc = crc32.Update(*crc, crc32.IEEETable, m.in[m.pos:m.pos+c])
		m.pos += c
		n -= c
	}
	return nil
}

// skipString passes bytes up to a zero.
func (m *member) skipString(crc *uint32) error {
	for {
		if err := m.must(1); err != nil {
			return err
		}
		b := m.in[m.pos]
		*crc = crc32.Update(*crc, crc32.IEEETable, m.in[m.pos:m.pos+1])
		m.pos++
		if b == 0 {
			return nil
		}
	}
}

func (m *member) trailer() (t trailer, err error) {
	if err := m.must(trailerSize); err != nil {
		return t, err
	}
	t.crc = binary.LittleEndian.Uint32(m.in[m.pos:])
	t.size = binary.LittleEndian.Uint32(m.in[m.pos+4:])
	m.pos += trailerSize
	return t, nil
}
