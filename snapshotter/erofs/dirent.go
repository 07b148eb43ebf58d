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
	at, end := n.first, n.first+n.count
	for {
		count, used := dirBlock(t.entries[at:end])
		n.tail = at
		n.size += uint64(used)
		if at += int32(count); at == end {
			return
		}
		n.size += uint64(BlockSize - used)
	}
}

// writeDirBlock writes the entries as one block without padding.
func (t *tree) writeDirBlock(s *sink, es []entry) {
	off := len(es) * direntSize
	for _, e := range es {
		n := &t.nodes[e.node]
		putDirent(s.next(direntSize), uint64(n.slot), uint16(off), fileType(n.in.Mode))
		off += len(e.name)
	}
	for _, e := range es {
		s.writeString(e.name)
	}
}

// writeDirBlocks writes the blocks of a directory that are in the data area.
func (t *tree) writeDirBlocks(s *sink, n *node) {
	end := n.first + n.count
	if n.place == placeInline {
		end = n.tail
	}
	for at := n.first; at < end; {
		count, _ := dirBlock(t.entries[at:end])
		t.writeDirBlock(s, t.entries[at:at+int32(count)])
		s.align(BlockSize)
		at += int32(count)
	}
}
