package layer

import (
	"bytes"
	"maps"
	"testing"

	"github.com/gantryd/gantry/integration/corpus"
)

// member is a corpus.Member in short.
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

// rawTar is a tar written without archive/tar's opinions.
type rawTar struct{ bytes.Buffer }

func (w *rawTar) add(m member) {
	w.Write(corpus.Open(corpus.Member{
		Type: m.typ, Name: m.name, Link: m.link, Mode: m.mode, UID: m.uid, GID: m.gid, MTime: m.mtime, Major: m.major, Minor: m.minor,
		PAX: m.pax, Data: m.data, Size: m.size,
	}))
}

// block adds a header alone.
func (w *rawTar) block(m member, size int64) {
	m.data, m.size = "", size
	w.add(m)
}

func (w *rawTar) padded(s string) {
	w.WriteString(s)
	w.Write(make([]byte, -len(s)&511))
}

func (w *rawTar) end() []byte {
	w.Write(make([]byte, 1024))
	return w.Bytes()
}

func paxRecord(k, v string) string { return corpus.Record(k, v) }

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
