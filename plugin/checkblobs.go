package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/check"
)

const (
	blobMeaning = "a push or an export of the image fails or sends wrong bytes, and so does unpacking it again"
	docMeaning  = "the image cannot be pulled or started until its manifest and config can be read"
	pullAgain   = "gantry check --repair fetches it again"
	missing     = "containerd has it on record, and the store does not have it"
	removeImage = "repeat this when its registry answers, or remove the images and pull them again"
)

// checkBlob reads one blob.
func (c *checking) checkBlob(ctx context.Context, f content.File) error {
	look := func(ctx context.Context) (string, error) {
		return c.wrong(ctx, f.Path, f.Digest, func(fi fs.FileInfo) bool { return c.store.Uses(f, fi) })
	}
	problem, err := look(ctx)
	if err != nil || problem == "" {
		return err
	}
	return c.reportBlob(ctx, blobFault{"blob", f.Path, f.Digest, f.Size, problem, false, look})
}

// checkRecord reads what is left of a discarded blob.
func (c *checking) checkRecord(ctx context.Context, f content.File) error {
	look := func(context.Context) (string, error) {
		err := c.store.CheckRecord(f)
		if err == nil || ownTrouble(err) {
			return "", err
		}
		fi, serr := os.Lstat(f.Path)
		if errors.Is(serr, fs.ErrNotExist) {
			fi = nil
		}
		if !c.store.Uses(f, fi) {
			return "", nil // brought back or deleted meanwhile
		}
		return err.Error(), nil
	}
	problem, err := look(ctx)
	if err != nil || problem == "" {
		return err
	}
	return c.reportBlob(ctx, blobFault{"record", f.Path, f.Digest, f.Size, problem, false, look})
}

// blobFault is what is wrong with a blob.
type blobFault struct {
	what, where string
	digest      digest.Digest
	size        int64
	problem     string
	precious    bool                                                  // containerd is not to forget it
	look        func(ctx context.Context) (problem string, err error) // once more
}

func (c *checking) reportBlob(ctx context.Context, b blobFault) error {
	isLayer := c.isLayer(ctx, b.digest)
	meaning := docMeaning
	if isLayer {
		meaning = blobMeaning
	}
	return c.report(finding{
		Fault: check.Fault{
			What: b.what, Where: b.where, Problem: b.problem, Meaning: meaning,
			Affected: c.known.affected(b.digest.String()), Cure: pullAgain + "; or " + removeImage,
		},
		order:  orderBlob,
		repair: func(ctx context.Context) (string, error) { return c.repairBlob(ctx, b, isLayer) },
	})
}

// isLayer: nothing depends on a layer's blob in containerd's database, while forgetting a manifest frees all that it names.
func (c *checking) isLayer(ctx context.Context, d digest.Digest) bool {
	if c.puller == nil {
		return true
	}
	yes, err := c.puller.IsLayer(ctx, d)
	return err == nil && yes
}

// soundNow is what a repair says of what turns out to be right, or gone, when it is looked at once more.
const soundNow = "nothing was done: it was repaired or removed meanwhile, or the disk reads it right now; if that happens again, look for errors of the disk in the kernel's log"

// repairBlob fetches a blob again and puts it in place. Where that fails, a layer's blob is dropped: containerd forgets it
// too, because it would not ask for what it believes to have, and the next pull fetches it.
func (c *checking) repairBlob(ctx context.Context, b blobFault, isLayer bool) (string, error) {
	if problem, err := b.look(ctx); err != nil || problem == "" {
		return soundNow, err
	}
	if c.known == nil {
		return "", fmt.Errorf("only containerd knows where it came from: %w", errdefs.ErrUnavailable)
	}
	d := b.digest
	owners, err := c.containerd.owners(ctx, d)
	if err != nil {
		return "", err
	}
	if len(owners) == 0 {
		return c.dropUnowned(ctx, d)
	}
	var errs []error
	for _, o := range owners {
		if o.size <= 0 {
			continue
		}
		err := c.puller.Bring(ctx, o.namespace, d, o.size, func(link func(string) error) error {
			return c.store.Replace(o.namespace, d, o.size, link)
		})
		if err == nil {
			return "fetched again", nil
		}
		if ctx.Err() != nil {
			return "", err
		}
		errs = append(errs, err)
	}
	err = errors.Join(errs...)
	if !isLayer || b.precious || unwritable(err) {
		return "", fmt.Errorf("it cannot be fetched: %w", err)
	}
	for _, o := range owners {
		if err := c.containerd.forget(ctx, o.namespace, d); err != nil {
			return "", err
		}
	}
	if derr := c.store.Delete(ctx, d); derr != nil && !errdefs.IsNotFound(derr) {
		return "", errors.Join(err, derr)
	}
	return fmt.Sprintf("removed, a pull that needs it fetches it (one of an unpacked image by ctr does not; ctr image pull --local does): it cannot be fetched now (%s)", err.Error()), nil
}

// unwritable says whether it is the node's own disk that stands in the way.
func unwritable(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EIO)
}

// dropUnowned removes a blob that containerd does not know.
func (c *checking) dropUnowned(ctx context.Context, d digest.Digest) (string, error) {
	if err := c.store.Delete(ctx, d); errdefs.IsNotFound(err) {
		return "", fmt.Errorf("no namespace of containerd has it yet, and a pull is about to use it; repeat this when that has ended: %w", errdefs.ErrUnavailable)
	} else if err != nil {
		return "", err
	}
	return "removed: no namespace of containerd has it", nil
}

