package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/plugin/check"
	"github.com/gantryd/gantry/snapshotter"
)

const layerCure = "gantry check --repair makes it anew from its blob or registry; or remove the images and pull them again"

// checkDatabase verifies the snapshots' database while it is in use.
func (c *checking) checkDatabase(ctx context.Context) error {
	err := c.snapshots.CheckDatabase(ctx)
	if err == nil || !errdefs.IsDataLoss(err) {
		return err
	}
	return c.report(databaseFault(err, "stop gantryd (containers go on), run gantry check --repair, start it again"))
}

func databaseFault(err error, cure string) finding {
	return finding{order: orderDatabase, Fault: check.Fault{
		What: "database", Where: "metadata.db", Problem: err.Error(),
		Meaning: "gantryd does not start, or loses snapshots; containers that run go on", Cure: cure,
	}}
}

// checkLayer reads one layer file: the SHA-256 of the file is its name.
func (c *checking) checkLayer(ctx context.Context, f snapshotter.LayerFile) error {
	look := func(ctx context.Context) (string, error) {
		return c.wrong(ctx, f.Path, f.DiffID, func(fi fs.FileInfo) bool {
			now, err := os.Stat(f.Path)
			return err == nil && fi != nil && os.SameFile(now, fi)
		})
	}
	problem, err := look(ctx)
	if err != nil || problem == "" {
		return err
	}
	c.mu.Lock()
	c.badLayers[f.DiffID] = true
	c.mu.Unlock()
	names := []string{f.DiffID.String()}
	for _, k := range f.Keys {
		_, name := snapshotName(k)
		names = append(names, name)
	}
	fault := check.Fault{
		What: "layer file", Where: f.Path, Problem: problem + ", not " + f.DiffID.String(),
		Meaning:  "containers of the image read wrong bytes, or get errors",
		Affected: c.known.affected(names...), Cure: layerCure,
	}
	if len(f.IDs) == 0 {
		fault.Meaning = "no snapshot shows it yet"
	}
	return c.report(finding{Fault: fault, order: orderLayer, repair: func(ctx context.Context) (string, error) {
		return c.repairLayer(ctx, f, look)
	}})
}

// repairLayer replaces a layer file for all who show it by now.
func (c *checking) repairLayer(ctx context.Context, f snapshotter.LayerFile, look func(context.Context) (string, error)) (string, error) {
	if problem, err := look(ctx); err != nil || problem == "" {
		return soundNow, err
	}
	var ids []string
	if c.snapshots != nil {
		linked, err := c.snapshots.LayerFiles(ctx)
		if err != nil {
			return "", err
		}
		for _, l := range linked {
			if l.DiffID == f.DiffID {
				ids = append(ids, l.IDs...)
			}
		}
	}
	if len(ids) == 0 {
		return "removed, for no snapshot shows it", c.layers.Drop(f.DiffID)
	}
	if err := c.renewLayer(ctx, f.DiffID); err != nil {
		return "", err
	}
	if err := c.renewSnapshots(ctx, ids, f.DiffID); err != nil {
		return "", err
	}
	return fmt.Sprintf("made anew, and %d snapshots show the new file; restart containers that run on the old one", len(ids)), nil
}

// renewLayer sees to it that the layer's file is good: once for all findings of the same layer.
func (c *checking) renewLayer(ctx context.Context, diffID digest.Digest) error {
	if err, ok := c.renewed[diffID]; ok {
		return err
	}
	err := c.makeLayer(ctx, diffID)
	if ctx.Err() == nil {
		c.renewed[diffID] = err
	}
	return err
}

