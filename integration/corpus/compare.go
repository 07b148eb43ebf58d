package corpus

import (
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/harness"
)

// mostLines is how many differences are told.
const mostLines = 60

// Compare says in what gantry's tree differs from overlayfs's, except for what is expected to differ; an exception that
// does not occur is told, too. started is when the test began to unpack.
//
// Times are not compared of the root and of directories that a layer only implies: they are the clock of unpacking on
// overlayfs, and in gantry, where one layer file serves at all times, the parent's.
func Compare(overlayfs, gantry harness.FileTree, started time.Time, except ...Exception) []string {
	started = started.Add(-time.Second) // the clock of files is coarse
	implied := func(path string) bool {
		e := overlayfs[path]
		return e.Mode&unix.S_IFMT == unix.S_IFDIR && !e.Mtime.Before(started)
	}
	lines := harness.CompareTrees(overlayfs, gantry, implied)
	for _, e := range except {
		i := slices.Index(lines, e.Line)
		if i < 0 {
			lines = append(lines, fmt.Sprintf("no difference %q, which is expected: %s", e.Line, e.Reason))
			continue
		}
		lines = slices.Delete(lines, i, i+1)
	}
	if n := len(lines); n > mostLines {
		lines = append(lines[:mostLines], fmt.Sprintf("and %d more", n-mostLines))
	}
	return lines
}
