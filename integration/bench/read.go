package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/harness"
)

const (
	readLarge  = 1_000_000_000 // bytes of the one large file
	readSmall  = 15_000        // files of source code
	readFaults = 40_000        // pages of the large file touched through mmap
	readTimes  = 3             // measurements of each in a round: a single one varies by half here
)

// read is how long reading an image's files takes, beside overlayfs on the same disk: sequentially and through mmap in
// random order, many small files, with an empty page cache and a full one.
func (b *bench) read(ctx context.Context) error {
	spec := harness.ImageSpec{Layers: []harness.LayerSpec{
		{Tar: harness.Sources("usr", 41, 200e6, readSmall)},
		{Tar: harness.Random("model", 42, readLarge, 1), Compression: harness.GzipFast},
	}}
	buf := make([]byte, 1<<20)
	patterns := []struct {
		name string
		read func(root string) error
	}{
		{"1 GB from its begin to its end", func(root string) error { return readFile(filepath.Join(root, "model/000"), buf) }},
		{"1 GB, random pages through mmap", func(root string) error { return faultPages(filepath.Join(root, "model/000")) }},
		{"15,000 small files", func(root string) error { return readTree(filepath.Join(root, "usr"), buf) }},
	}
	return b.beside(ctx, spec, []kind{gantry, overlayfs}, func(nodes []sideNode) error {
		return withRoots(ctx, nodes, nil, func(roots map[string]string) error {
			for _, p := range patterns {
				for _, cold := range []bool{true, false} {
					name := p.name + ", warm"
					if cold {
						name = p.name + ", cold"
					}
					err := b.duel(name, nodes, readTimes, func(n sideNode) (time.Duration, error) {
						if cold {
							if err := coldCache(""); err != nil {
								return 0, err
							}
						} else if err := p.read(roots[n.kind.name]); err != nil {
							return 0, err
						}
						begin := time.Now()
						err := p.read(roots[n.kind.name])
						return time.Since(begin), err
					}, 0.9)
					if err != nil {
						return err
					}
				}
			}
			return nil
		})
	})
}

// withRoots mounts the image on each node, for as long as do takes.
func withRoots(ctx context.Context, nodes []sideNode, roots map[string]string, do func(roots map[string]string) error) error {
	if len(nodes) == 0 {
		return do(roots)
	}
	if roots == nil {
		roots = map[string]string{}
	}
	n := nodes[0]
	return n.node.WithRootfs(ctx, "default", n.im.DiffIDs, func(root string) error {
		roots[n.kind.name] = root
		return withRoots(ctx, nodes[1:], roots, do)
	})
}

func readFile(name string, buf []byte) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		if _, err := f.Read(buf); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// faultPages touches pages in an order that is the same each time.
func faultPages(name string) (err error) {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap %s: %w", name, err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(data)) }()
	src, sum := rand.New(rand.NewPCG(1, 1)), byte(0)
	for range readFaults {
		sum += data[src.IntN(len(data))]
	}
	runtime.KeepAlive(sum) // or the compiler might leave the reads out
	return nil
}

func readTree(root string, buf []byte) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return readFile(path, buf)
	})
}
