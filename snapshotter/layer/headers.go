package layer

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"time"
)

// metaLimit is how large an extended header or a long name may be to be read
// here; archive/tar reads those above, up to its own limit of 1 MiB.
const metaLimit = 64 << 10

// headers reads the headers of a tar, member by member. What nearly all members
// of images are (ustar, PAX and GNU headers of files, directories, links and
// devices, numbers in octal) it parses itself, by archive/tar's rules and at a
// fraction of its cost. Whatever is out of the ordinary, or wrong, is put back
// and given to archive/tar, which so has the last word on every refusal.
type headers struct {
	tape *tape
	end  int64  // where the data of the member before ends
	zero bool   // the padding behind it is there and all zeros
	raw  []byte // all that was read of the current member's headers, part of buf
	buf  []byte

	hdr     tar.Header
	records map[string]string
	str     [blockSize]byte // room to put a name together

	longName, longLink string
	extended           string // a PAX header's records
	seen               byte   // which of these three there were
}

const (
	seenName = 1 << iota
	seenLink
	seenExtended
)

// next returns the header of the next member, good until the next call; the
// tape stands at its data then. io.EOF ends the archive.
func (h *headers) next() (*tar.Header, error) {
	if err := h.skip(); err != nil {
		return nil, err
	}
	h.longName, h.longLink, h.extended, h.seen = "", "", "", 0
	for {
		block := h.raw[len(h.raw)-blockSize:]
		size, ok := checkBlock(block)
		if !ok {
			return h.slow()
		}
		typ := block[156]
		if typ != 'x' && typ != 'L' && typ != 'K' {
			if !h.member(block, typ, size) {
				return h.slow()
			}
			return &h.hdr, nil
		}
		ok, err := h.meta(typ, size)
		if err != nil {
			return nil, err
		}
		if !ok {
			return h.slow()
		}
	}
}

// skip drops what is left of the member before and reads one block. Missing
// data is an error, missing padding the end of the archive.
func (h *headers) skip() error {
	h.raw, h.zero = h.buf[:0], false
	left := h.end - h.tape.pos
	if left < 0 {
		return fmt.Errorf("read %d bytes beyond the member's end: %w", -left, tar.ErrHeader)
	}
	last := min(left, 1)
	if left > 1 {
		if err := h.tape.skip(left - 1); err != nil {
			return err
		}
	}
	pad := -h.end & (blockSize - 1)
	want := int(last + pad + blockSize)
	n, err := h.read(want)
	switch {
	case err != nil:
		return err
	case n < int(last), n > int(last+pad) && n < want:
		return io.ErrUnexpectedEOF
	case n < want:
		return io.EOF
	}
	h.zero = isZero(h.raw[last : last+pad])
	h.raw = h.raw[want-blockSize:]
	return nil
}

// read appends n bytes to raw, or fewer where the source ends.
func (h *headers) read(n int) (got int, err error) {
	from := len(h.raw)
	if cap(h.raw) < from+n {
		h.buf = make([]byte, 2*(from+n))
		h.raw = append(h.buf[:0], h.raw...)
	}
	got, err = h.tape.full(h.raw[from : from+n])
	h.raw = h.raw[:from+got]
	return got, err
}

// slow has archive/tar read the member from its first header on.
func (h *headers) slow() (*tar.Header, error) {
	h.tape.back(h.raw)
	h.tape.expect(h.tape.pos)
	hdr, err := tar.NewReader(h.tape).Next()
	if err == nil && len(h.tape.pushed) > 0 {
		return nil, fmt.Errorf("%d bytes of headers were left: %w", len(h.tape.pushed), tar.ErrHeader)
	}
	return hdr, err
}

// meta reads what describes the member that follows, and that member's first block.
func (h *headers) meta(typ byte, size int64) (ok bool, err error) {
	if size > metaLimit {
		return false, nil
	}
	padded := int(size+blockSize-1) &^ (blockSize - 1)
	from := len(h.raw)
	n, err := h.read(padded + blockSize)
	if err != nil || n < padded+blockSize {
		return false, err
	}
	text := h.raw[from : from+int(size)]
	var kind byte
	switch typ {
	case 'x':
		kind, h.extended = seenExtended, string(text)
	case 'L':
		kind, h.longName = seenName, string(cString(text))
	case 'K':
		kind, h.longLink = seenLink, string(cString(text))
	}
	again := h.seen&kind != 0
	h.seen |= kind
	return !again, nil
}

