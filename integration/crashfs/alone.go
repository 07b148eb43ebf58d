package crashfs

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

const aloneEnv = "GANTRY_CRASHFS_ALONE"

// Alone runs the calling test once more, in a process that has its mounts for itself: whatever becomes of it, nothing
// stays mounted. It reports true in that process, and false, when that is done, in the one that was asked first.
func Alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(aloneEnv) == t.Name() {
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=8m", fmt.Sprint("-test.short=", testing.Short()))
	cmd.Env = append(os.Environ(), aloneEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("in a mount namespace of its own, which needs root: %v", err)
	}
	return false
}
