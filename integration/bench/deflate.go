package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// deflateBench is the package's own benchmark: the streams are made there, in one place, and each is
// unpacked in turns by the package and by klauspost/compress.
const deflateBench = "./content/decompress/deflate"

// deflateBounds are how many times as fast as klauspost/compress each stream must be unpacked, on one and on
// two cores.
var deflateBounds = map[string][2]float64{"go": {1.4, 2.4}}

// otherStreams is the bound of all others.
var otherStreams = [2]float64{1, 1}

// deflate compares the inflate of content/decompress/deflate with klauspost/compress, interleaved.
func (b *bench) deflate(ctx context.Context) error {
	if _, err := os.Stat(deflateBench); err != nil {
		fmt.Printf("NOT MEASURED: %v (run it in the repository)\n", err)
		return nil
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkReader$", "-benchtime", "1x",
		"-count", strconv.Itoa(b.rounds), "-timeout", "60m", deflateBench)
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Run(); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err), errors.New(out.String()))
	}
	results := parseBench(&out)
	if len(results) == 0 {
		return fmt.Errorf("the benchmark printed no ratio: %s", out.String())
	}
	fmt.Printf("%-12s %5s %12s %16s %8s\n", "stream", "cores", "MB/s", "klauspost MB/s", "ratio")
	for _, r := range results {
		m, k, ratio := r.median("MB/s"), r.median("klauspost-MB/s"), r.median("ratio")
		bounds, ok := deflateBounds[r.stream]
		if !ok {
			bounds = otherStreams
		}
		bound := bounds[min(r.cores, 2)-1]
		fmt.Printf("%-12s %5d %12.0f %16.0f %8.2f  bound: at least %g, %s\n", r.stream, r.cores, m, k, ratio, bound, held(ratio >= bound))
	}
	return nil
}

// streamResult is what the benchmark said of one stream and number of cores, once a round.
type streamResult struct {
	stream  string
	cores   int
	metrics map[string][]float64
}

func (r *streamResult) median(unit string) float64 {
	s := slices.Sorted(slices.Values(r.metrics[unit]))
	switch n := len(s); {
	case n == 0:
		return 0
	case n%2 == 1:
		return s[n/2]
	default:
		return (s[n/2-1] + s[n/2]) / 2
	}
}

// benchLine is BenchmarkReader/STREAM/procs=CORES, the number of runs, and values with their units.
var benchLine = regexp.MustCompile(`^BenchmarkReader/(.+)/procs=(\d+)(?:-\d+)?\s+\d+\s+(.*)$`)

// parseBench reads `go test -bench` output, in the order in which streams come first.
func parseBench(out *bytes.Buffer) []*streamResult {
	var all []*streamResult
	for s := bufio.NewScanner(out); s.Scan(); {
		m := benchLine.FindStringSubmatch(s.Text())
		if m == nil {
			continue
		}
		cores, _ := strconv.Atoi(m[2]) // digits, says the expression
		i := slices.IndexFunc(all, func(r *streamResult) bool { return r.stream == m[1] && r.cores == cores })
		if i < 0 {
			i = len(all)
			all = append(all, &streamResult{m[1], cores, map[string][]float64{}})
		}
		fields := strings.Fields(m[3])
		for j := 0; j+1 < len(fields); j += 2 {
			if v, err := strconv.ParseFloat(fields[j], 64); err == nil {
				all[i].metrics[fields[j+1]] = append(all[i].metrics[fields[j+1]], v)
			}
		}
	}
	return all
}
