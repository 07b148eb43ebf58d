package harness

import (
	"archive/tar"
	"context"
	"io"
	"os"
)

// BuildHelper builds the program of test images into dir and returns its path.
func BuildHelper(ctx context.Context, dir string) (string, error) { return build(ctx, dir, "helper") }

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