func (c *checking) makeLayer(ctx context.Context, diffID digest.Digest) error {
	c.pins = append(c.pins, c.layers.Pin(diffID)) // until a snapshot links it
	path, err := c.layers.Path(diffID)
	if err != nil {
		return err
	}
	got, _, err := check.Hash(ctx, path, digest.SHA256, c.count)
	if err == nil && got == diffID {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := c.layers.Drop(diffID); err != nil {
		return err
	}
	namespaces := []string{""}
	if c.known != nil {
		namespaces = c.known.namespaces
	}
	if err := c.puller.Rewrite(ctx, diffID, namespaces); err != nil {
		return fmt.Errorf("the layer cannot be made anew: %w", err)
	}
	return nil
}

// renewSnapshots has snapshots show a layer's good file, parents first.
func (c *checking) renewSnapshots(ctx context.Context, ids []string, diffID digest.Digest) error {
	ids, err := c.snapshots.Order(ctx, ids)
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range ids {
		if err := c.snapshots.Renew(ctx, id, diffID); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("snapshot %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// checkSnapshots looks at folders, indexes and mounts.
func (c *checking) checkSnapshots(ctx context.Context) error {
	if c.snapshots == nil {
		return nil
	}
	flaws, err := c.snapshots.Check(ctx, lookAgain)
	if err != nil {
		return fmt.Errorf("snapshots: %w", err)
	}
	for _, f := range flaws {
		if _, err := os.Stat(f.Path); err == nil && f.Part == snapshotter.PartLayer && c.badLayers[f.DiffID] {
			continue // the layer file was reported
		}
		if err := c.report(c.snapshotFinding(f)); err != nil {
			return err
		}
	}
	return nil
}

func (c *checking) snapshotFinding(f snapshotter.Flaw) finding {
	namespace, name := snapshotName(f.Key)
	fault := check.Fault{What: "snapshot", Where: f.Path, Problem: f.Problem, Affected: c.known.affected(name, f.DiffID.String())}
	if f.Kind != snapshots.KindCommitted && f.ID != "" {
		fault.Affected = []string{fmt.Sprintf("%s/%s (a container's snapshot)", namespace, name)}
	}
	order := orderSnapshot
	repair := func(ctx context.Context) (string, error) { return c.snapshots.Mend(ctx, f) }
	switch f.Part {
	case snapshotter.PartLayer, snapshotter.PartRecord:
		fault.Meaning, fault.Cure = "new containers of the image do not start, or show a file that nobody verifies", layerCure
		repair = func(ctx context.Context) (string, error) { return c.relayer(ctx, f) }
	case snapshotter.PartFolder:
		if f.Kind == snapshots.KindCommitted {
			fault.Meaning, fault.Cure = "new containers of the image do not start", layerCure
			repair = func(ctx context.Context) (string, error) { return c.relayer(ctx, f) }
			break
		}
		fault.Meaning = "what the container wrote is lost, and it cannot be started again"
		fault.Cure = "remove the container and make it again; gantry check --repair gives it an empty folder"
	case snapshotter.PartUpper:
		fault.Meaning = "what the container wrote cannot be read: it goes on at most until it stops"
		fault.Cure = "save what is needed, remove the container and make it again (a damaged file: stop the container, unmount mnt/ID.rw below root, e2fsck -f)"
		repair = nil
		if f.Kind == snapshots.KindCommitted {
			fault.Meaning, fault.Cure = "new containers of the image do not start", layerCure
			repair = func(ctx context.Context) (string, error) { return c.relayer(ctx, f) }
		}
	case snapshotter.PartIndex:
		fault.What, fault.Meaning = "index", "containers of the image may see wrong names and attributes; it is not used for a new mount"
		fault.Cure = "gantryd makes it again before it mounts it; gantry check --repair does so now"
	case snapshotter.PartUsage:
		fault.Meaning, fault.Cure = "the snapshot's size is measured anew each time", "gantry check --repair removes it"
		order = orderRest
	case snapshotter.PartMount:
		fault.What, fault.Meaning = "mount", "it keeps a removed layer's space, or shows new containers something else"
		fault.Cure = "gantry check --repair mounts what belongs there, or unmounts it"
	case snapshotter.PartLeftover, snapshotter.PartLoop:
		fault.What, fault.Meaning = "leftover", "it takes space"
		fault.Cure = "gantryd removes it when it starts or containerd collects garbage; gantry check --repair does so now"
		order = orderRest
	}
	return finding{Fault: fault, order: order, repair: repair}
}

// relayer gives a snapshot its layer's file again.
func (c *checking) relayer(ctx context.Context, f snapshotter.Flaw) (string, error) {
	diffID := f.DiffID
	if diffID == "" {
		var err error
		if diffID, err = c.identify(ctx, f.ID); err != nil {
			return "", err
		}
	}
	if path, err := c.layers.Path(diffID); err == nil && path == f.Path && !c.badLayers[diffID] {
		return c.snapshots.Mend(ctx, f) // the snapshot's own link is good and was hashed
	}
	if err := c.renewLayer(ctx, diffID); err != nil {
		return "", err
	}
	return "it shows the layer's file again", c.snapshots.Renew(ctx, f.ID, diffID)
}

// identify finds which layer a snapshot is of.
func (c *checking) identify(ctx context.Context, id string) (digest.Digest, error) {
	candidates, err := c.puller.DiffIDs(ctx)
	if err != nil {
		return "", err
	}
	files, _, err := c.layers.Files()
	if err != nil {
		return "", err
	}
	candidates = slices.Concat(candidates, files)
	d, err := c.snapshots.Identify(ctx, id, candidates)
	if err == nil && d == "" {
		err = fmt.Errorf("no image that is here tells what was in it (a container's committed changes, or an image whose config is gone): %w", errdefs.ErrNotFound)
	}
	return d, err
}
