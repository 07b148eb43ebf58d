package snapshotter

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/corpus"
	"github.com/gantryd/gantry/integration/short"
)

// `make corpus-random` has the time of it.
var (
	randomFor   = flag.Duration("corpus.for", 0, "how long TestRandomCorpus goes on; 0: a fixed number of stacks")
	randomFirst = flag.Uint64("corpus.seed", 1, "the first seed of TestRandomCorpus")
)

// TestRandomCorpus compares random stacks of hostile tars with containerd's overlayfs, in each mode by turns. A layer that
// both refuse is left out of its stack.
func TestRandomCorpus(t *testing.T) {
	begin, compared, refused := time.Now(), 0, 0
	stacks := short.Size(60, 15)
	rigs, theirs := map[Mode]*rig{}, newOverlayfs(t)
	for _, mode := range mountModes {
		rigs[mode] = newRig(t, mode)
	}
	seed := *randomFirst
	for ; seed < *randomFirst+uint64(stacks) || time.Since(begin) < *randomFor; seed++ {
		if t.Context().Err() != nil || t.Failed() {
			break
		}
		for i, how := range unpacks {
			mode := mountModes[(int(seed)+i)%len(mountModes)]
			t.Run(fmt.Sprintf("seed %d %s %s", seed, mode, how.name), func(t *testing.T) {
				c, r := compareStack(t, theirs, rigs[mode], how, corpus.Random(seed), fmt.Sprintf("seed%d-%d", seed, i))
				compared, refused = compared+c, refused+r
			})
		}
	}
	t.Logf("%d stacks from seed %d on: %d layers compared, %d refused by both", seed-*randomFirst, *randomFirst, compared, refused)
	if compared < stacks {
		t.Errorf("only %d layers were compared: that says little", compared)
	}
}

// compareStack reports how many layers it compared and how many both refuse.
func compareStack(t *testing.T, theirs *overlayfs, ours *rig, how unpack, tars [][]byte, name string) (compared, refused int) {
	t.Helper()
	began, top := time.Now(), ""
	var taken [][]byte
	for i, tar := range tars {
		if i > 0 && top == "" {
			return 0, refused // only the first tar is one for a lowest layer
		}
		next, want := theirs.add(t, top, tar)
		l, got := ours.cache.Write(t.Context(), bytes.NewReader(tar), nil)
		if got == nil && top != "" {
			got = l.Table.OnlyLowest()
		}
		switch {
		case want != nil && got != nil:
			refused++
			continue
		case want != nil && refusesPlace(t, tar, top, want):
			refused++
			continue
		case (want == nil) != (got == nil):
			t.Fatalf("layer %d: containerd: %v\ngantry:     %v", i, want, got)
		}
		top, taken = next, append(taken, tar)
	}
	if len(taken) == 0 {
		return 0, refused // a single tar
	}
	bottom := ours.pull(t, how, name, "", taken...)
	sameAsOverlayfs(t, theirs.tree(t, top), viewTree(t, ours, bottom), began)
	return len(taken), refused
}

// refusesPlace tells the two failures of containerd's overlayfs that are about where a layer lies, see corpus.Taken, and not
// about what is in it, which goes into an upper directory without a parent: it looks for the attributes of an implied
// directory below something in a lower layer that is no directory, or through a loop; and it has no whiteouts to link to
// in a lowest layer.
func refusesPlace(t *testing.T, tar []byte, parent string, err error) bool {
	t.Helper()
	if _, err := archive.Apply(t.Context(), t.TempDir(), bytes.NewReader(tar), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)); err != nil {
		return false
	}
	if parent == "" {
		return errors.Is(err, unix.ENOENT)
	}
	return errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || strings.Contains(err.Error(), "too many links")
}
