package erofs

// dirBlock returns how many of the entries go into the next block of a
// directory, and the bytes they take: an array of dirents, then the names.
func dirBlock(es []entry) (n, used int) {
	for _, e := range es {
		more := direntSize + len(e.name)
		if used+more > BlockSize {
			break
		}
		used += more
		n++
	}
	return n, used
}

// measureDir sets size and tail of a directory. The size counts all blocks
// but the last as whole.
func (t *tree) measureDir(n *node) {
	es := t.dirs[n.dir]
	for at := 0; ; {
		count, used := dirBlock(es[at:])
		n.tail = int32(at)
		n.size += uint64(used)
		if at += count; at == len(es) {
			return
		}
		n.size += uint64(BlockSize - used)
	}
}

// writeDirBlock writes the entries as one block without padding.
func (t *tree) writeDirBlock(s *sink, es []entry) {
	off := len(es) * direntSize
	for _, e := range es {
		n := t.node(e.node)
		putDirent(s.next(direntSize), uint64(n.slot), uint16(off), fileType(n.in.Mode))
		off += len(e.name)
	}
	for _, e := range es {
		s.writeString(e.name)
	}
}

// writeDirBlocks writes the blocks of a directory that are in the data area.
func (t *tree) writeDirBlocks(s *sink, n *node) {
	es := t.dirs[n.dir]
	if n.place == placeInline {
		es = es[:n.tail]
	}
	for len(es) > 0 {
		count, _ := dirBlock(es)
		t.writeDirBlock(s, es[:count])
		s.align(BlockSize)
		es = es[count:]
	}
}
