package corpus

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// Random is a stack of up to four hostile tars: members of a few names, so that they meet each other, of every type and
// in any order. Many are refused.
func Random(seed uint64) [][]byte {
	g := generator{rand.New(rand.NewPCG(seed, 0x636f72707573))}
	tars := make([][]byte, 1+g.IntN(4))
	for i := range tars {
		members := make([]Member, g.IntN(9))
		for j := range members {
			members[j] = g.member()
			if i == 0 {
				members[j] = lowest(members[j])
			}
		}
		tars[i] = Open(members...)
		if g.IntN(8) > 0 {
			tars[i] = end(tars[i])
		}
	}
	return tars
}

// lowest takes out of a member what differs on purpose in a lowest layer: see the images "opaque in the lowest layer" and
// "device 0/0 in a single layer".
func lowest(m Member) Member {
	if strings.HasSuffix(m.Name, ".wh..wh..opq") {
		m.Name += ".not"
	}
	if m.Type == '3' && m.Major == 0 {
		m.Minor++
	}
	return m
}

type generator struct{ *rand.Rand }

func (g generator) of(list ...string) string { return list[g.IntN(len(list))] }

// name is short mostly: long paths seldom meet.
func (g generator) name() string {
	parts := make([]string, 1+g.IntN(2)+g.IntN(2))
	for i := range parts {
		parts[i] = g.of("a", "b", "c", "a", "b", "c", "d\xff", "a", "b", "..", ".", "e")
	}
	return g.of("", "", "", "./", "/") + strings.Join(parts, "/") + g.of("", "", "", "/")
}

// target never leads to anything on the host: containerd looks there.
func (g generator) target() string {
	return g.of("", "", "", "../", "/gantry-nowhere/") + strings.TrimPrefix(g.name(), "/")
}

func (g generator) member() Member {
	m := Member{Type: '0', Name: g.name(), Mode: int64(g.IntN(0o10000)), UID: int64(g.IntN(4)), GID: int64(g.IntN(4)), MTime: int64(g.IntN(1 << 31))}
	switch g.IntN(20) {
	case 0, 1, 2, 3, 4:
		m.Data = strings.Repeat(g.of("x", "y", "\x00"), g.IntN(3)*g.IntN(3000))
	case 5, 6, 7, 8, 9:
		m.Type = '5'
	case 10, 11:
		m.Type, m.Link = '2', g.target()
	case 12, 13:
		m.Type, m.Link = '1', g.name()
	case 14:
		m.Type, m.Major, m.Minor = "346"[g.IntN(3)], int64(g.IntN(3)), int64(g.IntN(3))
	case 15, 16, 17:
		dir := strings.TrimRight(m.Name, "/.")
		at := strings.LastIndexByte(dir, '/') + 1
		m.Name = dir[:at] + ".wh." + dir[at:]
	case 18:
		m.Name += "/.wh..wh..opq"
	case 19:
		text := fmt.Sprintf("1\n%d\n%d\n", 100+g.IntN(5000), 10)
		m = pax(m, "GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.realsize", "8000")
		m.Data = text + strings.Repeat("\x00", -len(text)&(blockSize-1)) + "0123456789"
	}
	switch g.IntN(12) {
	case 0:
		m = xattr(m, "user.k", g.of("", "1", "2"), "trusted.overlay.opaque", "y")
	case 1:
		m = pax(m, "mtime", fmt.Sprintf("%d.%09d", g.IntN(1<<33)-1<<20, g.IntN(1e9)))
	case 2:
		m.UID, m.GID = g.Int64N(1<<32-1), g.Int64N(1<<32-1)
	case 3:
		m = xattr(m, "system.posix_acl_access", acl(1, 7, 0, 2, 5, 1000, 4, 5, 0, 0x10, g.IntN(8), 0, 0x20, 1, 0))
	}
	return m
}
