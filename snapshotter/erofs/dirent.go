package erofs

// block returns the end of the block of a directory that begins with entry
// from, and the bytes it takes: an array of dirents, then the names.
func (d *directory) block(from int) (end, used int) {
	for end = from; end < d.count(); end++ {
		name, _ := d.at(end)
		more := direntSize + len(name)
		if used+more > BlockSize {
			break
		}
		used += more
	}
	return end, used
}

// measureDir sets size and tail of a directory. The size counts all blocks
// but the last as whole.
func (t *tree) measureDir(n *node) {
	d := &t.dirs[n.dir]
	for at := 0; ; {
		end, used := d.block(at)
		n.tail = int32(at)
		n.size += uint64(used)
		if at = end; at == d.count() {
			return
		}
		n.size += uint64(BlockSize - used)
	}
}

// writeDirBlock writes the entries from to end as one block without padding.
func (t *tree) writeDirBlock(s *sink, d *directory, from, end int) {
	off := (end - from) * direntSize
	for i := from; i < end; i++ {
		name, node := d.at(i)
		n := t.node(node)
		putDirent(s.next(direntSize), uint64(n.slot), uint16(off), fileType(n.in.Mode))
		off += len(name)
	}
	for i := from; i < end; i++ {
		name, _ := d.at(i)
		s.writeString(name)
	}
}

// writeDirBlocks writes the blocks of a directory that are in the data area.
func (t *tree) writeDirBlocks(s *sink, n *node) {
	d := &t.dirs[n.dir]
	last := d.count()
	if n.place == placeInline {
		last = int(n.tail)
	}
	for at := 0; at < last; {
		end, _ := d.block(at)
		t.writeDirBlock(s, d, at, end)
		s.align(BlockSize)
		at = end
	}
}
