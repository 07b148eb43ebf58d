package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/gantryd/gantry/integration/short"
)

// line is all that is taken from a header.
func line(hdr *tar.Header, at int64) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q at %d type=%q size=%d mode=%o owner=%d:%d mtime=%d.%09d dev=%d:%d link=%q", hdr.Name, at, hdr.Typeflag, hdr.Size, hdr.Mode,
		hdr.Uid, hdr.Gid, hdr.ModTime.Unix(), hdr.ModTime.Nanosecond(), hdr.Devmajor, hdr.Devminor, hdr.Linkname)
	for _, k := range slices.Sorted(maps.Keys(hdr.PAXRecords)) {
		if strings.HasPrefix(k, xattrRecord) || strings.HasPrefix(k, "GNU.sparse.") {
			fmt.Fprintf(&b, " %s=%q", k, hdr.PAXRecords[k])
		}
	}
	return b.String()
}

// byArchiveTar lists a tar as archive/tar alone reads it.
func byArchiveTar(data []byte) (lines []string, err error) {
	r := bytes.NewReader(data)
	tr := tar.NewReader(onlyReader{r}) // it would step over data without noticing the end
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return lines, nil
		}
		if err != nil {
			return lines, err
		}
		lines = append(lines, line(hdr, int64(len(data)-r.Len())))
	}
}

// byHeaders lists it as the scan does; partial says that it was given up for a
// reason that is not the header's.
func byHeaders(src source) (lines []string, partial bool, err error) {
	s := &scanner{tape: &tape{src: src}, build: newBuilder(0)}
	s.headers.tape = s.tape
	for {
		hdr, err := s.headers.next()
		if errors.Is(err, io.EOF) {
			return lines, false, nil
		}
		if err != nil {
			return lines, false, err
		}
		lines = append(lines, line(hdr, s.tape.pos))
		_, end, err := s.data(hdr)
		if err != nil || end < 0 {
			return lines, true, nil //nolint:nilerr // the comparison ends here
		}
		s.headers.end = end
		s.tape.expect(end)
	}
}

