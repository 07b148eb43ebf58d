package transfer_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/content/registry"
	"github.com/gantryd/gantry/content/transfer"
)

// BenchmarkLoopback fetches blobs from an HTTP server in another process, without any cap: what gantryd itself can do.
// With unpack somebody follows who does what the least of all unpacks does: hash the bytes and write them elsewhere.
// ns/B is the time until all is durable, cpu-ns/B what this process alone spent, tail-ms the time from the last byte to
// verified, durable and unpacked.
func BenchmarkLoopback(b *testing.B) {
	for _, bm := range []struct {
		name   string
		mb     []int64
		unpack bool
	}{
		{"1x1GB", []int64{1000}, false},
		{"1x1GB-unpack", []int64{1000}, true},
		{"3x", []int64{100, 100, 800}, false},
		{"3x-unpack", []int64{100, 100, 800}, true},
	} {
		b.Run(bm.name, func(b *testing.B) {
			dir := b.TempDir()
			var blobs []transfer.Blob
			var total int64
			for i, mb := range bm.mb {
				blobs = append(blobs, writeBlob(b, dir, byte(i), mb*1e6))
				total += mb * 1e6
			}
			at := serveFiles(b, dir)
			b.SetBytes(total)
			var cpu, tail, last time.Duration
			for b.Loop() {
				t, l, c := fetchAll(b, at, blobs, bm.unpack)
				tail, last, cpu = tail+t, last+l, cpu+c
			}
			n := float64(b.N)
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/n/float64(total), "ns/B")
			b.ReportMetric(float64(cpu.Nanoseconds())/n/float64(total), "cpu-ns/B")
			b.ReportMetric(float64(last.Milliseconds())/n, "last-byte-ms")
			b.ReportMetric(float64(tail.Milliseconds())/n, "tail-ms")
		})
	}
}

// fetchAll brings the blobs here. last is when the last byte of all was there, tail what followed it, cpu what this
// process spent.
func fetchAll(b *testing.B, at string, blobs []transfer.Blob, unpack bool) (tail, last, cpu time.Duration) {
	b.StopTimer()
	root, err := os.MkdirTemp(b.TempDir(), "root")
	if err != nil {
		b.Fatal(err)
	}
	reg := registry.New(registry.Options{})
	m, err := transfer.New(root, transfer.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.StartTimer()
	begun, before := time.Now(), spent(b)
	var handles []*transfer.Handle
	done := make(chan error, len(blobs))
	for _, blob := range blobs {
		found, err := reg.Sources(b.Context(), at, "a/b", blob.Digest, blob.Size)
		if err != nil {
			b.Fatal(err)
		}
		h, err := m.Join(b.Context(), "image", blob, found[0])
		if err != nil {
			b.Fatal(err)
		}
		handles = append(handles, h)
		go func() {
			if unpack {
				if err := unpackTo(b.Context(), root, h); err != nil {
					done <- err
					return
				}
			}
			done <- h.Wait(b.Context())
		}()
	}
	for range handles {
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	}
	ended := time.Since(begun)
	cpu = spent(b) - before
	b.StopTimer()
	for _, h := range handles {
		first, download, _ := h.Timings()
		last = max(last, h.Started().Add(first+download).Sub(begun))
		_ = h.Close()
	}
	if err := errors.Join(m.Close(), reg.Close(), os.RemoveAll(root)); err != nil {
		b.Fatal(err)
	}
	b.StartTimer()
	return ended - last, last, cpu
}

func unpackTo(ctx context.Context, dir string, h *transfer.Handle) (err error) {
	f, err := os.CreateTemp(dir, "layer")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf, sum := make([]byte, 512<<10), sha256.New()
	for off := int64(0); ; {
		n, err := h.ReadAt(ctx, buf, off)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		sum.Write(buf[:n])
		if _, err := f.Write(buf[:n]); err != nil {
			return err
		}
		off += int64(n)
	}
}

// spent is the CPU time of this process.
func spent(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// writeBlob makes a file of random bytes, named by its digest.
func writeBlob(b *testing.B, dir string, seed byte, size int64) transfer.Blob {
	f, err := os.CreateTemp(dir, "new")
	if err != nil {
		b.Fatal(err)
	}
	d := digest.Canonical.Digester()
	_, err = io.CopyBuffer(io.MultiWriter(f, d.Hash()), io.LimitReader(rand.NewChaCha8([32]byte{seed}), size), make([]byte, 1<<20))
	blob := transfer.Blob{Digest: d.Digest(), Size: size}
	if err := errors.Join(err, f.Close(), os.Rename(f.Name(), filepath.Join(dir, blob.Digest.Encoded()))); err != nil {
		b.Fatal(err)
	}
	return blob
}

// serveFiles has another process serve the files of dir as a registry's blobs, and returns its address.
func serveFiles(b *testing.B, dir string) string {
	cmd := exec.CommandContext(b.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), transfer.ServeFolder+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = errors.Join(in.Close(), cmd.Wait()) })
	line := make([]byte, 64)
	n, err := out.Read(line)
	if err != nil {
		b.Fatal(err)
	}
	at := strings.TrimSpace(string(line[:n]))
	if _, _, err := net.SplitHostPort(at); err != nil {
		b.Fatal(err)
	}
	return at
}
