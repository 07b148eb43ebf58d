package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// growth is what gantryd takes while nobody wants anything of it.
type growth struct {
	HeapLive    int64 `json:"heap_live"`
	Collections int64 `json:"collections"`
	Goroutines  int64 `json:"goroutines"`
	OpenFiles   int64 `json:"open_files"`

	lingering int // transfers that nobody may want any more, but that are not given up yet
}

func (g growth) String() string {
	return fmt.Sprintf("%.1f MiB live, %d goroutines, %d open files", float64(g.HeapLive)/(1<<20), g.Goroutines, g.OpenFiles)
}

// What gantryd may take more after a phase than after the one before: caches fill, and connections are kept for a while.
const (
	moreHeap       = 8 << 20
	moreGoroutines = 12
	moreFiles      = 6
)

// exceeds says what grew.
func (g growth) exceeds(before growth) error {
	if g.HeapLive > before.HeapLive+moreHeap || g.Goroutines > before.Goroutines+moreGoroutines || g.OpenFiles > before.OpenFiles+moreFiles {
		return fmt.Errorf("gantryd GREW from %s to %s", before, g)
	}
	return nil
}

const (
	// lingers is how long gantryd goes on with what nobody waits for any more, and then some.
	lingers = time.Minute
	// connected is how long it keeps connections to registries that it does not use, and then some.
	connected = 100 * time.Second
)

// idle collects garbage, waits until gantryd has given up what nobody waits for, and asks what it takes. If that is more
// than before, where there is one, connections may not have been closed yet: then it waits for these, too.
func (s *soak) idle(ctx context.Context, before growth) (_ growth, err error) {
	if err := s.node.CollectGarbage(ctx); err != nil {
		return growth{}, err
	}
	conn, err := grpc.NewClient("unix://"+filepath.Join(s.node.Dir, "g.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return growth{}, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	began := time.Now()
	for ; time.Since(began) < lingers; pause(ctx, time.Second) {
		g, err := ask(ctx, conn)
		if err != nil {
			return g, err
		}
		if g.lingering == 0 {
			break
		}
	}
	for ; ; pause(ctx, time.Second) {
		g, err := collected(ctx, conn)
		if err != nil || before == (growth{}) || g.exceeds(before) == nil || time.Since(began) > connected || ctx.Err() != nil {
			return g, err
		}
	}
}

// collected asks until gantryd's memory was collected. The answers themselves make the garbage that has Go do that.
func collected(ctx context.Context, conn *grpc.ClientConn) (g growth, err error) {
	first := int64(-1)
	for range 100_000 {
		if g, err = ask(ctx, conn); err != nil {
			return g, err
		}
		if first < 0 {
			first = g.Collections
		}
		if g.Collections >= first+2 { // the second one saw all that the first let go
			return g, nil
		}
	}
	return g, errors.New("gantryd's memory is not collected")
}

// openFiles counts the descriptors of a process by what they are.
func openFiles(pid int) (string, error) {
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return "", err
	}
	counts := map[string]int{}
	for _, l := range links {
		if target, err := os.Readlink(l); err == nil {
			counts[numbers.ReplaceAllString(target, "*")]++
		}
	}
	var lines []string
	for _, target := range slices.Sorted(maps.Keys(counts)) {
		lines = append(lines, fmt.Sprintf("%d x %s", counts[target], target))
	}
	return strings.Join(lines, ", "), nil
}

var numbers = regexp.MustCompile(`^/tmp/gantry-\d+|[0-9a-f]{64}|\d+`)

func ask(ctx context.Context, conn *grpc.ClientConn) (g growth, err error) {
	var reply wrapperspb.BytesValue
	if err := conn.Invoke(ctx, "/gantry.v1.Status/Get", &emptypb.Empty{}, &reply); err != nil {
		return g, err
	}
	var report struct {
		Process   *growth `json:"process"`
		Transfers []struct {
			Phase string `json:"phase"`
		} `json:"transfers"`
	}
	report.Process = &g
	err = json.Unmarshal(reply.GetValue(), &report)
	for _, t := range report.Transfers {
		if t.Phase != "kept" {
			g.lingering++
		}
	}
	return g, err
}
