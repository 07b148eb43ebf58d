package crashfs

import (
	"fmt"
	"hash/maphash"
	"maps"
	"math/rand/v2"
	"slices"
)

const rootNode = 1

type kind int

const (
	opMkdir kind = iota
	opCreate
	opSymlink
	opLink
	opUnlink
	opRmdir
	opRename
	opWrite
	opTruncate
	opSync
	opMark
)

// op is one thing done to the file system. Which members count depends on the kind.
type op struct {
	kind     kind
	folder   uint64 // whose name changes
	name     string
	node     uint64 // what is named, written or synced: a folder can be synced too
	toFolder uint64 // of a rename
	toName   string // of a symlink: where it leads
	off      int64
	data     []byte
	size     int64
	mark     string
}

// names reports whether o changes a name.
func (o op) names() bool { return o.kind <= opRename }

// folders are those whose order of changes o is part of. That a folder goes comes after all that was done in it.
func (o op) folders() []uint64 {
	switch o.kind {
	case opRename:
		return []uint64{o.folder, o.toFolder}
	case opRmdir:
		return []uint64{o.folder, o.node}
	}
	return []uint64{o.folder}
}

// Log is what was done to a file system, in order. A cut is a number of operations: the power fails when that many were done.
type Log []op

// Syncs are the cuts right after each fsync.
func (l Log) Syncs() []int { return l.after(opSync) }

// Marked are the cuts right after each mark.
func (l Log) Marked() []int { return l.after(opMark) }

func (l Log) after(k kind) []int {
	var cuts []int
	for i, o := range l {
		if o.kind == k {
			cuts = append(cuts, i+1)
		}
	}
	return cuts
}

// Marks are those set before the cut, in order.
func (l Log) Marks(cut int) []string {
	var marks []string
	for _, o := range l[:cut] {
		if o.kind == opMark {
			marks = append(marks, o.mark)
		}
	}
	return marks
}

// State is what a disk holds: folders by their nodes, each with names and what they name, the bytes of the files, and
// where symlinks lead.
type State struct {
	folders  map[uint64]map[string]uint64
	files    map[uint64][]byte
	symlinks map[uint64]string
}

// Least is the state in which nothing is there that was not made safe before the cut.
func (l Log) Least(cut int) *State {
	return l.build(cut, l.safe(cut), func(_ uint64, safe, _ []byte) []byte { return safe })
}

// Most is the state in which everything is there that was done before the cut.
func (l Log) Most(cut int) *State {
	return l.build(cut, func(int) bool { return true }, func(_ uint64, _, all []byte) []byte { return all })
}

// Some is a state in which some of what was done and not made safe is there.
func (l Log) Some(cut int, r *rand.Rand) *State {
	return l.build(cut, l.lucky(cut, r), func(_ uint64, safe, all []byte) []byte { return torn(safe, all, r) })
}

// build replays the names for which there is true, and gives each file the bytes that content decides on.
func (l Log) build(cut int, there func(int) bool, content func(node uint64, safe, all []byte) []byte) *State {
	s := &State{folders: map[uint64]map[string]uint64{rootNode: {}}, files: map[uint64][]byte{}, symlinks: map[uint64]string{}}
	for i, o := range l[:cut] {
		if o.names() && there(i) {
			s.rename(o)
		}
	}
	safe, all := l.contents(cut)
	for _, node := range slices.Sorted(maps.Keys(s.named())) { // in order: a seed means one state
		s.files[node] = content(node, safe[node], all[node])
	}
	return s
}

func (s *State) rename(o op) {
	names := s.folders[o.folder]
	if names == nil { // the folder itself is not there
		names = map[string]uint64{}
		s.folders[o.folder] = names
	}
	switch o.kind {
	case opMkdir:
		names[o.name] = o.node
		if s.folders[o.node] == nil {
			s.folders[o.node] = map[string]uint64{}
		}
	case opSymlink:
		names[o.name], s.symlinks[o.node] = o.node, o.toName
	case opCreate, opLink:
		names[o.name] = o.node
	case opUnlink, opRmdir:
		delete(names, o.name)
	case opRename:
		delete(names, o.name)
		if s.folders[o.toFolder] == nil {
			s.folders[o.toFolder] = map[string]uint64{}
		}
		s.folders[o.toFolder][o.toName] = o.node
	}
}

// named are the files that have a name in some folder.
func (s *State) named() map[uint64]bool {
	files := map[uint64]bool{}
	for _, names := range s.folders {
		for _, node := range names {
			_, isFolder := s.folders[node]
			if _, isSymlink := s.symlinks[node]; !isFolder && !isSymlink {
				files[node] = true
			}
		}
	}
	return files
}