// member fills in hdr; false leaves the member to archive/tar.
func (h *headers) member(b []byte, typ byte, size int64) bool {
	switch typ {
	case tar.TypeReg, 0, tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeDir, tar.TypeFifo:
	default:
		return false
	}
	mode, ok1 := parseOctal(b[100:108])
	uid, ok2 := parseOctal(b[108:116])
	gid, ok3 := parseOctal(b[116:124])
	mtime, ok4 := parseOctal(b[136:148])
	major, ok5 := parseOctal(b[329:337])
	minor, ok6 := parseOctal(b[337:345])
	if ok := ok1 && ok2 && ok3 && ok4 && ok5 && ok6; !ok {
		return false
	}
	h.hdr = tar.Header{
		Typeflag: typ, Size: size, Mode: mode, Uid: int(uid), Gid: int(gid), ModTime: time.Unix(mtime, 0),
		Devmajor: major, Devminor: minor,
	}
	if link := cString(b[157:257]); len(link) > 0 {
		h.hdr.Linkname = string(link)
	}
	if h.seen&seenExtended != 0 && !h.extend() {
		return false
	}
	switch {
	case h.longName != "":
		h.hdr.Name = h.longName
	case h.hdr.Name == "":
		h.hdr.Name = h.name(b)
	}
	if h.longLink != "" {
		h.hdr.Linkname = h.longLink
	}
	if typ == 0 {
		h.hdr.Typeflag = tar.TypeReg
		if strings.HasSuffix(h.hdr.Name, "/") {
			h.hdr.Typeflag = tar.TypeDir
		}
	}
	return true
}

// name puts together the two name fields of ustar; checkBlock has seen to it that
// GNU's headers have nothing in the place of the second.
func (h *headers) name(b []byte) string {
	name := cString(b[:100])
	if b[345] != 0 {
		whole := append(h.str[:0], cString(b[345:500])...)
		return string(append(append(whole, '/'), name...))
	}
	return string(name)
}

// extend applies the records of the PAX header, and keeps those of extended
// attributes.
func (h *headers) extend() bool {
	clear(h.records)
	for rest := h.extended; rest != ""; {
		key, value, after, ok := cutRecord(rest)
		if !ok {
			return false
		}
		rest = after
		if !h.record(key, value) {
			return false
		}
	}
	if len(h.records) > 0 {
		h.hdr.PAXRecords = h.records
	}
	return true
}

// record refuses what archive/tar would. Of several of one key the last counts.
func (h *headers) record(key, value string) (ok bool) {
	if strings.IndexByte(key, 0) >= 0 || strings.HasPrefix(key, "GNU.sparse.") {
		return false
	}
	if strings.HasPrefix(key, xattrRecord) {
		if h.records == nil {
			h.records = make(map[string]string)
		}
		h.records[key] = value
		return true
	}
	switch key {
	case "path", "linkpath", "uname", "gname":
		if strings.IndexByte(value, 0) >= 0 {
			return false
		}
	}
	if value == "" {
		return !hasField(key) // an earlier one of the same key would count in vain
	}
	var n int64
	ok = true
	switch key {
	case "path":
		h.hdr.Name = value
	case "linkpath":
		h.hdr.Linkname = value
	case "size":
		h.hdr.Size, ok = parseDecimal(value)
	case "uid":
		n, ok = parseDecimal(value)
		h.hdr.Uid = int(n)
	case "gid":
		n, ok = parseDecimal(value)
		h.hdr.Gid = int(n)
	case "mtime":
		h.hdr.ModTime, ok = parseTime(value)
	case "atime", "ctime":
		_, ok = parseTime(value)
	}
	return ok
}