// checkKnown looks for blobs that containerd believes to have.
func (c *checking) checkKnown(ctx context.Context) error {
	if c.known == nil {
		return nil
	}
	there := map[digest.Digest]bool{}
	for _, f := range c.store.Files() {
		there[f.Digest] = true
	}
	var gone []digest.Digest
	for d, owners := range c.known.blobs {
		if !there[d] && len(owners) > 0 {
			gone = append(gone, d)
		}
	}
	slices.Sort(gone)
	problem, precious := missing, false
	if 2*len(gone) > len(c.known.blobs) {
		// They may well be in another folder, and containerd's garbage collection would remove there what it has forgotten.
		problem, precious = missing+", as most that containerd has: is content.root the right folder?", true
	}
	for _, d := range gone {
		owner := c.known.blobs[d][0]
		// Deleted since containerd was asked?
		still, err := c.containerd.has(ctx, owner.namespace, d)
		if err != nil {
			return fmt.Errorf("ask containerd for %s: %w", d, err)
		}
		look := func(ctx context.Context) (string, error) {
			if _, err := c.store.Info(ctx, d); err == nil {
				return "", nil
			}
			return problem, nil
		}
		if now, err := look(ctx); !still || err != nil || now == "" {
			continue
		}
		if err := c.reportBlob(ctx, blobFault{"blob", c.store.Path(d), d, owner.size, problem, precious, look}); err != nil {
			return err
		}
	}
	return nil
}

// checkTransfers looks at what is left of transfers, and at what is under way as far as nobody writes it.
func (c *checking) checkTransfers(ctx context.Context) error {
	for _, m := range c.transfers.all() {
		damaged, err := m.Check(ctx, pieces{c}, c.wasVerified)
		if err != nil {
			return err
		}
		for _, d := range damaged {
			err := c.report(finding{
				Fault: check.Fault{
					What: "transfer", Where: d.Path, Problem: d.Problem,
					Meaning: "bytes that were fetched are fetched again; nothing else depends on it",
					Cure:    "none is needed: the next pull does not trust it. gantry check --repair removes what is wrong",
				},
				order: orderTransfer,
				repair: func(context.Context) (string, error) {
					done, err := m.Repair(d)
					if err == nil && !done {
						return "none: somebody uses it", nil
					}
					return "what is wrong was removed, the next pull fetches it", err
				},
			})
			if err != nil {
				return err
			}
		}
		if err := c.checkLeftovers(m); err != nil {
			return err
		}
	}
	return nil
}

func (c *checking) checkLeftovers(m *transfer.Manager) error {
	left, err := m.Leftovers()
	if err != nil {
		return err
	}
	for _, path := range left {
		err := c.report(finding{
			Fault: check.Fault{
				What: "leftover", Where: path, Problem: "a transfer that nobody came back for, or whose process is gone",
				Meaning: "it takes space", Cure: "gantryd removes it within minutes; gantry check --repair does so at once",
			},
			order: orderRest,
			repair: func(ctx context.Context) (string, error) {
				if err := m.Sweep(ctx); err != nil {
					return "", err
				}
				return "removed", nil
			},
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// wasVerified says whether a transfer's file is one whose digest was right a moment ago, or was reported.
func (c *checking) wasVerified(fi fs.FileInfo) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.verified, func(v fs.FileInfo) bool { return os.SameFile(v, fi) }) ||
		slices.ContainsFunc(c.findings, func(f *finding) bool {
			bad, err := os.Lstat(f.Where)
			return err == nil && os.SameFile(bad, fi)
		})
}

// pieces is how transfers read files.
type pieces struct{ *checking }

var _ transfer.Pieces = pieces{}

// Verify implements transfer.Pieces.
func (p pieces) Verify(ctx context.Context, path string, d digest.Digest, size int64) (bool, error) {
	got, fi, err := check.Hash(ctx, path, d.Algorithm(), p.count)
	if errors.Is(err, fs.ErrNotExist) || ctx.Err() != nil {
		return false, err
	}
	return err == nil && got == d && fi.Size() == size, nil
}

// Read implements transfer.Pieces.
func (p pieces) Read(n int64) { p.count(n) }

// checkStrays looks for files that belong to nobody.
func (c *checking) checkStrays(context.Context) error {
	age := strayAfter
	if c.alone {
		age = 0
	}
	strays, err := c.store.Strays(age)
	if err != nil {
		return err
	}
	for _, path := range strays {
		err := c.report(finding{
			Fault: check.Fault{
				What: "leftover", Where: path, Problem: "a file that belongs to no blob and no upload",
				Meaning: "it takes space", Cure: "gantry check --repair moves it to the folder stray of content.root, for you to remove",
			},
			order: orderRest,
			repair: func(ctx context.Context) (string, error) {
				to, err := c.store.Quarantine(ctx, path)
				return "moved to " + to, err
			},
		})
		if err != nil {
			return err
		}
	}
	_, names, err := c.layers.Files()
	if err != nil {
		return err
	}
	for _, path := range names {
		if err := c.report(finding{order: orderRest, Fault: check.Fault{
			What: "leftover", Where: path, Problem: "its name is no digest", Meaning: "it is not gantry's", Cure: "remove it",
		}}); err != nil {
			return err
		}
	}
	return nil
}
