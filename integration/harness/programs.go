package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Program returns the path of a program the tests run: gantryd and gantry from
// GANTRY_BIN (default bin/), all others from GANTRY_PEERS (default .cache/bin/).
// `make build peers` makes them.
func Program(name string) (string, error) {
	env, dir := "GANTRY_PEERS", filepath.Join(".cache", "bin")
	if name == "gantryd" || name == "gantry" {
		env, dir = "GANTRY_BIN", "bin"
	}
	folder, err := folder(env, dir)
	if err != nil {
		return "", err
	}
	path := filepath.Join(folder, name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%s is missing, make it with `make build peers`: %w", name, err)
	}
	return path, nil
}

// Cache returns the folder that keeps what is dear to make from one run to the
// next: GANTRY_CACHE, default .cache/ in the repository.
func Cache() (string, error) { return folder("GANTRY_CACHE", ".cache") }

func folder(env, below string) (string, error) {
	if v := os.Getenv(env); v != "" {
		return v, nil
	}
	root, err := repository()
	return filepath.Join(root, below), err
}

// repository finds the folder of the Makefile, from the working folder upwards.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "Makefile")); err == nil {
			return dir, nil
		}
		if dir == "/" {
			return "", errors.New("not inside gantry's repository: no Makefile in any folder above")
		}
	}
}
