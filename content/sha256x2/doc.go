// Package sha256x2 computes SHA-256 of two streams for the price of one.
//
// A processor with SHA-NI spends most of a SHA-256 waiting: each instruction needs
// what the one before it made. The instructions of a second stream fit into the gaps. A
// pull hashes at least two streams at the same time, the blob and the layer in it,
// but they come from different goroutines, at their own pace. So a Pool brings them
// together: a Write that finds another stream's Write waiting does both, two blocks at a
// time, and one that finds none may wait a little for another stream that is known to
// be active. There are no goroutines but the callers'.
//
// Only the function that takes two blocks is this package's. Everything else is
// crypto/sha256: other processors and FIPS mode, small writes and tails, padding, and
// a stream that is alone. Its digest holds the state, which is taken out and put back
// through encoding.BinaryAppender and encoding.BinaryUnmarshaler around what is done in
// a pair. Nothing is ever done in pairs unless that was found right when the program started.
//
// # How long a Write may be held up
//
// A Write never waits for more than its own bytes need, with two exceptions. It may
// wait for another Write that is under way alone to end its slice, 64 KiB, or about 40 µs. And it
// may wait for a partner, 8 ms at most, while another stream was written to in the last
// 100 ms and has not been asked for its Sum, and as long as waiting takes less than a quarter of
// the stream's time; a wait in vain uses up all of that. Callers buffer more than a
// stream brings meanwhile, so it is only the end of a stream that may come so much later.
//
// # Where it lives
//
// Streams of content and of snapshotter share one Pool, and those two never import each
// other. So nothing there imports this package either: plugin hands New to both, as a
// func() hash.Hash in their options, and without one they use crypto/sha256. That also keeps
// tests with virtual time apart from each other, whose goroutines must not wait for one another.
package sha256x2
