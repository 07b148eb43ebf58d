package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
)

const (
	// maxAnswer bounds what a credential helper prints, in bytes.
	maxAnswer = 64 << 10
	// killDelay is how long a pipe may stay open after the helper was killed: by
	// what it started in a process group of its own.
	killDelay = time.Second
)

var (
	errHung   = errors.New("killed")
	errAnswer = fmt.Errorf("more than %d bytes", maxAnswer)
)

// runHelper asks a credential helper for a server's credentials, two empty
// strings if it knows none. What it prints is not quoted in an error: a helper
// that fails halfway may have printed the secret. errHung: it was killed.
func runHelper(name, server string, timeout time.Duration) (user, secret string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var run *helperRun
	found, err := client.Get(func(args ...string) client.Program {
		run = newHelperRun(ctx, name, args)
		return run
	}, server)
	if err == nil {
		return found.Username, found.Secret, nil
	}
	switch cause := run.err; {
	case credentials.IsErrCredentialsNotFound(err):
		return "", "", nil
	case ctx.Err() != nil:
		return "", "", errHung
	case errors.Is(cause, exec.ErrNotFound):
		return "", "", fmt.Errorf("credential helper %s is not in PATH: %w", name, errdefs.ErrFailedPrecondition)
	case cause == nil:
		return "", "", fmt.Errorf("credential helper %s answers no JSON: %w", name, errdefs.ErrFailedPrecondition)
	default:
		return "", "", fmt.Errorf("credential helper %s fails, see `echo %s | %s get`: %w: %w", name, server, name, cause, errdefs.ErrFailedPrecondition)
	}
}

// helperRun is one run of a credential helper, for docker's client.
type helperRun struct {
	cmd *exec.Cmd
	err error
}

var _ client.Program = (*helperRun)(nil)

// newHelperRun prepares a run that ctx ends together with all that it started:
// helpers are often shell scripts, and a child left behind would hold the pipe.
func newHelperRun(ctx context.Context, name string, args []string) *helperRun {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = killDelay
	if os.Getenv("HOME") == "" {
		// systemd gives root's services none, and helpers look for their files there.
		if u, err := user.Current(); err == nil {
			cmd.Env = append(os.Environ(), "HOME="+u.HomeDir)
		}
	}
	return &helperRun{cmd: cmd}
}

// Input implements client.Program.
func (h *helperRun) Input(in io.Reader) { h.cmd.Stdin = in }

// Output implements client.Program. Standard error is thrown away.
func (h *helperRun) Output() ([]byte, error) {
	var out bounded
	h.cmd.Stdout = &out
	h.err = h.cmd.Run()
	if errors.Is(h.err, exec.ErrWaitDelay) {
		h.err = nil // it ended well; an agent that it started has the pipe
	}
	return out.buf.Bytes(), h.err
}

// bounded takes maxAnswer bytes. It embeds no buffer: the buffer's ReadFrom would go past the bound.
type bounded struct{ buf bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.buf.Len()+len(p) > maxAnswer {
		return 0, errAnswer
	}
	return b.buf.Write(p)
}
