package harness

import (
	"archive/tar"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Sources writes a tree of source code as a package manager leaves it: many small files of about
// log-normal sizes in nested directories, which gzip makes about a quarter of. Together size bytes
// within a few permille, the same for the same seed.
func Sources(prefix string, seed uint64, size int64, files int) TarFunc {
	return func(w io.Writer) error {
		src := rand.New(rand.NewPCG(seed, 0x736f7572636573))
		pool, sizes := code(src, codePool), sourceSizes(src, size, files)
		tw := tar.NewWriter(w)
		made := map[string]bool{}
		for i, n := range sizes {
			// 12 files a directory, 16 directories a package.
			dir := path.Join(prefix, fmt.Sprintf("package%03d", i/192), fmt.Sprintf("module%02d", i/12%16))
			if err := sourceDirs(tw, made, dir); err != nil {
				return err
			}
			h := &tar.Header{Typeflag: tar.TypeReg, Name: path.Join(dir, fmt.Sprintf("file%02d.code", i%12)), Mode: 0o644, Size: n, ModTime: Epoch}
			if err := tw.WriteHeader(h); err != nil {
				return err
			}
			if err := cut(tw, src, pool, n); err != nil {
				return err
			}
		}
		return tw.Close()
	}
}

// sourceDirs writes the entries of dir and of the directories above it that have none yet.
func sourceDirs(tw *tar.Writer, made map[string]bool, dir string) error {
	if dir == "." || made[dir] {
		return nil
	}
	if err := sourceDirs(tw, made, path.Dir(dir)); err != nil {
		return err
	}
	made[dir] = true
	return tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: Epoch})
}

// sourceSizes returns the files' sizes: few large ones hold half of the bytes.
func sourceSizes(src *rand.Rand, size int64, files int) []int64 {
	weights, sum := make([]float64, files), 0.0
	for i := range weights {
		weights[i] = min(math.Exp(1.3*src.NormFloat64()), 50)
		sum += weights[i]
	}
	sizes := make([]int64, files)
	for i, w := range weights {
		sizes[i] = int64(w / sum * float64(size))
	}
	return sizes
}

// codePool is how much code is made for one layer: files are cut from it, so far apart that no
// gzip sees the same bytes twice.
const codePool = 32 << 20

func cut(w io.Writer, src *rand.Rand, pool []byte, n int64) error {
	for n > 0 {
		at := src.IntN(len(pool) - 64<<10)
		part := pool[at : at+int(min(n, 64<<10))]
		if _, err := w.Write(part); err != nil {
			return err
		}
		n -= int64(len(part))
	}
	return nil
}

// code makes n bytes of lines of names, numbers and signs. Names are as frequent as words are in any
// language (Zipf), more so within a page; half of the lines are earlier ones with a name changed. gzip makes
// a quarter of it, as it does of the sources of Go (24 %) and of Python's library (31 %).
func code(src *rand.Rand, n int) []byte {
	names := make([]string, 20_000)
	for i := range names {
		names[i] = name(src)
	}
	frequent := rand.NewZipf(src, 1.05, 8, uint64(len(names)-1))
	local := rand.NewZipf(src, 1.2, 4, pageNames-1)
	var recent [256][]string
	var page [pageNames]string
	out := make([]byte, 0, n+4096)
	for line := 0; len(out) < n; line++ {
		if line%400 == 0 {
			for i := range page {
				page[i] = names[frequent.Uint64()]
			}
		}
		words := slices.Clone(recent[src.IntN(len(recent))])
		if len(words) == 0 || src.IntN(2) == 0 {
			words = codeLine(src, func() string { return page[local.Uint64()] })
		} else {
			words[2*src.IntN(len(words)/2)] = page[local.Uint64()]
		}
		recent[line%len(recent)] = words
		for _, word := range words {
			out = append(out, word...)
		}
	}
	return out[:n]
}

// pageNames is how many names one page of code knows.
const pageNames = 120

// codeLine makes a line: names and signs in turns.
func codeLine(src *rand.Rand, next func() string) []string {
	words := []string{next(), codeSigns[src.IntN(len(codeSigns))]}
	for range src.IntN(7) {
		words = append(words, next(), codeSigns[src.IntN(len(codeSigns))])
	}
	if src.IntN(6) == 0 {
		words = append(words, strconv.Itoa(src.IntN(100_000)), ";")
	}
	return append(words, "", "\n"+strings.Repeat("    ", src.IntN(4)))
}

var codeSigns = []string{" ", ".", ".", "(", ") ", ", ", ", ", " = ", " = ", "[", "] ", ": ", " + ", "->", " == ", " {"}

// name makes an identifier of one to three syllable groups.
func name(src *rand.Rand) string {
	const consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
	var b strings.Builder
	for range 1 + src.IntN(4) {
		b.WriteByte(consonants[src.IntN(len(consonants))])
		b.WriteByte(vowels[src.IntN(len(vowels))])
		if src.IntN(3) == 0 {
			b.WriteByte(consonants[src.IntN(len(consonants))])
		}
	}
	return b.String()
}
