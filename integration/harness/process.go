package harness

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// stopTimeout is how long a child may take to end after SIGTERM.
const stopTimeout = 15 * time.Second

// Process is a child with its output in files. It is killed when the calling
// process dies.
type Process struct {
	name string
	pid  int
	log  string
	done chan struct{}
	err  error // set before done is closed
}

// start runs path with args; stdout goes to <dir>/<name>.out and stderr to
// <dir>/<name>.log, both appended to, so that a restart keeps what was there.
func start(ctx context.Context, dir, name string, env []string, path string, args ...string) (*Process, error) {
	log := filepath.Join(dir, name+".log")
	stdout, err := appendTo(filepath.Join(dir, name+".out"))
	if err != nil {
		return nil, err
	}
	defer stdout.Close()
	stderr, err := appendTo(log)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	// The child outlives the call that started it; Stop and Kill end it.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), path, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = stdout, stderr, dir
	cmd.Env = append(os.Environ(), env...)
	// A group of its own: Ctrl-C in a terminal reaches us alone, and we stop the children in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p := &Process{name: name, log: log, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig follows the thread that forked, so that thread waits for the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			p.pid = cmd.Process.Pid
		}
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

func appendTo(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

// PID returns the process id.
func (p *Process) PID() int { return p.pid }

// Log returns the path of the file that holds the standard error output.
func (p *Process) Log() string { return p.log }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Kill sends SIGKILL and waits for the end. A process that has ended already is no error.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop sends SIGTERM, then SIGKILL when that did not help in time, which is an error.
func (p *Process) Stop() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s had ended before it was stopped (%w): %s", p.name, p.exit(), p.Tail())
	default:
	}
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
		p.Kill()
		return fmt.Errorf("%s did not end within %s of SIGTERM and was killed; its log: %s", p.name, stopTimeout, p.log)
	}
}

// Signal sends a signal. A process that has ended already is no error.
func (p *Process) Signal(sig syscall.Signal) {
	select {
	case <-p.done: // its id may belong to somebody else by now
	default:
		_ = syscall.Kill(p.pid, sig) // ended meanwhile: what was wanted
	}
}

func (p *Process) exit() error {
	if p.err == nil {
		return fmt.Errorf("exit status 0")
	}
	return p.err
}

// Tail returns the last lines of the log, for error messages.
func (p *Process) Tail() string {
	f, err := os.Open(p.log)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	var lines []string
	for s := bufio.NewScanner(f); s.Scan(); {
		if lines = append(lines, s.Text()); len(lines) > 15 {
			lines = lines[1:]
		}
	}
	return p.log + ":\n" + strings.Join(lines, "\n")
}

// answers waits until the process accepts connections on a socket.
func (p *Process) answers(ctx context.Context, socket string) error {
	return p.ready(ctx, func(ctx context.Context) error {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", socket)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// ready polls check until it succeeds, the process ends or ctx does.
func (p *Process) ready(ctx context.Context, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended before it was ready (%w): %s", p.name, p.exit(), p.Tail())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready (%w): %w: %s", p.name, context.Cause(ctx), err, p.Tail())
		case <-tick.C:
		}
	}
}
