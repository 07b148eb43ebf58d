package corpus

import (
	"bytes"
	"fmt"
)

// SparseZeros is a layer of one file without any data, as GNU tar writes it with --sparse --sparse-version=1.0.
func SparseZeros(name string, size int64) []byte {
	return Tar(sparse10(name, "0\n", decimal(size), ""))
}

// ManyFiles is a layer of n small files in one directory.
func ManyFiles(folder string, n int) []byte {
	var w bytes.Buffer
	dir(folder, 0o755).write(&w)
	for i := range n {
		file(fmt.Sprintf("%s/file-%06d", folder, i), fmt.Sprint(i)).write(&w)
	}
	return end(w.Bytes())
}

// ManyWhiteouts is a layer that takes every step-th of those files away again.
func ManyWhiteouts(folder string, n, step int) []byte {
	var w bytes.Buffer
	for i := 0; i < n; i += step {
		file(fmt.Sprintf("%s/.wh.file-%06d", folder, i), "").write(&w)
	}
	return end(w.Bytes())
}
