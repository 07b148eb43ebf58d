package layer

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/short"
	"github.com/gantryd/gantry/snapshotter/erofs"
)

// choices turns bytes into a tar: names from a small alphabet, so that members
// meet each other often.
type choices struct {
	data []byte
	// A default ACL that an implied directory takes from a parent layer does not
	// reach what the layer has in it: the one known difference of Index.
	noDefaultACL bool
}

func (c *choices) more() bool { return len(c.data) > 0 }

func (c *choices) pick(n int) int {
	if len(c.data) == 0 {
		return 0
	}
	v := int(c.data[0]) % n
	c.data = c.data[1:]
	return v
}

// No absolute target may exist on the host: containerd looks there.
var nameParts = []string{"a", "b", "c", "d", "a", "b", "..", ".", "gantry-x", "gantry-y"}

func (c *choices) name() string {
	var b strings.Builder
	if c.pick(8) == 7 {
		b.WriteString("/")
	}
	for i := range 1 + c.pick(4) {
		if i > 0 {
			b.WriteString("/")
		}
		b.WriteString(nameParts[c.pick(len(nameParts))])
	}
	if c.pick(8) == 7 {
		b.WriteString("/")
	}
	return b.String()
}

func (c *choices) target() string {
	s := c.name()
	if strings.HasPrefix(s, "/") {
		s = "/gantry-x" + s
	}
	return s
}

var aclOfChoice = []string{
	acl(aclEntry{1, 6, 0}, aclEntry{4, 5, 0}, aclEntry{0x20, 0, 0}),
	acl(aclEntry{1, 7, 0}, aclEntry{2, 7, 1000}, aclEntry{4, 5, 0}, aclEntry{0x10, 3, 0}, aclEntry{0x20, 1, 0}),
	acl(aclEntry{1, 5, 0}, aclEntry{4, 6, 0}, aclEntry{8, 7, 7}, aclEntry{0x10, 6, 0}, aclEntry{0x20, 4, 0}),
}

func (c *choices) member() member {
	m := member{mode: int64(c.pick(8))<<9 | int64(c.pick(256))<<1, uid: int64(c.pick(4)), gid: int64(c.pick(4)), mtime: int64(c.pick(100)) * 1e6}
	m.name = c.name()
	switch c.pick(16) {
	case 0, 1, 2:
		m.typ = '0'
		m.data = strings.Repeat("x", c.pick(7)*c.pick(200))
	case 3, 4, 5, 6:
		m.typ = '5'
	case 7, 8:
		m.typ, m.link = '2', c.target()
	case 9, 10:
		m.typ, m.link = '1', c.name()
	case 11:
		m.typ, m.major, m.minor = "346"[c.pick(3)], int64(c.pick(5)), int64(c.pick(5))
	case 12:
		m.typ, m.name = '0', m.name+"/.wh."+nameParts[c.pick(6)]
	case 13:
		m.typ, m.name = '0', m.name+"/.wh..wh..opq"
	case 14:
		m.typ, m.name = '0', ".wh."+m.name
	case 15:
		m = c.sparse(m)
	}
	switch c.pick(12) {
	case 0:
		m = xattr(m, "user.k", fmt.Sprint(c.pick(3)), "trusted.t", "1")
	case 1:
		m = xattr(m, "security.capability", capability(2, 20))
	case 2:
		m = xattr(m, aclAccess, aclOfChoice[c.pick(3)])
	case 3:
		if value := aclOfChoice[c.pick(3)]; !c.noDefaultACL {
			m = xattr(m, aclDefault, value)
		}
	case 4:
		m = pax(m, "mtime", fmt.Sprintf("%d.%09d", c.pick(100)-20, c.pick(200)*1001))
	case 5:
		m = pax(m, "gid", "-1", "uid", "4294967295")
	}
	return m
}

