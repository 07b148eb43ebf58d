package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// steps prints the medians of each step of a start, and so where kinds differ. The steps are those of `ctr run --rm`,
// taken by containerd's Go client in this process.
func (b *bench) steps(ctx context.Context, nodes []sideNode) error {
	ctx = namespaces.WithNamespace(ctx, "default")
	took := map[string][]time.Duration{} // by step and kind
	var names []string                   // of the steps, in their order
	for i := range b.rounds * startsRound {
		for j := range nodes {
			n := nodes[(i+j)%len(nodes)]
			last := time.Now()
			step := func(name string) {
				key := name + n.kind.name
				took[key] = append(took[key], time.Since(last))
				if !slices.Contains(names, name) {
					names = append(names, name)
				}
				last = time.Now()
			}
			if err := startOnce(ctx, n, fmt.Sprintf("s%d", i), step); err != nil {
				return fmt.Errorf("start step by step, %s: %w", n.kind.name, err)
			}
		}
	}
	sums := map[string]float64{}
	for _, name := range names {
		fmt.Printf("start: %-41s", name)
		for _, n := range nodes {
			ms := median(took[name+n.kind.name]).Seconds() * 1e3
			sums[n.kind.name] += ms
			fmt.Printf("  %s %6.2f ms", n.kind.name, ms)
		}
		fmt.Println()
	}
	fmt.Printf("start: %-41s", "sum of the medians")
	for _, n := range nodes {
		fmt.Printf("  %s %6.2f ms", n.kind.name, sums[n.kind.name])
	}
	fmt.Printf("  (medians of %d)\n", b.rounds*startsRound)
	return nil
}

// startOnce starts a container that ends at once and removes it. It calls step when a step is over.
func startOnce(ctx context.Context, n sideNode, id string, step func(name string)) (err error) {
	client, err := n.node.Client()
	if err != nil {
		return err
	}
	image, err := client.GetImage(ctx, n.ref)
	if err != nil {
		return err
	}
	if unpacked, err := image.IsUnpacked(ctx, n.node.Snapshotter); err != nil || !unpacked {
		return errors.Join(err, errors.New("the image is not unpacked"))
	}
	step("the image is there (4 content calls, Stat)")
	snapshot := containerd.WithNewSnapshot(id, image)
	container, err := client.NewContainer(ctx, id,
		containerd.WithImage(image), containerd.WithImageConfigLabels(image), containerd.WithSnapshotter(n.node.Snapshotter),
		func(ctx context.Context, c *containerd.Client, r *containers.Container) error {
			step("labels (4 content calls)")
			defer step("Prepare")
			return snapshot(ctx, c, r)
		},
		containerd.WithImageStopSignal(image, "SIGTERM"),
		containerd.WithNewSpec(oci.WithImageConfig(image), oci.WithProcessArgs("/helper", "sleep", "0"), oci.WithHostNamespace(specs.NetworkNamespace)))
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, container.Delete(ctx, containerd.WithSnapshotCleanup))
		step("remove")
	}()
	step("stop signal and spec (8 content calls)")
	task, err := container.NewTask(ctx, cio.NullIO)
	if err != nil {
		return err
	}
	ended, err := task.Wait(ctx)
	if err != nil {
		return err
	}
	step("Mounts, mount, shim, runc create")
	if err := task.Start(ctx); err != nil {
		return err
	}
	<-ended
	step("run")
	_, err = task.Delete(ctx)
	step("unmount, runc delete")
	return err
}
