package sha256x2

// blocks2 puts n blocks of 64 bytes from p into the state a, and n from q into b. It is not preempted while it runs.
//
//go:noescape
func blocks2(a, b *[8]uint32, p, q *byte, n int)

// cpuid is the instruction of that name, subleaf 0.
func cpuid(leaf uint32) (eax, ebx, ecx uint32)

// hasLanes says whether the processor knows the instructions of blocks2.
func hasLanes() bool {
	const (
		sha          = 1 << 29         // leaf 7, EBX
		ssse3, sse41 = 1 << 9, 1 << 19 // leaf 1, ECX
	)
	if most, _, _ := cpuid(0); most < 7 {
		return false
	}
	_, _, c := cpuid(1)
	_, b, _ := cpuid(7)
	return b&sha != 0 && c&ssse3 != 0 && c&sse41 != 0
}
