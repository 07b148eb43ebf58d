package transfer

import (
	"crypto/sha256"
	"errors"
	"hash/crc32"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkStage prints what a byte costs in each thing that is done with it, one after the other and alone. The sizes
// are those that a fast connection has; 64KiB is what a slow one does.
func BenchmarkStage(b *testing.B) {
	const size = 256 << 20
	buf := make([]byte, hashStep)
	for name, bm := range map[string]struct {
		step    int64
		prepare func(f *os.File) error
		do      func(f *os.File, p []byte, off int64) error
	}{
		"crc32c": {bufferSize, nil, func(_ *os.File, p []byte, _ int64) error {
			crc32.Update(0, castagnoli, p)
			return nil
		}},
		"write-64KiB":  {recordStep, nil, writeAt},
		"write-256KiB": {bufferSize, nil, writeAt},
		"read-back":    {hashStep, fillFile, readAt},
		"sha256": {hashStep, nil, func(_ *os.File, p []byte, _ int64) error {
			sha256.Sum256(p)
			return nil
		}},
		"write-back": {size, fillFile, func(f *os.File, p []byte, _ int64) error {
			startWriteback(f, 0, size)
			return nil
		}},
		"fsync-of-all":        {size, fillFile, func(f *os.File, _ []byte, _ int64) error { return f.Sync() }},
		"fsync-after-writing": {size, writtenBack, func(f *os.File, _ []byte, _ int64) error { return f.Sync() }},
	} {
		b.Run(name, func(b *testing.B) {
			f, err := os.Create(filepath.Join(b.TempDir(), "f"))
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			b.SetBytes(size)
			for b.Loop() {
				b.StopTimer()
				err := errors.Join(f.Truncate(0), f.Truncate(size))
				if err == nil && bm.prepare != nil {
					err = bm.prepare(f)
				}
				b.StartTimer()
				for off := int64(0); off < size && err == nil; off += bm.step {
					err = bm.do(f, buf[:min(bm.step, int64(len(buf)))], off)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/size, "ns/B")
		})
	}
	b.Run("receive", func(b *testing.B) { benchmarkReceive(b, size) })
	b.Run("records", func(b *testing.B) {
		s, err := createState(filepath.Join(b.TempDir(), "state"), size, [32]byte{})
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		for b.Loop() {
			if err := s.append(kindBlock, record{1, blockSize, 1}, record{2, blockSize, 1}); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/bufferSize, "ns/B")
	})
}

func writeAt(f *os.File, p []byte, off int64) error { _, err := f.WriteAt(p, off); return err }

func readAt(f *os.File, p []byte, off int64) error { _, err := f.ReadAt(p, off); return err }

func fillFile(f *os.File) error {
	st, err := f.Stat()
	p := make([]byte, bufferSize)
	for off := int64(0); err == nil && off < st.Size(); off += bufferSize {
		_, err = f.WriteAt(p, off)
	}
	return err
}

func writtenBack(f *os.File) error { return errors.Join(fillFile(f), f.Sync()) }

// benchmarkReceive reads from a socket of this machine, into which another goroutine writes.
func benchmarkReceive(b *testing.B, size int64) {
	l, err := new(net.ListenConfig).Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			_, _ = io.CopyBuffer(struct{ io.Writer }{c}, io.LimitReader(endless{}, size), make([]byte, bufferSize))
			_ = c.Close()
		}
	}()
	b.SetBytes(size)
	buf := make([]byte, bufferSize)
	for b.Loop() {
		c, err := new(net.Dialer).DialContext(b.Context(), "tcp", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, buf)
		if err := errors.Join(err, c.Close()); err != nil || n != size {
			b.Fatal(n, err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(size), "ns/B")
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }
