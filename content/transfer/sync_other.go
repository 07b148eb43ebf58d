//go:build !linux

package transfer

import "os"

func startWriteback(*os.File, int64, int64) {}

func linkFile(f *os.File, path string) error { return os.Link(f.Name(), path) }

func lockOwner(string) int { return 0 }