// compareHeaders wants the same members, then the same verdict, from a file and
// from streams that come in pieces. It returns how many members there were.
func compareHeaders(t testing.TB, data []byte) int {
	t.Helper()
	want, wantErr := byArchiveTar(data)
	for name, src := range map[string]source{
		"file":   newFileSource(bytes.NewReader(data)),
		"stream": readerSource{bytes.NewBuffer(data)},
		"halves": readerSource{iotest.HalfReader(bytes.NewBuffer(data))},
	} {
		got, partial, err := byHeaders(src)
		if partial {
			if len(got) > len(want) || !slices.Equal(got, want[:len(got)]) {
				t.Fatalf("%s: members up to one that the scan refuses:\n%s\narchive/tar:\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			continue
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%s:\n%s\narchive/tar:\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("%s: %v; archive/tar: %v", name, err, wantErr)
		}
	}
	return len(want)
}

// headerCases are tars whose headers say things in every way there is.
func headerCases() map[string][]byte {
	set := func(m member, field int, text string) []byte {
		tar := makeTar(m, file("next", "x"))
		copy(tar[field:], text)
		fixChecksums(tar)
		return tar
	}
	f := file("f", "data")
	cases := map[string][]byte{
		"base 256 size":      set(f, 124, "\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x04"),
		"base 256 negative":  set(f, 124, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
		"base 256 huge":      set(f, 124, "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff"),
		"base 256 overflow":  set(f, 124, "\x80\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
		"base 256 uid":       set(f, 108, "\x80\x00\x00\x00\xff\xff\xff\xff"),
		"base 256 time":      set(f, 136, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00"),
		"octal with spaces":  set(f, 124, "         4 \x00"),
		"octal after zeros":  set(f, 124, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x004 "),
		"octal in the midst": set(f, 124, "\x00 4\x00   \x00\x00\x00\x00"),
		"octal and junk":     set(f, 124, "4\x00junk......"),
		"octal twice":        set(f, 124, "4 4 \x00\x00\x00\x00\x00\x00\x00\x00"),
		"not octal":          set(f, 124, "00000000008\x00"),
		"full octal":         set(f, 124, "000000000004"),
		"empty fields":       set(f, 100, strings.Repeat("\x00", 48)),
		"mode not octal":     set(f, 100, "rw-r--r-"),
		"device not octal":   set(f, 329, "x"),
		"name of 100":        makeTar(file(longName(100), "x"), file("next", "x")),
		"link of 100":        makeTar(symlink("l", longName(100)), file("next", "x")),
		"no magic":           set(f, 257, "\x00\x00\x00\x00\x00\x00\x00\x00"),
		"odd magic":          set(f, 257, "ustar \x00\x00"),
		"ustar prefix":       set(f, 257, "ustar\x0000"+strings.Repeat("\x00", 80)+"some/prefix"),
		"ustar long prefix":  set(f, 257, "ustar\x0000"+strings.Repeat("\x00", 80)+longName(155)),
		"ustar no version":   set(f, 257, "ustar\x00xx"),
		"star":               set(f, 257, "ustar\x0000"+strings.Repeat("\x00", 80)+"p"+strings.Repeat("\x00", 162)+"tar\x00"),
		"gnu times":          set(f, 345, "00000001750\x0000000001751\x00"),
		"gnu old prefix":     set(f, 345, "some/prefix"),
		"pax twice":          raw(paxMember("path", "one"), paxMember("path", "two"), f),
		"pax empty":          makeTar(pax(f, "path", "", "size", "", "uid", "", "mtime", ""), f),
		"pax path, none":     raw(paxText(paxRecord("path", "a")+paxRecord("path", "")), f),
		"pax many digits":    makeTar(pax(f, "uid", "99999999999999999999999999"), f),
		"pax first is bad":   raw(paxText("junk"), paxMember("path", "x"), f),
		"pax path":           makeTar(pax(f, "path", "other/name", "linkpath", "nowhere"), f),
		"pax path, long":     raw(paxMember("path", "by-pax"), member{typ: 'L', name: "l", data: "by-L\x00"}, f),
		"pax size":           raw(paxMember("size", "4"), member{typ: '0', name: "f", data: "data"}, f),
		"pax size more":      raw(paxMember("size", "512"), member{typ: '0', name: "f", data: "data"}, f),
		"pax size negative":  raw(paxMember("size", "-4"), f),
		"pax size on dir":    raw(paxMember("size", "5000"), dir("d"), f),
		"pax ids":            makeTar(pax(f, "uid", "1099511627776", "gid", "+7"), f),
		"pax bad id":         makeTar(pax(f, "uid", "x"), f),
		"pax times":          makeTar(pax(f, "mtime", "1.5", "atime", "2", "ctime", "3.1234567890123"), f),
		"pax odd times":      makeTar(pax(f, "mtime", ".5"), f),
		"pax time of a dot":  makeTar(pax(f, "mtime", "7."), f),
		"pax bad atime":      makeTar(pax(f, "atime", "1.x"), f),
		"pax negative time":  makeTar(pax(f, "mtime", "-0.25"), f),
		"pax name with nul":  makeTar(pax(f, "path", "a\x00b"), f),
		"pax key with nul":   makeTar(pax(f, "a\x00b", "x"), f),
		"pax xattrs":         makeTar(xattr(f, "user.a", "1", "user.b", "", "user.c", "x\x00y=z\n"), f),
		"pax records":        raw(paxText("11 path=abc\n12 path=abcd\n"), f),
		"pax bad length":     raw(paxText("12 path=abc\n"), f),
		"pax zeros before":   raw(paxText("0000000012 path=abc\n000012 path=a\n"), f),
		"pax no newline":     raw(paxText("11 path=abcd"), f),
		"pax no equals":      raw(paxText("9 pathab\n"), f),
		"pax no key":         raw(paxText("8 =abcd\n"), f),
		"pax junk":           raw(paxText("junk"), f),
		"pax alone":          raw(paxMember("path", "x")),
		"pax of no bytes":    raw(paxText(""), f),
		"pax large":          makeTar(xattr(f, "user.a", strings.Repeat("v", 60<<10)), f),
		"pax over the limit": makeTar(xattr(f, "user.a", strings.Repeat("v", metaLimit)), f),
		"pax over 1 MiB":     makeTar(xattr(f, "user.a", strings.Repeat("v", 1<<20)), f),
		"long twice":         raw(member{typ: 'L', name: "l", data: "one\x00"}, member{typ: 'L', name: "l", data: "two\x00"}, f),
		"long empty":         raw(member{typ: 'L', name: "l", data: "\x00"}, member{typ: 'K', name: "l", data: ""}, f),
		"long without nul":   raw(member{typ: 'L', name: "l", data: "no-nul"}, f),
		"long both":          raw(member{typ: 'K', name: "l", data: "link\x00"}, member{typ: 'L', name: "l", data: "name\x00rest"}, symlink("l", "x"), f),
		"long over 1 MiB":    raw(member{typ: 'L', name: "l", data: longName(1<<20 + 1)}, f),
		"old slash":          raw(member{typ: 0, name: "d/", data: "dir"}, member{typ: 0, name: "l", data: "x"}, f),
		"old slash by long":  raw(member{typ: 'L', name: "l", data: "long/\x00"}, member{typ: 0, name: "d"}, f),
		"slash":              makeTar(file("f/", "data"), f),
		"global between":     raw(paxMember("path", "lost"), member{typ: 'g', name: "g", data: paxRecord("path", "x")}, f),
		"old sparse":         oldSparse("10\n"),
		"meta is short":      makeTar(xattr(f, "user.a", longName(3000)))[:1200],
		"meta bad number":    badMeta(),
	}
	maps.Copy(cases, bothCases())
	return cases
}

func raw(members ...member) []byte {
	var w rawTar
	for _, m := range members {
		w.block(m, int64(len(m.data)))
		w.padded(m.data)
	}
	return w.end()
}

func paxMember(k, v string) member  { return paxText(paxRecord(k, v)) }
func paxText(records string) member { return member{typ: 'x', name: "x", data: records} }

// oldSparse is GNU's first sparse format, refused when unpacked, but a header
// like another.
func oldSparse(data string) []byte {
	tar := makeTar(member{typ: 'S', name: "s", data: data}, file("next", "x"))
	copy(tar[386:], "00000000010\x0000000000003\x00")
	copy(tar[483:], "00000000100\x00")
	fixChecksums(tar)
	return tar
}

// badMeta has a header before a header with a number that is none.
func badMeta() []byte {
	tar := makeTar(xattr(file("f", ""), "user.a", "b"))
	copy(tar[100:], "notoctal")
	fixChecksums(tar)
	return tar
}

// fixChecksums makes every block that has the magic of a tar header a valid one.
func fixChecksums(tar []byte) {
	for ; len(tar) >= 512; tar = tar[512:] {
		if string(tar[257:262]) != "ustar" && tar[0] == 0 {
			continue
		}
		copy(tar[148:], "        ")
		sum := 0
		for _, c := range tar[:512] {
			sum += int(c)
		}
		copy(tar[148:], fmt.Sprintf("%06o\x00 ", sum))
	}
}

func TestHeadersEqualArchiveTar(t *testing.T) {
	t.Parallel()
	for name, tar := range headerCases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			compareHeaders(t, tar)
		})
	}
}

// mutated changes a tar in a few places that matter, and most times puts its
// checksums right again.
func mutated(r *rand.Rand, tar []byte) []byte {
	tar = slices.Clone(tar)
	for range 1 + r.IntN(4) {
		if len(tar) < 512 {
			break
		}
		block := tar[512*r.IntN(len(tar)/512):]
		field := [...]int{0, 99, 100, 107, 108, 116, 124, 125, 135, 136, 147, 156, 157, 256, 257, 262, 263, 329, 337, 345, 357, 508}[r.IntN(22)]
		switch r.IntN(6) {
		case 0:
			block[field] = byte(r.Uint32())
		case 1:
			block[field] = " \x00017\x80\xffxLKgSZ5"[r.IntN(14)]
		case 2:
			block[156] = "\x000123456xLKgS7V"[r.IntN(14)]
		case 3:
			block[r.IntN(512)] = "0123456789=\n ax\x00"[r.IntN(16)]
		case 4:
			copy(block[257:], [...]string{"ustar\x0000", "ustar  \x00", "\x00\x00\x00\x00\x00"}[r.IntN(3)])
		case 5:
			at := 512 * r.IntN(len(tar)/512)
			tar = append(tar[:at:at], tar[min(len(tar), at+512*r.IntN(3)):]...)
		}
	}
	if r.IntN(8) > 0 {
		fixChecksums(tar)
	}
	if r.IntN(16) == 0 {
		tar = tar[:r.IntN(len(tar)+1)]
	}
	return tar
}

func TestMutatedHeadersEqualArchiveTar(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(7, 8))
	cases := headerCases()
	names := slices.Sorted(maps.Keys(cases))
	names = slices.DeleteFunc(names, func(n string) bool { return len(cases[n]) > 1<<15 })
	members, tars := 0, short.Size(40_000, 4000)
	for range tars {
		name := names[r.IntN(len(names))]
		tar := mutated(r, cases[name])
		members += compareHeaders(t, tar)
		if t.Failed() {
			t.Fatalf("of %s", name)
		}
	}
	if members < tars/2 {
		t.Errorf("only %d members were compared", members)
	}
	t.Logf("%d members", members)
}

// TestHeadersAreReadHere: the members of usual tars are not left to archive/tar.
func TestHeadersAreReadHere(t *testing.T) {
	t.Parallel()
	tars := map[string][]byte{
		"gnu": makeTar(dir("d/"), file("d/f", longName(700)), symlink("d/l", "f"), hardlink("d/h", "d/f"), file(longName(150), "x"), symlink("k", longName(150)),
			member{typ: '3', name: "c", major: 1, minor: 3}, member{typ: '6', name: "p"}, xattr(file("x", ""), "user.a", "b")),
		"ustar and pax": byWriter(t),
	}
	for name, data := range tars {
		s := &scanner{tape: &tape{src: newFileSource(bytes.NewReader(data))}, build: newBuilder(0)}
		s.headers.tape = s.tape
		for {
			hdr, err := s.headers.next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if hdr != &s.headers.hdr {
				t.Errorf("%s: %q was left to archive/tar", name, hdr.Name)
			}
			_, end, err := s.data(hdr)
			if err != nil {
				t.Fatal(err)
			}
			s.headers.end = end
			s.tape.expect(end)
		}
	}
}

// byWriter is a tar as archive/tar and all that use it write them.
func byWriter(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, hdr := range []*tar.Header{
		{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755},
		{Typeflag: tar.TypeReg, Name: "d/" + longName(99) + "/x", Mode: 0o644},
		{Typeflag: tar.TypeReg, Name: "d/" + longName(200) + "/x", Mode: 0o644, Uid: 1 << 22, Gid: 1 << 30},
		{Typeflag: tar.TypeReg, Name: "caf\xc3\xa9", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}},
		{Typeflag: tar.TypeSymlink, Name: "l", Linkname: longName(200)},
		{Typeflag: tar.TypeLink, Name: "h", Linkname: "d/x"},
	} {
		if err := w.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func FuzzHeaders(f *testing.F) {
	for _, tar := range headerCases() {
		if len(tar) < 1<<14 {
			f.Add(tar, true)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, fix bool) {
		if fix {
			fixChecksums(data)
		}
		compareHeaders(t, data)
	})
}

// TestPaddingIsSeen: the scan tells the index writer which files it need not
// look behind.
func TestPaddingIsSeen(t *testing.T) {
	t.Parallel()
	tar := makeTar(file("clean", "x"), file("junk", "x"), file("whole", longName(512)), file("last", "x"))
	tar[2*512-1+2*512] = '!' // behind the data of junk
	cut := tar[:7*512+1]     // the padding of last is not there
	for name, want := range map[string]bool{"clean": true, "junk": false, "whole": true, "last": false} {
		if got := findSorted(scanBytes(t, cut).root, name).Padded; got != want {
			t.Errorf("%s is padded: %v, want %v", name, got, want)
		}
	}
}
