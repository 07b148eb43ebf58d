package deflate

// lengthOrder is the order in which a dynamic header gives the lengths of its code length codes (RFC 1951, 3.2.7).
var lengthOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// preTable decodes code lengths: 7 bits lead to symbol<<4 | length.
type preTable [128]uint8

// build fails unless the code is complete, as zlib demands of this one.
func (p *preTable) build(lens *[19]uint8) error {
	var count [8]uint8
	for _, l := range lens {
		count[l&7]++
	}
	var next [9]uint
	count[0] = 0
	for l := 1; l < 8; l++ {
		next[l+1] = next[l] + uint(count[l])<<(7-l)
	}
	if next[8] > 128 {
		return errOversubscribed
	}
	if next[8] < 128 {
		return errIncomplete
	}
	for sym, l := range lens {
		if l == 0 {
			continue
		}
		// next counts codes as if all had 7 bits; reversed, those of one symbol are 1<<l apart.
		rev := uint(reverse7[next[l&7]&127])
		next[l&7] += 1 << (7 - l)
		for i := rev; i < 128; i += 1 << l {
			p[i] = uint8(sym)<<3 | l
		}
	}
	return nil
}

var reverse7 = func() (r [128]uint8) {
	for i := range r {
		for b := range 7 {
			r[i] |= uint8(i>>b&1) << (6 - b)
		}
	}
	return r
}()

// dynamicHeader reads the codes of a block of type 2 and builds its tables. If the input ends within, r.over says so and
// nothing else counts.
func (f *inflater) dynamicHeader(r *bitReader) error {
	nlit, ndist, err := readLengths(r, &f.lens)
	if err != nil || r.over() {
		return err
	}
	if err := f.own.buildLit(f.lens[:nlit]); err != nil {
		return err
	}
	return f.own.buildDist(f.lens[nlit : nlit+ndist])
}

// readLengths reads the code lengths of a dynamic block: nlit of them for literals and lengths, then ndist for distances.
func readLengths(r *bitReader, lens *[320]uint8) (nlit, ndist int, err error) {
	nlit, ndist = int(r.take(5))+257, int(r.take(5))+1
	npre := int(r.take(4)) + 4
	if nlit > maxLit || ndist > maxDist {
		return 0, 0, errTooMany
	}
	var pre [19]uint8
	for _, sym := range lengthOrder[:npre] {
		pre[sym] = uint8(r.take(3))
	}
	var table preTable
	if err := table.build(&pre); err != nil {
		return 0, 0, err
	}
	used := 0 // of the literal code's space: most of what is no header takes too much of it soon
	for i := 0; i < nlit+ndist; {
		if r.over() {
			return 0, 0, nil
		}
		if used > 1<<maxCode && i <= nlit {
			return 0, 0, errOversubscribed
		}
		word := peek(r.in, r.at)
		e := table[word&127]
		r.at += int64(e & 7)
		word >>= e & 7
		sym := e >> 3
		if sym < 16 {
			lens[i] = sym
			used += spaces[sym]
			i++
			continue
		}
		value, n, width := uint8(0), 0, int64(0)
		switch sym {
		case 16:
			if i == 0 {
				return 0, 0, errRepeat
			}
			value, n, width = lens[i-1], 3+int(word&3), 2
		case 17:
			n, width = 3+int(word&7), 3
		default:
			n, width = 11+int(word&127), 7
		}
		r.at += width
		if i+n > nlit+ndist {
			return 0, 0, errRepeat
		}
		used += n * spaces[value&15]
		for range n {
			lens[i] = value
			i++
		}
	}
	if lens[endBlock] == 0 {
		return 0, 0, errNoEnd
	}
	return nlit, ndist, nil
}

// spaces is what a code of each length takes of all 1<<maxCode.
var spaces = func() (s [maxCode + 1]int) {
	for l := 1; l <= maxCode; l++ {
		s[l] = 1 << maxCode >> l
	}
	return s
}()

// checkHeader says whether a valid header of a dynamic block stands at the given bit of in, wholly within it, final or not:
// codes as zlib demands them, and one for the end of the block. A random bit costs about 3 ns: most fail at the filters.
func checkHeader(in []byte, bit int64) bool {
	word := peek(in, bit)
	if word>>1&3 != 2 || word>>3&31 > maxLit-257 || word>>8&31 > maxDist-1 {
		return false
	}
	npre := word>>13&15 + 4
	if pre := peek(in, bit+17) & (1<<(3*npre) - 1); preSum(pre) != 128 {
		return false
	}
	return checkLengths(in, bit)
}

// checkLengths is checkHeader behind its filters.
func checkLengths(in []byte, bit int64) bool {
	r := bitReader{in: in, at: bit + 3}
	var lens [320]uint8
	nlit, ndist, err := readLengths(&r, &lens)
	if err != nil || r.over() {
		return false
	}
	return kraft(lens[:nlit]) && kraft(lens[nlit:nlit+ndist])
}

// preSum is the Kraft sum of up to 19 code lengths of three bits, in units of 1/128: 128 if the code is complete.
func preSum(pre uint64) uint {
	return uint(preSums[pre&0xfff]) + uint(preSums[pre>>12&0xfff]) + uint(preSums[pre>>24&0xfff]) +
		uint(preSums[pre>>36&0xfff]) + uint(preSums[pre>>48&0xfff])
}

// preSums has the sums of four lengths.
var preSums = func() (sums [4096]uint16) {
	for i := range sums {
		for rest := i; rest > 0; rest >>= 3 {
			if l := rest & 7; l > 0 {
				sums[i] += 128 >> l
			}
		}
	}
	return sums
}()

// kraft is code.init's verdict without its work.
func kraft(lens []uint8) bool {
	sum, longest := 0, uint8(0)
	for _, l := range lens {
		if l != 0 {
			sum += 1 << maxCode >> l
			longest = max(longest, l)
		}
	}
	return sum == 1<<maxCode || sum < 1<<maxCode && longest <= 1
}
