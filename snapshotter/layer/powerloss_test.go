package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/crashfs"
	"github.com/gantryd/gantry/integration/short"
)

// unpacked is a layer and the compressed blob that it comes from.
type unpacked struct {
	name   string
	tar    []byte
	diffID digest.Digest
	blob   digest.Digest
}

func theUnpacked() []unpacked {
	r := rand.New(rand.NewPCG(3, 4))
	var all []unpacked
	for i, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512, digest.SHA512, digest.SHA256} {
		var w rawTar
		w.add(file("noise", string(randomBytes(r, 200_000+i))))
		w.add(file("zeros", strings.Repeat("\x00", 100_000)))
		u := unpacked{name: fmt.Sprint(i), tar: w.end()}
		u.diffID, u.blob = digest.FromBytes(u.tar), alg.FromString(u.name)
		all = append(all, u)
	}
	return all
}

// stream is the tar, of every second one in blocks.
func (u *unpacked) stream() io.Reader {
	if u.name == "0" || u.name == "2" {
		return bytes.NewReader(u.tar)
	}
	return newBlockStream(bytes.NewReader(u.tar), 50_001, 3)
}

func (u *unpacked) make(ctx context.Context, c *Cache, mark func(string)) error {
	if _, err := c.Write(ctx, u.stream(), nil); err != nil {
		return err
	}
	mark("layer " + u.name)
	if err := c.Record(u.blob, u.diffID); err != nil {
		return err
	}
	mark("record " + u.name)
	return nil
}

// unpackAll makes the layers, two at a time, and one of them twice.
func unpackAll(ctx context.Context, root string, all []unpacked, mark func(string)) error {
	c, err := Open(root, Options{})
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for i := range all {
		g.Go(func() error { return all[i].make(gctx, c, mark) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return all[0].make(ctx, c, mark)
}

// The power fails after every operation. Each layer file that is there hashes to its name, what Write and Record
// have answered is there, and nothing stays behind that neither Open nor Sweep removes.
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	if !crashfs.Alone(t) {
		return
	}
	dir, states := t.TempDir(), t.TempDir()
	fsys, err := crashfs.Mount(dir)
	if err != nil {
		t.Fatal(err)
	}
	unmount, err := crashfs.Memory(states)
	if err != nil {
		t.Fatal(errors.Join(err, fsys.Close()))
	}
	t.Cleanup(func() {
		if err := errors.Join(unmount(), fsys.Close()); err != nil {
			t.Error(err)
		}
	})
	all := theUnpacked()
	if err := unpackAll(t.Context(), filepath.Join(dir, "layers"), all, fsys.Mark); err != nil {
		t.Fatal(err)
	}
	log := fsys.Log()
	r := rand.New(rand.NewPCG(5, uint64(len(log))))
	for cut := 0; cut <= len(log); cut += short.Size(1, 7) {
		for i, s := range []*crashfs.State{log.Least(cut), log.Most(cut), log.Some(cut, r), log.Some(cut, r)} {
			root := filepath.Join(states, fmt.Sprintf("%d-%d", cut, i))
			if err := errors.Join(s.Save(root), survives(t.Context(), filepath.Join(root, "layers"), all, log.Marks(cut))); err != nil {
				t.Fatalf("power lost after operation %d of %d (%s), state %d: %v", cut, len(log), log.At(cut-1), i, err)
			}
		}
	}
	t.Logf("%d operations, %d fsyncs", len(log), len(log.Syncs()))
}

func survives(ctx context.Context, root string, all []unpacked, marks []string) error {
	c, err := Open(root, Options{})
	if err != nil {
		return err
	}
	for _, u := range all {
		_, err := c.Get(ctx, u.diffID)
		if err == nil {
			err = c.Verify(ctx, u.diffID)
		}
		if err != nil && (!errdefs.IsNotFound(err) || slices.Contains(marks, "layer "+u.name)) {
			return fmt.Errorf("layer %s: %w", u.name, err)
		}
		got, err := c.Lookup(u.blob)
		if err != nil && (!errdefs.IsNotFound(err) || slices.Contains(marks, "record "+u.name)) {
			return fmt.Errorf("record %s: %w", u.name, err)
		}
		if err == nil && got != u.diffID {
			return fmt.Errorf("record %s leads to %s", u.name, got)
		}
	}
	if err := unpackAll(ctx, root, all, func(string) {}); err != nil {
		return err
	}
	for _, u := range all {
		if err := c.Verify(ctx, u.diffID); err != nil {
			return err
		}
	}
	return errors.Join(c.Sweep(ctx, 0), filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			err = fmt.Errorf("%s stays behind", path)
		}
		return err
	}))
}
