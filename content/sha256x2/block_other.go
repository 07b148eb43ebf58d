//go:build !amd64

package sha256x2

func hasLanes() bool { return false }

// blocks2 is never called.
func blocks2(_, _ *[8]uint32, _, _ *byte, _ int) { panic("sha256x2: no lanes on this processor") }
