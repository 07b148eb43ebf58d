package corpus

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// blockSize is that of tar.
const blockSize = 512

// Member is one member of a tar, written as it is told, without archive/tar's opinions.
type Member struct {
	Type       byte // as in the header: '0' a file, '1' a hard link, '2' a symlink, ...
	Name, Link string
	Mode       int64
	UID, GID   int64 // in base 256 where octal has no room
	MTime      int64
	Major      int64
	Minor      int64
	PAX        map[string]string // records of an extended header before it
	Records    string            // likewise, written out, where order and repetition matter
	Data       string
	Size       int64 // of the header, where it is not len(Data)
	Base256    bool  // all numbers are in base 256
	PAXNames   bool  // long names are PAX records, not GNU's extra members
}

// Tar writes the members and the end of the archive.
func Tar(members ...Member) []byte { return end(Open(members...)) }

// Open writes the members without the end of the archive.
func Open(members ...Member) []byte {
	var w bytes.Buffer
	for _, m := range members {
		m.write(&w)
	}
	return w.Bytes()
}

func end(tar []byte) []byte { return append(tar, make([]byte, 2*blockSize)...) }

func (m Member) write(w *bytes.Buffer) {
	records := maps.Clone(m.PAX)
	if records == nil {
		records = map[string]string{}
	}
	m.Name = m.long(w, records, 'L', "path", m.Name)
	m.Link = m.long(w, records, 'K', "linkpath", m.Link)
	text := m.Records
	for _, k := range slices.Sorted(maps.Keys(records)) {
		text += Record(k, records[k])
	}
	if text != "" {
		Member{Type: 'x', Name: "PaxHeaders/x", Mode: 0o644}.block(w, int64(len(text)))
		padded(w, text)
	}
	size := int64(len(m.Data))
	if m.Size != 0 {
		size = m.Size
	}
	m.block(w, size)
	padded(w, m.Data)
}

// long writes what a header has no room for ahead of it, or among the records, and returns what goes into the header.
func (m Member) long(w *bytes.Buffer, records map[string]string, typ byte, key, value string) string {
	if len(value) <= 100 {
		return value
	}
	if m.PAXNames {
		records[key] = value
	} else {
		Member{Type: typ, Name: "././@LongLink"}.block(w, int64(len(value))+1)
		padded(w, value+"\x00")
	}
	return value[:100]
}

func (m Member) block(w *bytes.Buffer, size int64) {
	var b [blockSize]byte
	number := func(field []byte, v int64) { number(field, v, m.Base256) }
	copy(b[0:100], m.Name)
	number(b[100:108], m.Mode)
	number(b[108:116], m.UID)
	number(b[116:124], m.GID)
	number(b[124:136], size)
	number(b[136:148], m.MTime)
	b[156] = m.Type
	copy(b[157:257], m.Link)
	copy(b[257:], "ustar  \x00")
	number(b[329:337], m.Major)
	number(b[337:345], m.Minor)
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	w.Write(b[:])
}

// number writes octal where it fits, else GNU's base 256.
func number(field []byte, v int64, base256 bool) {
	s := fmt.Sprintf("%0*o", len(field)-1, v)
	if !base256 && v >= 0 && len(s) < len(field) {
		copy(field, s)
		return
	}
	for i := len(field) - 1; i >= 0; i-- {
		field[i] = byte(v)
		v >>= 8
	}
	field[0] |= 0x80
}

func padded(w *bytes.Buffer, s string) {
	w.WriteString(s)
	w.Write(make([]byte, -len(s)&(blockSize-1)))
}

// Record is one record of a PAX header: its own length in decimal, key and value.
func Record(k, v string) string {
	n := len(k) + len(v) + 3
	for {
		s := strconv.Itoa(n) + " " + k + "=" + v + "\n"
		if len(s) == n {
			return s
		}
		n = len(s)
	}
}

func dir(name string, mode int64) Member {
	return Member{Type: '5', Name: strings.TrimSuffix(name, "/") + "/", Mode: mode, MTime: 1000}
}

func file(name, data string) Member {
	return Member{Type: '0', Name: name, Mode: 0o644, MTime: 2000, Data: data}
}

func symlink(name, to string) Member {
	return Member{Type: '2', Name: name, Mode: 0o777, MTime: 3000, Link: to}
}

func hardlink(name, to string) Member {
	return Member{Type: '1', Name: name, Mode: 0o644, MTime: 2000, Link: to}
}

func device(typ byte, name string, major, minor int64) Member {
	return Member{Type: typ, Name: name, Mode: 0o640, MTime: 4000, Major: major, Minor: minor}
}

// with changes a member.
func with(m Member, change func(*Member)) Member {
	change(&m)
	return m
}

func owned(m Member, uid, gid int64) Member {
	m.UID, m.GID = uid, gid
	return m
}

func mode(m Member, mode int64) Member {
	m.Mode = mode
	return m
}

// pax adds records to a member's extended header.
func pax(m Member, kv ...string) Member {
	m.PAX = maps.Clone(m.PAX)
	if m.PAX == nil {
		m.PAX = map[string]string{}
	}
	for i := 0; i < len(kv); i += 2 {
		m.PAX[kv[i]] = kv[i+1]
	}
	return m
}

// xattr gives a member extended attributes.
func xattr(m Member, kv ...string) Member {
	for i := 0; i < len(kv); i += 2 {
		m = pax(m, "SCHILY.xattr."+kv[i], kv[i+1])
	}
	return m
}
