package deflate

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
)

func cpu() time.Duration {
	var r syscall.Rusage
	_ = syscall.Getrusage(1, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func gzHeader(b []byte) int {
	i := 10
	if b[3]&8 != 0 {
		for b[i] != 0 {
			i++
		}
		i++
	}
	return i
}

func runOurs(t testing.TB, gz []byte, buf []byte) (total int64) {
	f := new(inflater)
	for at := 0; at < len(gz); {
		n, crc := int64(0), uint32(0)
		n, crc, at = runMember(t, f, gz, at, buf)
		total += n
		if want := binary.LittleEndian.Uint32(gz[at:]); want != crc {
			t.Fatalf("%x %x", want, crc)
		}
		at += 8
	}
	return total
}

func runMember(t testing.TB, f *inflater, gz []byte, at int, buf []byte) (total int64, crc uint32, next int) {
	f.reset(gz, int64(at+gzHeader(gz[at:]))*8)
	f.extend(gz, 0, true)
	n, from := 0, 0
	for {
		var st status
		var err error
		n, st, err = f.decode(buf, n, -1)
		if err != nil {
			t.Fatal(err)
		}
		crc = crc32.Update(crc, crc32.IEEETable, buf[from:n])
		total += int64(n - from)
		if st == ended {
			return total, crc, int(f.bit()+7) / 8
		}
		copy(buf, buf[n-windowSize:n])
		n, from = windowSize, windowSize
	}
}

func runMarked(t testing.TB, gz []byte, buf []uint16) (total int64) {
	f := new(inflater)
	f.reset(gz, int64(gzHeader(gz))*8)
	f.extend(gz, 0, true)
	n, from := 0, 0
	for {
		var st status
		var err error
		n, _, st, err = f.decodeMarked(buf, n, -1)
		if err != nil {
			t.Fatal(err)
		}
		total += int64(n - from)
		if st == ended {
			return
		}
		copy(buf, buf[n-windowSize:n])
		n, from = windowSize, windowSize
	}
}

func TestSpeed(t *testing.T) {
	file := os.Getenv("F")
	gz, err := os.ReadFile(file)
	if err != nil {
		t.Skip()
	}
	buf := make([]byte, 512<<10)
	buf16 := make([]uint16, 512<<10)
	runtime.LockOSThread()
	var last string
	var k, o, m time.Duration
	for range 5 {
		t0 := cpu()
		var nk int64
		if os.Getenv("NOK") == "" {
			zr, _ := gzip.NewReader(bufio.NewReaderSize(bytes.NewReader(gz), 1<<20))
			nk, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{zr}, make([]byte, 1<<20))
			if err != nil {
				t.Fatal(err)
			}
			_ = zr.Close()
		}
		t1 := cpu()
		no := runOurs(t, gz, buf)
		t2 := cpu()
		if os.Getenv("M") != "" {
			runMarked(t, gz, buf16)
		}
		t3 := cpu()
		if nk != 0 && no != nk {
			t.Fatal("bad", nk, no)
		}
		if k == 0 || (t1-t0) < k {
			k = (t1 - t0)
		}
		if o == 0 || (t2-t1) < o {
			o = (t2 - t1)
		}
		if m == 0 || (t3-t2) < m {
			m = (t3 - t2)
		}
		mb := float64(no) / 1e6
		last = fmt.Sprintf("klauspost %.0f  ours %.0f (%.2f)  marked %.0f (%.2f)", mb/k.Seconds(), mb/o.Seconds(), k.Seconds()/o.Seconds(), mb/m.Seconds(), o.Seconds()/m.Seconds())
	}
	t.Log(file, last)
}
