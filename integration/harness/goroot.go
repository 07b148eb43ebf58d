package harness

import (
	"archive/tar"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// GorootSpec describes an image of this machine's own Go installation, as
// /usr/local/go, in four layers: bin, pkg, src and the rest. `go version` runs
// in it. dir is a folder for what has to be built first.
func GorootSpec(ctx context.Context, dir string) (ImageSpec, error) {
	out, err := output(exec.CommandContext(ctx, "go", "env", "GOROOT"))
	if err != nil {
		return ImageSpec{}, err
	}
	root, err := filepath.EvalSymlinks(strings.TrimSpace(out))
	if err != nil {
		return ImageSpec{}, err
	}
	const prefix = "usr/local/go"
	parts := []string{"bin", "pkg", "src"}
	spec := ImageSpec{Config: ocispec.ImageConfig{Cmd: []string{"/usr/local/go/bin/go", "version"}, Env: []string{"PATH=/usr/local/go/bin"}}}
	for _, part := range parts {
		from, err := filepath.EvalSymlinks(filepath.Join(root, part)) // Debian's packages link src elsewhere
		if err != nil {
			return ImageSpec{}, err
		}
		spec.Layers = append(spec.Layers, LayerSpec{Tar: Tree(from, prefix+"/"+part, nil)})
	}
	rest := func(rel string) bool { return rel != ".git" && !slices.Contains(parts, rel) }
	spec.Layers = append(spec.Layers, LayerSpec{Tar: Tree(root, prefix, rest)})
	static, err := isStatic(filepath.Join(root, "bin", "go"))
	if err != nil || static {
		return spec, err
	}
	over, err := staticGo(ctx, filepath.Join(dir, "go"), prefix+"/bin/go")
	spec.Layers = append(spec.Layers, LayerSpec{Tar: over})
	return spec, err
}

// isStatic says whether a program needs no loader of its own in the container.
func isStatic(path string) (bool, error) {
	f, err := elf.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false, nil
		}
	}
	return true, nil
}

// staticGo builds the go command without cgo, as a layer over the installed one.
func staticGo(ctx context.Context, path, name string) (TarFunc, error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", path, "cmd/go")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build a static go command: %w: %s", err, out)
	}
	return func(w io.Writer) error {
		program, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return Entries(Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755}, Data: string(program)})(w)
	}, nil
}
