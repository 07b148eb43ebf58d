package layer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

const (
	million = 1_000_000
	// millionRSS is what a process may take that scans, keeps and indexes them.
	millionRSS = 1 << 30
	millionEnv = "GANTRY_TEST_MILLION" // "scan" or "index": the test is its own child
)

// manyEntries is the stream of a tar with a million members as images have
// them: packages of 50 files, one directory of 100,000, long names, extended
// attributes on every fifth, a hard link on every twentieth. The bytes are made
// while they are read, so that no memory is spent on them.
type manyEntries struct {
	next int // member
	pend []byte
	out  []byte
	dir  string
	off  int64
}

// Read implements io.Reader.
func (m *manyEntries) Read(p []byte) (int, error) {
	for len(m.pend) == 0 {
		if m.next > million {
			return 0, io.EOF
		}
		m.out = m.out[:0]
		m.member()
		m.pend = m.out
		m.next++
	}
	n := copy(p, m.pend)
	m.pend = m.pend[n:]
	m.off += int64(n)
	return n, nil
}

func (m *manyEntries) member() {
	i := m.next
	switch {
	case i == million:
		m.out = append(m.out, make([]byte, 1024)...)
	case i < million/10:
		if i == 0 {
			m.dir = "var/lib/dpkg/info"
			m.header('5', m.dir+"/", "", 0)
			return
		}
		m.file(m.dir+"/libpackage-name"+strconv.Itoa(i)+":amd64.md5sums", i)
	case i%50 == 0:
		m.dir = "usr/lib/node_modules/package-" + strconv.Itoa(i/500) + "/node_modules/inner-" + strconv.Itoa(i/50)
		m.header('5', m.dir+"/", "", 0)
	case i%20 == 7:
		m.header('1', m.dir+"/linked-"+strconv.Itoa(i)+".js", m.dir+"/module-name-"+strconv.Itoa(i-1)+".js", 0)
	default:
		m.file(m.dir+"/module-name-"+strconv.Itoa(i)+".js", i)
	}
}

func (m *manyEntries) file(name string, i int) {
	if i%5 == 0 {
		record := paxRecord("SCHILY.xattr.security.selinux", "system_u:object_r:usr_t:s"+strconv.Itoa(i%7)) + paxRecord("SCHILY.xattr.user.origin", "registry")
		m.header('x', "PaxHeaders/x", "", len(record))
		m.padded(record)
	}
	if i%100 == 3 {
		name += strings.Repeat("-long", 20)
		m.header('L', "././@LongLink", "", len(name)+1)
		m.padded(name + "\x00")
		name = name[:100]
	}
	size := i % 3000 / 10
	m.header('0', name, "", size)
	m.out = append(m.out, bytes.Repeat([]byte{'x'}, size)...)
	m.out = append(m.out, make([]byte, -size&511)...)
}

func (m *manyEntries) padded(s string) {
	m.out = append(m.out, s...)
	m.out = append(m.out, make([]byte, -len(s)&511)...)
}

var headerTemplate = func() (b [512]byte) {
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[257:], "ustar  \x00root")
	copy(b[297:], "root")
	copy(b[148:], "        ")
	return b
}()

func (m *manyEntries) header(typ byte, name, link string, size int) {
	b := headerTemplate
	copy(b[:100], name)
	octal(b[124:135], size)
	octal(b[136:147], 1_700_000_000+m.next)
	b[156] = typ
	copy(b[157:257], link)
	sum := 0
	for i := 0; i < len(b); i += 8 {
		for w := binary.LittleEndian.Uint64(b[i:]); w != 0; w >>= 8 {
			sum += int(w & 0xff)
		}
	}
	octal(b[148:154], sum)
	b[154] = 0
	m.out = append(m.out, b[:]...)
}

func octal(field []byte, v int) {
	for i := len(field) - 1; i >= 0; i-- {
		field[i] = '0' + byte(v&7)
		v >>= 3
	}
}

// TestMillionEntries holds the memory of a process that makes the index of a
// million entries against the bound; what time it took on one core is printed.
//
//nolint:paralleltest // what it prints should be of use
func TestMillionEntries(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector's build takes several times the memory that is measured here; make test-unit runs this without it, too")
	}
	if os.Getenv(millionEnv) != "" {
		child(t)
		return
	}
	for _, step := range []string{"stream", "scan", "index"} {
		out, err := million1(t, step)
		if err != nil {
			t.Fatalf("%s: %v\n%s", step, err, out)
		}
		for line := range strings.Lines(out) {
			if rest, ok := strings.CutPrefix(line, "million: "); ok {
				t.Logf("%s: %s", step, strings.TrimSpace(rest))
				var rss int64
				if _, err := fmt.Sscanf(rest, "peak RSS %d", &rss); err == nil && rss > millionRSS {
					t.Errorf("%s: peak RSS of %d MiB, %d are allowed", step, rss>>20, int64(millionRSS)>>20)
				}
			}
		}
		if !strings.Contains(out, "million: peak RSS ") {
			t.Errorf("%s: the child told no peak:\n%s", step, out)
		}
	}
}

func million1(t *testing.T, step string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestMillionEntries$", "-test.v")
	cmd.Env = append(os.Environ(), millionEnv+"="+step, "GOMAXPROCS=1", "GOGC=100", "GOMEMLIMIT=off")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// child does in a process of its own what gantryd does with one layer.
func child(t *testing.T) {
	step := os.Getenv(millionEnv)
	start, used := time.Now(), cpu(t)
	lap := func(what string) {
		fmt.Printf("million: %s %.2f s of CPU, %.2f s\n", what, (cpu(t) - used).Seconds(), time.Since(start).Seconds())
		start, used = time.Now(), cpu(t)
	}
	stream := &manyEntries{}
	if step == "stream" {
		if _, err := io.Copy(io.Discard, stream); err != nil {
			t.Fatal(err)
		}
		lap("making the stream")
		peak(t)
		return
	}
	table, err := Scan(t.Context(), onlyReader{stream})
	if err != nil {
		t.Fatal(err)
	}
	lap("scan, making the stream included,")
	if table.Len() != million {
		t.Fatalf("%d entries, want %d", table.Len(), million)
	}
	if step == "index" {
		writeMillion(t, table, stream.off)
		lap("index")
	}
	peak(t)
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	fmt.Printf("million: heap in use at the end %d MiB, allocated in all %d MiB\n", m.HeapAlloc>>20, m.TotalAlloc>>20)
	if cost := uint64(table.cost()); cost > m.HeapAlloc*5/4 || cost < m.HeapAlloc*4/5 {
		t.Errorf("the table counts for %d MiB, the heap has %d", cost>>20, m.HeapAlloc>>20)
	}
	runtime.KeepAlive(table)
}

type onlyReader struct{ io.Reader }

func writeMillion(t *testing.T, table *Table, size int64) {
	root, err := table.Index(nil)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "index"))
	if err != nil {
		t.Fatal(err)
	}
	zero, err := os.Open("/dev/zero") // one system call a file, as a layer's padding
	if err != nil {
		t.Fatal(err)
	}
	err = erofs.Write(f, root, erofs.Device{ReaderAt: zero, Size: size})
	if err = errors.Join(err, zero.Close()); err != nil {
		t.Fatal(err)
	}
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("million: an index of %.1f MB\n", float64(fi.Size())/1e6)
	if err := errors.Join(erofs.Verify(f, fi.Size()), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// cpu is the time that this process has spent on all cores.
func cpu(t testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// peak prints the most memory this process ever held.
func peak(t *testing.T) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("million: peak RSS %d bytes, %d MiB\n", int64(kib)<<10, kib>>10)
}
