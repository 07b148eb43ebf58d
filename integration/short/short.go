// Package short makes tests smaller with -short. CI runs the race detector that way: it makes ten times as much of
// decoding and hashing, and what it looks for, goroutines that meet, comes with the first megabyte. Each test also runs
// in full, without the detector. Only tests import this package.
package short

import "testing"

// Size is full, and reduced with -short.
func Size(full, reduced int) int {
	if testing.Short() {
		return reduced
	}
	return full
}
