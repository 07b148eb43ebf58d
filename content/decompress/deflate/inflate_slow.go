package deflate

// symbol is one literal/length symbol, or two that share an entry, with the distance.
type symbol struct {
	bits   int64 // taken from the input
	lits   [2]byte
	count  int // literals
	length int // of the match behind them, 0 if there is none
	dist   int
	end    bool // the block ends
}

// next decodes what stands at f.at with every check, and does not move. ok is false if the input ends within.
func (f *inflater) next() (s symbol, ok bool, err error) {
	have := int64(len(f.in))*8 - f.at
	word := peek(f.in, f.at)
	t := f.t
	e := t.lit[word&(1<<litBits-1)]
	s.bits = int64(e & 255)
	if e&(litSpecial|kindMask) == litSpecial|kindSub {
		e = t.lit[1<<litBits+e>>16&0xfff+uint32(word>>litBits)&(1<<(e>>28)-1)]
		s.bits += int64(e & 255)
	}
	s.count = int(e & litCount >> 8)
	s.lits = [2]byte{byte(e >> 16), byte(e >> 24)}
	if s.count > 0 && (s.bits > have || e&litMatch != 0) {
		// What stands behind the first literal may not be there yet.
		s.bits, s.count = int64(t.lens[s.lits[0]]), 1
		return s, s.bits <= have, nil
	}
	if s.bits > have {
		return s, false, nil
	}
	switch {
	case e&litMatch != 0:
		s.length = int(e>>24) + 3
	case e&litSpecial == 0:
		return s, true, nil
	case e&kindMask == kindEnd:
		s.end = true
		return s, true, nil
	case e&kindMask == kindExtra:
		s.length = int(e>>16&0xfff) + int(word>>s.bits&(1<<(e>>28)-1))
		s.bits += int64(e >> 28)
	default:
		return s, false, errSymbol
	}
	err = s.distance(t, word)
	if err != nil && s.bits <= have {
		return s, false, err
	}
	return s, s.bits <= have, nil
}

// distance adds what stands behind a length. At most 20 bits are taken, 28 follow, and word has 57.
func (s *symbol) distance(t *tables, word uint64) error {
	d := t.dist[word>>s.bits&(1<<distBits-1)]
	if d&distSub != 0 {
		s.bits += distBits
		d = t.dist[1<<distBits+d>>16&0xfff+uint32(word>>s.bits)&(1<<(d>>8&15)-1)]
	}
	s.bits += int64(d & 255)
	if d&distInvalid != 0 {
		return errDistance
	}
	extra := 63 - d>>8&63
	s.dist = int(d>>16) + int(word>>(s.bits-int64(extra))&(1<<extra-1))
	return nil
}

// packLarge packs the tables of a block that goes on behind its first freshInput bytes.
func (f *inflater) packLarge(done bool) {
	f.fresh = false
	if !done && f.t == &f.own && f.own.joins() {
		f.own.pack()
	}
}

// symbols decodes symbols to out until the block is done, or input or output end.
func (f *inflater) symbols(out []byte, n int) (newN int, done bool, err error) {
	if f.fresh {
		n, done, err = f.fastBytes(out, n, freshInput)
		f.packLarge(done)
	}
	if !done && err == nil {
		n, done, err = f.fastBytes(out, n, len(f.in))
	}
	if done || err != nil {
		return n, done, err
	}
	for len(out)-n >= outMargin {
		s, ok, err := f.next()
		if !ok {
			return n, false, err
		}
		if s.dist > n+s.count {
			return n, false, errTooFar
		}
		f.at += s.bits
		n += copy(out[n:], s.lits[:s.count])
		for range s.length {
			out[n] = out[n-s.dist]
			n++
		}
		if s.end {
			return n, true, nil
		}
	}
	return n, false, nil
}

// symbolsMarked is symbols for decodeMarked.
func (f *inflater) symbolsMarked(out []uint16, n int) (newN int, done bool, err error) {
	if f.fresh {
		n, done, err = f.fastMarked(out, n, freshInput)
		f.packLarge(done)
	}
	if !done && err == nil {
		n, done, err = f.fastMarked(out, n, len(f.in))
	}
	if done || err != nil {
		return n, done, err
	}
	for len(out)-n >= outMargin {
		s, ok, err := f.next()
		if !ok {
			return n, false, err
		}
		f.at += s.bits
		for _, b := range s.lits[:s.count] {
			out[n] = uint16(b)
			n++
		}
		n = markedCopy(out, n, s.dist, s.length)
		if s.end {
			return n, true, nil
		}
	}
	return n, false, nil
}

// markedCopy copies a match that begins in the unknown window.
func markedCopy(out []uint16, n, dist, length int) int {
	for range length {
		if dist > n {
			out[n] = marker | uint16(windowSize+n-dist)
		} else {
			out[n] = out[n-dist]
		}
		n++
	}
	return n
}
