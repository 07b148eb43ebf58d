package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/gantryd/gantry/integration/harness"
)

// tailBound is how long after its last byte a layer of 1 GB may take to be mountable, in seconds.
const tailBound = 0.3

// tail is how long after the last byte of a layer of 1 GB that layer is mountable, and the pull over:
// from a registry without a cap, and from one that sends as fast as the other network scenarios' does.
func (b *bench) tail(ctx context.Context) error {
	im, err := harness.BuildCached(ctx, "layer-v2", harness.ImageSpec{Layers: []harness.LayerSpec{{Tar: layerTar}}})
	if err != nil {
		return err
	}
	fmt.Printf("image: one layer of %.2f GB compressed\n", float64(im.Size())/1e9)
	for _, limit := range []int64{0, together} {
		if err := b.tailsAt(ctx, im, limit); err != nil {
			return err
		}
	}
	return nil
}

// layerTar is 0.8 GB that nothing compresses, then 0.8 GB of source code: the end is what takes longest to unpack.
var layerTar = harness.Concat(harness.Random("model", 31, 800e6, 4), harness.Sources("usr", 32, 800e6, 25_000))

func (b *bench) tailsAt(ctx context.Context, im *harness.Image, limit int64) (err error) {
	registry, err := harness.StartFaultRegistry(ctx, harness.FaultOptions{Total: limit})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	ref := registry.AddImage(im, "layer", "bench")
	name := "uncapped"
	if limit > 0 {
		name = fmt.Sprintf("%d MB/s", limit/1_000_000)
	}
	var outside, inside []time.Duration
	for round := range b.rounds {
		t, err := b.tailOnce(ctx, im, registry, ref)
		if err != nil {
			return err
		}
		fmt.Printf("round %d  %-9s  pull %6.2fs, last byte sent after %.2fs, pull over %.3fs later; gantryd: layer mountable %s\n",
			round+1, name, t.pull.Seconds(), (t.pull - t.outside).Seconds(), t.outside.Seconds(), known(t.inside, t.told))
		outside = append(outside, t.outside)
		if t.told {
			inside = append(inside, t.inside)
		}
	}
	fmt.Printf("median of %d  %s: pull over %.3fs after the last byte\n", b.rounds, name, median(outside).Seconds())
	if len(inside) == 0 {
		fmt.Printf("bound: layer mountable at most %gs after its last byte, %s: NOT MEASURED, this gantryd does not tell\n", tailBound, name)
		return nil
	}
	m := median(inside).Seconds()
	fmt.Printf("bound: layer mountable at most %gs after its last byte, %s: %.3fs, %s\n", tailBound, name, m, held(m <= tailBound))
	return nil
}

func known(d time.Duration, ok bool) string {
	if !ok {
		return "unknown"
	}
	return fmt.Sprintf("%.3fs after its last byte", d.Seconds())
}

// tails are one pull's.
type tails struct {
	pull    time.Duration
	outside time.Duration // from the registry's last byte to the pull's end
	inside  time.Duration // from the last byte's arrival to a mountable layer, if gantryd told
	told    bool
}

func (b *bench) tailOnce(ctx context.Context, im *harness.Image, registry *harness.FaultRegistry, ref string) (t tails, err error) {
	if err := b.freshDisk(ctx, 8); err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, b.disk.Close()) }()
	n, err := b.node(ctx, gantry.node, registry.Host())
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	if err := coldCache(im.Dir()); err != nil {
		return t, err
	}
	registry.Forget()
	begin := time.Now()
	if _, err := n.Pull(ctx, "default", ref); err != nil {
		return t, err
	}
	end := time.Now()
	t.pull = end.Sub(begin)
	for _, r := range registry.Requests() {
		if dgst, ok := r.Blob(); ok && dgst == im.Layers[0].Digest {
			if sent := r.Ended(); t.outside == 0 || end.Sub(sent) < t.outside {
				t.outside = end.Sub(sent)
			}
		}
	}
	t.inside, t.told, err = toldTail(ctx, n, im)
	return t, errors.Join(err, n.Complete(ctx, "default", ref))
}

// toldTail is what gantryd says about the image's only layer.
func toldTail(ctx context.Context, n *harness.Node, im *harness.Image) (time.Duration, bool, error) {
	out, err := n.GantryCLI(ctx, "status", "--json")
	if err != nil {
		return 0, false, err
	}
	var status struct {
		Recent []struct {
			Digest string   `json:"digest"`
			Tail   *float64 `json:"tail_seconds"`
		} `json:"recent"`
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		return 0, false, fmt.Errorf("gantry status --json: %w", err)
	}
	for _, l := range status.Recent {
		if l.Digest == im.Layers[0].Digest.String() && l.Tail != nil {
			return time.Duration(*l.Tail * float64(time.Second)), true, nil
		}
	}
	return 0, false, nil
}
