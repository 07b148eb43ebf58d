package deflate

import (
	"bufio"
	"bytes"
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

func runOurs(t testing.TB, gz []byte, buf []byte) (total int64, crc uint32) {
	f := new(inflater)
	f.reset(gz, int64(gzHeader(gz))*8)
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
			return
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
	buf := make([]byte, 1<<20)
	buf16 := make([]uint16, 1<<20)
	runtime.LockOSThread()
	var last string
	var k, o, m time.Duration
	for range 5 {
		t0 := cpu()
		zr, _ := gzip.NewReader(bufio.NewReaderSize(bytes.NewReader(gz), 1<<20))
		nk, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{zr}, make([]byte, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		t1 := cpu()
		no, crc := runOurs(t, gz, buf)
		t2 := cpu()
		if os.Getenv("M") != "" {
			runMarked(t, gz, buf16)
		}
		t3 := cpu()
		if no != nk || crc != uint32(gz[len(gz)-8])|uint32(gz[len(gz)-7])<<8|uint32(gz[len(gz)-6])<<16|uint32(gz[len(gz)-5])<<24 {
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
		if err := zr.Close(); err != nil {
			t.Fatal(err)
		}
		mb := float64(no) / 1e6
		last = fmt.Sprintf("klauspost %.0f  ours %.0f (%.2f)  marked %.0f (%.2f)", mb/k.Seconds(), mb/o.Seconds(), k.Seconds()/o.Seconds(), mb/m.Seconds(), o.Seconds()/m.Seconds())
	}
	t.Log(file, last)
}
