// Demo pulls an image through gantry and runs it, in a private folder, and
// shows where the time went and who fetched what. It leaves nothing behind.
//
//	demo                 an image of this machine's GOROOT, from a registry of its own
//	demo -image REF      any image; -run says what to run in it
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/gantryd/gantry/integration/harness"
)

const namespace = "demo"

func main() {
	image := flag.String("image", "", "reference of an image to pull instead of the one made here")
	command := flag.String("run", "/bin/echo it runs", "what to run in the image of -image")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *image, strings.Fields(*command)); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		stop()
		os.Exit(1) //nolint:gocritic // nothing is deferred but stop
	}
}

// demo is what one run holds open, in the order it was opened.
type demo struct {
	node     *harness.Node
	registry *harness.Registry
	folder   *harness.PrivateFolder
	ref      string
	command  []string
}

func run(ctx context.Context, ref string, command []string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting and running containers needs root")
	}
	d := &demo{ref: ref, command: command}
	defer func() { err = errors.Join(err, d.close()) }()
	if d.ref == "" {
		if err := d.makeImage(ctx); err != nil {
			return err
		}
	}
	say("start gantryd and containerd")
	if d.node, err = harness.StartNode(ctx, harness.Options{}); err != nil {
		return err
	}
	if d.registry != nil {
		if err := d.node.AddRegistry("http", d.registry.Host()); err != nil {
			return err
		}
	}
	if err := d.pull(ctx); err != nil {
		return err
	}
	say("run %s in a container", strings.Join(d.command, " "))
	out, err := d.node.Run(ctx, namespace, d.ref, "demo", d.command...)
	if err != nil {
		return err
	}
	fmt.Print("    ", out)
	return d.report(ctx)
}

var began = time.Now()

func say(format string, args ...any) {
	fmt.Printf("%6.1fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}

// makeImage builds the image of GOROOT and pushes it to a registry of our own.
func (d *demo) makeImage(ctx context.Context) error {
	var err error
	if d.folder, err = harness.NewPrivateFolder(); err != nil {
		return err
	}
	say("start a registry")
	if d.registry, err = harness.StartRegistry(ctx, filepath.Join(d.folder.Path, "registry")); err != nil {
		return err
	}
	say("make an image of this machine's GOROOT")
	spec, err := harness.GorootSpec(ctx, d.folder.Path)
	if err != nil {
		return err
	}
	im, err := harness.Build(ctx, filepath.Join(d.folder.Path, "image"), spec)
	if err != nil {
		return err
	}
	say("push it: %d layers, %s", len(im.Layers), mib(im.Size()))
	d.ref, err = im.Push(ctx, d.registry.Host(), "goroot", "demo")
	d.command = spec.Config.Cmd
	return err
}

// close stops everything and says whether anything of it is still mounted.
func (d *demo) close() error {
	say("stop everything")
	var errs []error
	if d.node != nil {
		errs = append(errs, d.node.Close())
		left, err := harness.MountsBelow(d.node.Dir)
		if errs = append(errs, err); len(left) > 0 {
			errs = append(errs, fmt.Errorf("still mounted: %s", strings.Join(left, " ")))
		}
	}
	if d.registry != nil {
		errs = append(errs, d.registry.Close())
	}
	if d.folder != nil {
		errs = append(errs, d.folder.Close())
	}
	return errors.Join(errs...)
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
