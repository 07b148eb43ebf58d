package harness

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// BuildHelper builds the program of test images into dir and returns its path.
func BuildHelper(ctx context.Context, dir string) (string, error) {
	path := filepath.Join(dir, "helper")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path,
		"github.com/gantryd/gantry/integration/harness/helper")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the helper program: %w: %s", err, out)
	}
	return path, nil
}

// HelperTar is a layer with the helper program as /helper and the folders a container needs.
func HelperTar(path string) TarFunc {
	return func(w io.Writer) error {
		program, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		file := Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "helper", Mode: 0o755}, Data: string(program)}
		return Entries(Folder("proc", 0o755), Folder("dev", 0o755), Folder("sys", 0o755), file)(w)
	}
}
