package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
)

const (
	spaces  = 4                // namespaces
	stuck   = 5 * time.Minute  // no step takes nearly that long
	excused = 15 * time.Second // how long after a kill a failure may be its doing: containerd redials within seconds
	lasting = 10 * time.Minute // no client fails for that long
)

// client does one cycle after the other.
type client struct {
	*soak
	number int
	rnd    *rand.Rand
	serial int
}

func newClient(s *soak, number int) *client {
	return &client{soak: s, number: number, rnd: rand.New(rand.NewPCG(s.seed, uint64(number)))}
}

// errWrong is what no kill excuses.
var errWrong = errors.New("WRONG BYTES")

// race is containerd's own, with any snapshotter: the parent that an unpack has seen, made by another client's pull, is
// held by no lease of its own, and goes with that client's image before the unpack prepares over it. containerd's
// metadata says so; gantry is not asked.
var race = regexp.MustCompile(`parent snapshot sha256:[0-9a-f]{64} does not exist: not found`)

// cycle pulls an image, runs it and removes it, each in one of several ways.
func (c *client) cycle(ctx context.Context) error {
	k := c.kinds[c.rnd.IntN(len(c.kinds))]
	namespace, ref := fmt.Sprint("soak", c.rnd.IntN(spaces)), k.refs[c.number]
	began := time.Now()
	pull := c.rnd.IntN(3)
	err := c.try(ctx, []string{"pull", "pull --local", "pull by the Go client"}[pull], func(ctx context.Context) error {
		var err error
		switch pull {
		case 0:
			_, err = c.node.Pull(ctx, namespace, ref)
		case 1:
			_, err = c.node.Pull(ctx, namespace, ref, "--local")
		default:
			err = c.node.PullClient(ctx, namespace, ref)
		}
		return err
	})
	if err == nil && c.rnd.IntN(4) == 0 {
		err = c.try(ctx, "commit", func(ctx context.Context) error { return c.commit(ctx, namespace, k) })
	}
	if err == nil {
		err = c.try(ctx, "run", func(ctx context.Context) error { return c.runOnce(ctx, namespace, ref, k) })
	}
	if err == nil {
		sync := c.rnd.IntN(2) == 0
		err = c.try(ctx, "remove", func(ctx context.Context) error { return c.remove(ctx, namespace, ref, sync) })
	}
	if err != nil {
		return fmt.Errorf("%s in %s: %w", k.name, namespace, err)
	}
	c.tally.cycle(time.Since(began))
	return nil
}

// try does a step again as long as a kill explains its failures, or containerd's race. One that takes too long is stuck, kill or not.
func (c *client) try(ctx context.Context, what string, step func(context.Context) error) error {
	var last error
	first := time.Now()
	for time.Since(first) < lasting {
		began := time.Now()
		limited, cancel := context.WithTimeout(ctx, stuck)
		err := step(limited)
		late := limited.Err() != nil && ctx.Err() == nil
		cancel()
		took := time.Since(began)
		switch {
		case late:
			return fmt.Errorf("%s: STUCK: it did not end within %s: %w", what, stuck, err)
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil:
			c.tally.step(what, took)
			return nil
		case errors.Is(err, errWrong), !c.kills.explains(began) && !race.MatchString(err.Error()):
			return fmt.Errorf("%s: %w", what, err)
		}
		c.tally.failed(what, err, took)
		last = err
		pause(ctx, 500*time.Millisecond)
	}
	return fmt.Errorf("%s: STUCK: it failed for %s: %w", what, lasting, last)
}

func (c *client) id(what string) string {
	c.serial++
	return fmt.Sprintf("%s-%d-%d", what, c.number, c.serial)
}

// wrongExit is what the helper's check exits with. What a container prints can get lost in ctr: it gives up the pipes of
// a process that ends before they are open.
const wrongExit = 3

// runOnce has a container of the image sum itself up.
func (c *client) runOnce(ctx context.Context, namespace, ref string, k *kind) error {
	id := c.id("run")
	_, err := c.node.Run(ctx, namespace, ref, id, "/helper", "check", "/data", k.sum)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == wrongExit {
		return fmt.Errorf("%w: container %s of %s: %w", errWrong, id, k.name, err)
	}
	if err != nil {
		return errors.Join(err, c.removeContainer(ctx, namespace, id))
	}
	return nil
}

// removeContainer takes away what a run that failed left, in as many tries as it takes.
func (c *client) removeContainer(ctx context.Context, namespace, id string) error {
	return c.try(ctx, "remove container", func(ctx context.Context) error {
		api, err := c.node.Client()
		if err != nil {
			return err
		}
		ctx = namespaces.WithNamespace(ctx, namespace)
		container, err := api.LoadContainer(ctx, id)
		if errdefs.IsNotFound(err) {
			return nil
		} else if err != nil {
			return err
		}
		if task, err := container.Task(ctx, nil); err == nil {
			if _, err := task.Delete(ctx, containerd.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
		if err := container.Delete(ctx, containerd.WithSnapshotCleanup); !errdefs.IsNotFound(err) {
			return err
		}
		return nil
	})
}

func (c *client) remove(ctx context.Context, namespace, ref string, sync bool) error {
	if sync {
		_, err := c.node.Ctr(ctx, namespace, "image", "rm", "--sync", ref)
		return err
	}
	api, err := c.node.Client()
	if err != nil {
		return err
	}
	err = api.ImageService().Delete(namespaces.WithNamespace(ctx, namespace), ref)
	if errdefs.IsNotFound(err) { // removed by a try whose answer was lost
		return nil
	}
	return err
}

// commit makes a directory layer: it changes a file over the image, commits that, and reads all of it through a view.
func (c *client) commit(ctx context.Context, namespace string, k *kind) (err error) {
	api, err := c.node.Client()
	if err != nil {
		return err
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	ctx, done, err := api.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	if err != nil {
		return err
	}
	// Without the lease the snapshots are garbage.
	defer func() { err = errors.Join(err, c.try(ctx, "release", done)) }()
	s := api.SnapshotService(c.node.Snapshotter)
	key := c.id("change")
	changed, err := s.Prepare(ctx, key, identity.ChainID(k.image.DiffIDs).String())
	if err != nil {
		return err
	}
	var want string
	err = mount.WithTempMount(ctx, changed, func(root string) (err error) {
		if err := os.WriteFile(filepath.Join(root, "data", "changed"), []byte(key), 0o600); err != nil {
			return err
		}
		want, err = sumIn(ctx, root)
		return err
	})
	if err != nil {
		return err
	}
	if want == k.sum {
		return fmt.Errorf("%w: the change of %s is not seen", errWrong, k.name)
	}
	if err := s.Commit(ctx, key+"-committed", key); err != nil {
		return err
	}
	view, err := s.View(ctx, key+"-view", key+"-committed")
	if err != nil {
		return err
	}
	got, err := sumOf(ctx, view)
	if err == nil && got != want {
		err = fmt.Errorf("%w: the commit over %s reads %s, want %s", errWrong, k.name, got, want)
	}
	return err
}