// safe tells which changes of names are safe at the cut.
func (l Log) safe(cut int) func(int) bool {
	done := map[int]bool{}
	for i, o := range l[:cut] {
		if o.kind != opSync {
			continue
		}
		for j, p := range l[:i] {
			if p.names() && slices.Contains(p.folders(), o.node) {
				l.need(j, done)
			}
		}
	}
	return func(i int) bool { return done[i] }
}

// lucky tells which are there if some of the others were too: all up to a moment, or what a few of them need.
func (l Log) lucky(cut int, r *rand.Rand) func(int) bool {
	safe := l.safe(cut)
	if r.IntN(2) == 0 {
		until := r.IntN(cut + 1)
		return func(i int) bool { return i < until || safe(i) }
	}
	done := map[int]bool{}
	for range 1 + r.IntN(4) {
		if i := r.IntN(max(cut, 1)); i < cut && l[i].names() {
			l.need(i, done)
		}
	}
	return func(i int) bool { return done[i] || safe(i) }
}

// need adds a change of a name and all those that come before it in its folders.
func (l Log) need(i int, done map[int]bool) {
	if done[i] {
		return
	}
	done[i] = true
	for j := i - 1; j >= 0; j-- {
		if l[j].names() && !done[j] && slices.ContainsFunc(l[j].folders(), func(f uint64) bool {
			return slices.Contains(l[i].folders(), f)
		}) {
			l.need(j, done)
		}
	}
}

// contents are the bytes of each file as its last fsync made them safe, and as they were written.
func (l Log) contents(cut int) (safe, all map[uint64][]byte) {
	safe, all = map[uint64][]byte{}, map[uint64][]byte{}
	synced := map[uint64]int{}
	for i, o := range l[:cut] {
		if o.kind == opSync {
			synced[o.node] = i
		}
	}
	for i, o := range l[:cut] {
		switch o.kind {
		case opWrite:
			all[o.node] = written(all[o.node], o.data, o.off)
		case opTruncate:
			all[o.node] = resized(all[o.node], o.size)
		case opSync:
			if synced[o.node] == i {
				safe[o.node] = slices.Clone(all[o.node])
			}
		}
	}
	return safe, all
}

const sector = 512

// torn is a file of which some was written back since it was safe.
func torn(safe, all []byte, r *rand.Rand) []byte {
	switch r.IntN(4) {
	case 0:
		return safe
	case 1:
		return all
	}
	size := len(all)
	switch low, high := min(len(safe), len(all)), max(len(safe), len(all)); r.IntN(3) {
	case 0:
		size = len(safe)
	case 1:
		size = low + r.IntN(high-low+1)
	}
	mixed := make([]byte, size)
	copy(mixed, safe)
	// Write-back goes by runs of sectors: often long ones, now and then a single one.
	for off := 0; off < size; {
		run := sector << r.IntN(12)
		end := min(off+run-off%sector, size)
		if r.IntN(2) == 0 {
			n := 0
			if off < len(all) {
				n = copy(mixed[off:end], all[off:])
			}
			clear(mixed[off+n : end])
		}
		off = end
	}
	return mixed
}

var seed = maphash.MakeSeed()

// Sum is equal for equal states, within this process.
func (s *State) Sum() uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	first := map[uint64]string{}
	s.sum(&h, rootNode, "", first)
	return h.Sum64()
}

func (s *State) sum(h *maphash.Hash, folder uint64, path string, first map[uint64]string) {
	names := s.folders[folder]
	for _, name := range slices.Sorted(maps.Keys(names)) {
		node, at := names[name], path+"/"+name
		maphash.WriteComparable(h, at)
		if _, isFolder := s.folders[node]; isFolder {
			s.sum(h, node, at, first)
		} else if target, ok := s.symlinks[node]; ok {
			maphash.WriteComparable(h, target)
		} else if link, ok := first[node]; ok {
			maphash.WriteComparable(h, link)
		} else {
			first[node] = at
			maphash.WriteComparable(h, len(s.files[node]))
			_, _ = h.Write(s.files[node]) // a hash does not fail
		}
	}
}

// At describes an operation.
func (l Log) At(i int) string {
	if i < 0 || i >= len(l) {
		return "nothing"
	}
	o := l[i]
	switch o.kind {
	case opWrite:
		return fmt.Sprintf("write %d bytes at %d to node %d", len(o.data), o.off, o.node)
	case opTruncate:
		return fmt.Sprintf("truncate node %d to %d", o.node, o.size)
	case opSync:
		return fmt.Sprintf("fsync node %d", o.node)
	case opMark:
		return "answer: " + o.mark
	case opRename:
		return fmt.Sprintf("rename %s to %s", o.name, o.toName)
	}
	return fmt.Sprintf("%s %s", [...]string{"mkdir", "create", "symlink", "link", "unlink", "rmdir"}[o.kind], o.name)
}
