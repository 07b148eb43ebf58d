package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// stage is a part of a pull that a sample of gantryd's CPU time can belong to.
type stage struct {
	name string
	// Bytes that it handles: those of the blobs, or those of the tars in them.
	tar bool
	// serial stages handle one layer's bytes one after another: more cores do not help a single layer.
	serial bool
}

// The stages, in the order in which a byte passes them.
var (
	receive = &stage{name: "receive from the network"}
	store   = &stage{name: "store the blob"}
	hash    = &stage{name: "SHA-256 of the blob", serial: true}
	back    = &stage{name: "read the blob back"}
	inflate = &stage{name: "inflate, with CRC-32", tar: true}
	diffID  = &stage{name: "SHA-256 of the tar", tar: true, serial: true}
	scan    = &stage{name: "scan the tar", tar: true, serial: true}
	write   = &stage{name: "write the layer", tar: true, serial: true}
	flush   = &stage{name: "sync", tar: true}
	index   = &stage{name: "write the index", tar: true}
	rest    = &stage{name: "the rest (runtime, gRPC)", tar: true}
)

var stages = []*stage{receive, store, hash, back, inflate, diffID, scan, write, flush, index, rest}

// Packages by which a sample's callers tell where it belongs.
const (
	transferPackage   = "gantry/content/transfer."
	registryPackage   = "gantry/content/registry."
	decompressPackage = "gantry/content/decompress" // and deflate in it
	layerPackage      = "gantry/snapshotter/layer."
	erofsPackage      = "gantry/snapshotter/erofs."
	gzipPackage       = "klauspost/compress/"
)

// stageOf says where a sample belongs, by the functions on its stack, the innermost first.
func stageOf(stack []string) *stage {
	on := func(names ...string) bool {
		return slices.ContainsFunc(stack, func(f string) bool {
			return slices.ContainsFunc(names, func(n string) bool { return strings.Contains(f, n) })
		})
	}
	unpacking, transferring := on(decompressPackage, gzipPackage), on(transferPackage, registryPackage)
	syncing := on("Fsync", "Fdatasync", "SyncFileRange", "(*File).Sync")
	switch {
	case syncing && on(layerPackage, transferPackage):
		return flush
	case unpacking && on(".Pread", ".pread", "(*File).ReadAt"):
		return back
	case on("sha256") && on(layerPackage):
		return diffID
	case on("sha256") && transferring:
		return hash
	case unpacking:
		return inflate
	case on(erofsPackage):
		return index
	case on("archive/tar.", "layer.(*scanner)", "layer.(*builder)", "layer.(*tape)", "layer.scan", "scanAll"):
		return scan
	case on(layerPackage):
		return write
	case transferring && on(".Pread", ".pread", "(*File).ReadAt"):
		return hash // what is not hashed as it comes is read for it
	case transferring && on(".Pwrite", ".pwrite", "(*File).Write"):
		return store
	case transferring, on("net/http.(*persistConn)"):
		return receive
	default:
		return rest
	}
}

// profiler samples a process's stacks with perf.
type profiler struct {
	cmd  *exec.Cmd
	file string
	out  bytes.Buffer
}

func noPerf(ctx context.Context) string {
	if out, err := exec.CommandContext(ctx, "perf", "stat", "-e", "cpu-clock", "true").CombinedOutput(); err != nil {
		return fmt.Sprintf("perf is missing or does not work here (make bench-prerequisites): %v: %s", err, out)
	}
	return ""
}

// startProfiler returns when perf samples.
func startProfiler(ctx context.Context, dir string, pid int) (*profiler, error) {
	p := &profiler{file: filepath.Join(dir, "perf.data")}
	p.cmd = exec.CommandContext(ctx, "perf", "record", "-e", "cpu-clock", "-F", "997", "-g", "-p", strconv.Itoa(pid), "-o", p.file)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if info, err := os.Stat(p.file); err == nil && info.Size() > 0 {
			return p, nil
		}
		if time.Now().After(deadline) {
			_, err := p.stop(ctx)
			return nil, errors.Join(errors.New("perf does not begin"), err)
		}
	}
}

// stop ends the sampling and counts the samples by stage.
func (p *profiler) stop(ctx context.Context) (map[*stage]int, error) {
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		return nil, err
	}
	var exit *exec.ExitError
	if err := p.cmd.Wait(); err != nil && !errors.As(err, &exit) { // it ends by the signal
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "perf", "script", "-i", p.file, "-F", "comm,tid,ip,sym")
	var warnings bytes.Buffer
	cmd.Stderr = &warnings
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	counts, err := countStacks(out)
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return nil, fmt.Errorf("perf script: %w: %s%s", err, warnings.Bytes(), p.out.Bytes())
	}
	return counts, os.Remove(p.file)
}

// countStacks reads perf script's output: a line for the thread, indented lines "address function", an empty line.
func countStacks(r io.Reader) (map[*stage]int, error) {
	counts := map[*stage]int{}
	var stack []string
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		switch {
		case line == "" && stack != nil:
			counts[stageOf(stack)]++
			stack = nil
		case line != "" && (line[0] == ' ' || line[0] == '\t'):
			if _, function, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
				stack = append(stack, function)
			}
		}
	}
	if stack != nil {
		counts[stageOf(stack)]++
	}
	return counts, lines.Err()
}
