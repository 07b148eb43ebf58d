package corpus

import (
	"strconv"
	"strings"
)

// sparse are members in GNU tar's PAX formats; see "Storing Sparse Files" in its manual.
func sparse() []Case {
	after := file("after", "after")
	return []Case{
		{"sparse-0.0", layers([]Member{sparse00("s", 3000, 5, strings.Repeat("a", 10), 1000, strings.Repeat("b", 600)), after})},
		{"sparse-0.1", layers([]Member{sparse01("s", "5,10,1000,600", "2", "3000", strings.Repeat("c", 610)), sparse01("hole", "", "0", "100000", ""), sparse01("end", "99999,1", "1", "100000", "e"), after})},
		{"sparse-1.0", layers([]Member{
			sparse10("s", "3\n0\n512\n1024\n600\n5000\n1\n", "8000", strings.Repeat("d", 512+600+1)), sparse10("hole", "0\n", "8000", ""), sparse10("empty", "0\n", "0", ""),
			sparse10("aligned", "2\n0\n4096\n1048576\n4096\n", "2097152", strings.Repeat("e", 8192)), sparse10("huge", "1\n67108863\n1\n", "67108864", "z"), after,
		})},
		{"zeros", layers([]Member{file("zeros", strings.Repeat("\x00", 1<<20)), file("ends", "head"+strings.Repeat("\x00", 300<<10)+"tail"), file("one-page", strings.Repeat("\x00", 4096)), after})},
		{"size-base256", layers([]Member{with(file("f", "data"), func(m *Member) { m.Base256 = true }), after})},
	}
}

// sparse00 repeats records, which a map has no way to say.
func sparse00(name string, size int64, off1 int64, data1 string, off2 int64, data2 string) Member {
	m := file(name, data1+data2)
	m.Records = Record("GNU.sparse.size", decimal(size)) + Record("GNU.sparse.numblocks", "2") +
		Record("GNU.sparse.offset", decimal(off1)) + Record("GNU.sparse.numbytes", decimal(int64(len(data1)))) +
		Record("GNU.sparse.offset", decimal(off2)) + Record("GNU.sparse.numbytes", decimal(int64(len(data2))))
	return m
}

func sparse01(name, extents, blocks, size, data string) Member {
	return pax(file("GNUSparseFile.0/"+name, data), "GNU.sparse.major", "0", "GNU.sparse.minor", "1", "GNU.sparse.map", extents,
		"GNU.sparse.numblocks", blocks, "GNU.sparse.size", size, "GNU.sparse.name", name)
}

// sparse10 has its map in front of the data, padded to a block.
func sparse10(name, extents, size, data string) Member {
	return pax(file("GNUSparseFile.0/"+name, extents+strings.Repeat("\x00", -len(extents)&(blockSize-1))+data),
		"GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.realsize", size, "GNU.sparse.name", name)
}

func decimal(n int64) string { return strconv.FormatInt(n, 10) }
