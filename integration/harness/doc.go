// Package harness starts the real parts a test, the demo or the benchmark
// needs: a distribution registry, gantryd, containerd and runc, all in one
// private folder, and takes every one of them away again.
//
// A [Node] is one machine's containerd, with gantryd beside it or without. A
// [Registry] serves images from the folder it is given, and a [Proxy] before it
// counts what is sent and breaks what a test wants broken. A [FaultRegistry] is
// both in one and in this process: it counts what its sockets were given, and
// knows more ways to be wrong, slow or particular about who asks. [Build] makes images
// in code; [WalkTree] and [CompareTrees] say in what two file trees differ.
//
// Children die with the process that started them (PR_SET_PDEATHSIG), shims
// excepted: they survive containerd by design, so [Node.Close] looks for them.
package harness