// hasField says whether a record of this key replaces a field of the header.
func hasField(key string) bool {
	switch key {
	case "path", "linkpath", "size", "uid", "gid", "mtime", "atime", "ctime":
		return true
	}
	return false
}

// cutRecord takes the first record ("length key=value\n") off a PAX header.
func cutRecord(s string) (key, value, rest string, ok bool) {
	n, at := 0, 0
	for at < len(s) && s[at]-'0' < 10 && at < 6 {
		n = 10*n + int(s[at]-'0')
		at++
	}
	if at == 0 || n > len(s) || n < at+3 || s[at] != ' ' || s[n-1] != '\n' || n < 5 {
		return "", "", "", false
	}
	key, value, ok = strings.Cut(s[at+1:n-1], "=")
	return key, value, s[n:], ok && key != ""
}

// checkBlock says whether a header block is of a format and in a form that is
// parsed here, and returns its size field.
func checkBlock(b []byte) (size int64, ok bool) {
	sum, ok := parseOctal(b[148:156])
	if !ok || sum != checksum(b) {
		return 0, false
	}
	switch {
	case string(b[257:263]) == "ustar\x00":
		if string(b[508:512]) == "tar\x00" {
			return 0, false // star's format
		}
	case string(b[257:265]) == "ustar  \x00":
		if b[345] != 0 || b[357] != 0 {
			return 0, false // times, or an old archive/tar's idea of a name
		}
	default:
		return 0, false
	}
	if b[156] == 'x' || b[156] == 'L' || b[156] == 'K' {
		for _, f := range [...][2]int{{100, 108}, {108, 116}, {116, 124}, {136, 148}, {329, 337}, {337, 345}} {
			if _, ok := parseOctal(b[f[0]:f[1]]); !ok {
				return 0, false
			}
		}
	}
	return parseOctal(b[124:136])
}

// checksum is the sum of a block's bytes, those of the checksum itself taken
// for spaces.
func checksum(b []byte) int64 {
	const low = 0x00ff00ff00ff00ff
	var sum uint64 // four sums of 16 bits each: 128 bytes of at most 255
	for i := 0; i < blockSize; i += 8 {
		v := binary.LittleEndian.Uint64(b[i:])
		switch i {
		case 144:
			v = v&0xffffffff | 0x20202020<<32
		case 152:
			v = v&^0xffffffff | 0x20202020
		}
		sum += v&low + v>>8&low
	}
	return int64(sum&0xffff + sum>>16&0xffff + sum>>32&0xffff + sum>>48)
}

// parseOctal reads digits between any spaces and zero bytes. What else may
// stand in a field, archive/tar knows.
func parseOctal(field []byte) (v int64, ok bool) {
	i := 0
	for i < len(field) && (field[i] == ' ' || field[i] == 0) {
		i++
	}
	for ; i < len(field) && field[i]-'0' < 8; i++ {
		v = v<<3 | int64(field[i]-'0')
	}
	for ; i < len(field); i++ {
		if field[i] != ' ' && field[i] != 0 {
			return 0, false
		}
	}
	return v, true
}

// parseDecimal reads what needs neither a sign nor care about overflow.
func parseDecimal(s string) (v int64, ok bool) {
	if s == "" || len(s) > 18 {
		return 0, false
	}
	for i := range len(s) {
		d := s[i] - '0'
		if d > 9 {
			return 0, false
		}
		v = 10*v + int64(d)
	}
	return v, true
}

// parseTime reads seconds since 1970 with or without a fraction, of which nine
// digits count.
func parseTime(s string) (time.Time, bool) {
	whole, fraction, _ := strings.Cut(s, ".")
	sec, ok := parseDecimal(whole)
	if !ok || fraction == "" {
		return time.Unix(sec, 0), ok
	}
	nsec := int64(0)
	for i := range len(fraction) {
		d := fraction[i] - '0'
		if d > 9 {
			return time.Time{}, false
		}
		if i < 9 {
			nsec = 10*nsec + int64(d)
		}
	}
	for range 9 - len(fraction) {
		nsec *= 10
	}
	return time.Unix(sec, nsec), true
}

// cString is the text before the first zero byte.
func cString(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}