func (c *choices) sparse(m member) member {
	m.typ = '0'
	var list []string
	off, total := 0, 0
	for range c.pick(5) {
		off += c.pick(200) * 7
		n := c.pick(100) * 9
		list = append(list, fmt.Sprint(off), fmt.Sprint(n))
		off, total = off+n, total+n
	}
	m.data = strings.Repeat("s", total)
	size := fmt.Sprint(off + c.pick(50))
	if c.pick(2) == 0 {
		return pax(m, "GNU.sparse.major", "0", "GNU.sparse.minor", "1", "GNU.sparse.map", strings.Join(list, ","), "GNU.sparse.numblocks", fmt.Sprint(len(list)/2), "GNU.sparse.size", size)
	}
	text := strings.Join(append([]string{fmt.Sprint(len(list) / 2)}, list...), "\n") + "\n"
	m.data = text + strings.Repeat("\x00", -len(text)&511) + m.data
	return pax(m, "GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.realsize", size)
}

// makeTar makes a tar of at most 40 members; in one of 16 it is cut short.
func (c *choices) makeTar() []byte {
	cut, at := c.pick(16), c.pick(256)
	var w rawTar
	for n := 0; c.more() && n < 40; n++ {
		w.add(c.member())
	}
	tar := w.end()
	if cut == 15 {
		return tar[:len(tar)*at/256]
	}
	return tar
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// TestRandomTablesEqualContainerd makes tars from a fixed seed; most of them
// are refused somewhere, so that many short ones say more than few long ones.
func TestRandomTablesEqualContainerd(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	accepted, tars := 0, short.Size(1500, 300)
	for range tars { //nolint:paralleltest // they count together
		data := randomBytes(r, 20+r.IntN(120))
		t.Run("", func(t *testing.T) {
			if compare(t, (&choices{data: data}).makeTar()) != nil {
				accepted++
			}
		})
	}
	if accepted < tars/5 {
		t.Errorf("only %d of %d tars were accepted: the comparison says little", accepted, tars)
	}
	t.Logf("%d of %d accepted", accepted, tars)
}

func FuzzTableEqualsContainerd(f *testing.F) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		f.Add(randomBytes(r, 100))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		compare(t, (&choices{data: data}).makeTar())
	})
}

// FuzzScan feeds bytes that are no tar, or nearly one.
func FuzzScan(f *testing.F) {
	for _, tar := range bothCases() {
		if len(tar) < 1<<16 {
			f.Add(tar)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		table, err := Scan(t.Context(), bytes.NewReader(data))
		streamed, serr := Scan(t.Context(), bytes.NewBuffer(data))
		if (err == nil) != (serr == nil) {
			t.Fatalf("from a file: %v; from a stream: %v", err, serr)
		}
		if err != nil {
			return
		}
		if table.Len() != streamed.Len() || table.Len() > len(data)/512 {
			t.Fatalf("%d and %d entries in %d bytes", table.Len(), streamed.Len(), len(data))
		}
		checkTree(t, table, data)
		if _, err := table.Index([]Parent{table, streamed}); !errors.Is(err, table.OnlyLowest()) {
			t.Fatal(err)
		}
	})
}

func checkTree(t *testing.T, table *Table, tar []byte) {
	t.Helper()
	walkTree(table.root, "/", func(path string, n *erofs.Inode) {
		if n.Mode&unix.S_IFMT == unix.S_IFREG && n.Size < 1<<20 {
			contentOf(t, n, tar)
		}
		if n.MtimeNsec >= 1e9 || n.Mtime < 0 {
			t.Fatalf("%s: mtime %d.%d", path, n.Mtime, n.MtimeNsec)
		}
	})
	bottom, err := table.Index(nil)
	if err != nil {
		t.Fatal(err)
	}
	walkTree(bottom, "/", func(path string, n *erofs.Inode) {
		if isWhiteout(n) {
			t.Fatalf("%s: a whiteout in the bottom layer", path)
		}
	})
}
