package layer

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// member is one tar member, written without archive/tar's opinions.
type member struct {
	typ      byte
	name     string
	link     string
	mode     int64
	uid, gid int64
	mtime    int64
	major    int64
	minor    int64
	pax      map[string]string
	data     string
	size     int64 // of the header, if not len(data)
}

type rawTar struct{ bytes.Buffer }

func (w *rawTar) add(m member) {
	if len(m.pax) > 0 {
		var records strings.Builder
		for _, k := range slices.Sorted(maps.Keys(m.pax)) {
			records.WriteString(paxRecord(k, m.pax[k]))
		}
		w.block(member{typ: 'x', name: "PaxHeaders/x", mode: 0o644}, int64(records.Len()))
		w.padded(records.String())
	}
	if len(m.name) > 100 {
		w.block(member{typ: 'L', name: "././@LongLink"}, int64(len(m.name))+1)
		w.padded(m.name + "\x00")
		m.name = m.name[:100]
	}
	if len(m.link) > 100 {
		w.block(member{typ: 'K', name: "././@LongLink"}, int64(len(m.link))+1)
		w.padded(m.link + "\x00")
		m.link = m.link[:100]
	}
	size := int64(len(m.data))
	if m.size != 0 {
		size = m.size
	}
	w.block(m, size)
	w.padded(m.data)
}

func (w *rawTar) end() []byte {
	w.Write(make([]byte, 1024))
	return w.Bytes()
}

func (w *rawTar) padded(s string) {
	w.WriteString(s)
	w.Write(make([]byte, -len(s)&511))
}

func (w *rawTar) block(m member, size int64) {
	var b [512]byte
	copy(b[0:100], m.name)
	number(b[100:108], m.mode)
	number(b[108:116], m.uid)
	number(b[116:124], m.gid)
	number(b[124:136], size)
	number(b[136:148], m.mtime)
	b[156] = m.typ
	copy(b[157:257], m.link)
	copy(b[257:], "ustar  \x00")
	number(b[329:337], m.major)
	number(b[337:345], m.minor)
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	w.Write(b[:])
}

// number writes octal where it fits, else GNU's base 256.
func number(field []byte, v int64) {
	s := fmt.Sprintf("%0*o", len(field)-1, v)
	if v >= 0 && len(s) < len(field) {
		copy(field, s)
		return
	}
	for i := len(field) - 1; i >= 0; i-- {
		field[i] = byte(v)
		v >>= 8
	}
	field[0] |= 0x80
}

func paxRecord(k, v string) string {
	n := len(k) + len(v) + 3
	for {
		s := strconv.Itoa(n) + " " + k + "=" + v + "\n"
		if len(s) == n {
			return s
		}
		n = len(s)
	}
}

func makeTar(members ...member) []byte {
	var w rawTar
	for _, m := range members {
		w.add(m)
	}
	return w.end()
}

func dir(name string) member { return member{typ: '5', name: name, mode: 0o755, mtime: 1000} }
func file(name, data string) member {
	return member{typ: '0', name: name, mode: 0o644, mtime: 2000, data: data}
}
func symlink(name, to string) member {
	return member{typ: '2', name: name, mode: 0o777, mtime: 3000, link: to}
}
func hardlink(name, to string) member {
	return member{typ: '1', name: name, mode: 0o600, mtime: 4000, link: to}
}

func xattr(m member, kv ...string) member {
	m.pax = maps.Clone(m.pax)
	if m.pax == nil {
		m.pax = map[string]string{}
	}
	for i := 0; i < len(kv); i += 2 {
		m.pax["SCHILY.xattr."+kv[i]] = kv[i+1]
	}
	return m
}

func pax(m member, kv ...string) member {
	m.pax = maps.Clone(m.pax)
	if m.pax == nil {
		m.pax = map[string]string{}
	}
	for i := 0; i < len(kv); i += 2 {
		m.pax[kv[i]] = kv[i+1]
	}
	return m
}

func scanBytes(t testing.TB, tar []byte) *Table {
	t.Helper()
	table, err := Scan(t.Context(), bytes.NewReader(tar))
	if err != nil {
		t.Fatalf("Scan: %v", err)
	}
	return table
}
