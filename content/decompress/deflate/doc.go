// Package deflate reads gzip streams on several cores.
//
// A DEFLATE stream has no index: a block begins at any bit, right where the one
// before it ends, and may copy from the 32 KiB before it (the window). This package
// follows the two-stage method of rapidgzip (Knespel and Brunst, "Rapidgzip: Parallel
// Decompression and Seeking in Gzip Files Using Cache Prefetching", HPDC 2023):
//
//   - The compressed bytes are cut into chunks of about half a MiB, one per worker.
//   - A worker looks for the first place in its chunk where a block may begin: the
//     header of a dynamic block with complete codes, a stored block whose length and
//     its complement agree and that another block follows, or the magic of a gzip
//     member, whose window is empty.
//   - It decodes from there with 16-bit symbols. What is copied from the unknown window
//     becomes a marker that says which byte of the window is meant.
//   - A chunk is decoded up to where the next one began. If both places are the same,
//     the next one began right, and the window before it is known. Otherwise it is decoded
//     again, from the right place: a guess is never more than that. Streams that hide other
//     gzip streams in stored blocks cost time, not truth.
//   - Markers are replaced by table look-ups, by any worker.
//
// Decoding with markers costs about half as much again as decoding bytes, so it
// is left as soon as possible: when 32 KiB without a marker were decoded; at the end of a
// gzip member; and when the window becomes known while the chunk is being decoded. With two
// workers about a quarter of a stream is decoded with markers. The chunk whose
// predecessor is done never begins with them. Who has other work for the processors says so by [WithSpare].
//
// What is only copied, block after stored block, is left to one worker. It reads from
// the source right to where the bytes are wanted; who takes them sums them up if
// that is what the worker would be waited for.
//
// With one worker there are no chunks, no markers and no goroutines: the caller's
// goroutine decodes what it asks for.
//
// # Format
//
// All block types of RFC 1951, and all of RFC 1952: members one after another (as
// pigz, bgzip and eStargz write them), names, comments, extra fields, and the header's
// own checksum. The CRC-32 and the length of each member are checked; workers sum up
// what they decode and the sums are combined in order. What follows the last member is treated as
// gzip(1) does: zeros, and two bytes or more that are not the magic, are ignored, and the
// source is read to its end; one single byte is a stream that was cut. Unlike gzip(1)
// the package does not know the formats of compress, pack, lzh and PKZIP.
//
// # Memory
//
// [Memory] gives a bound. A worker has two chunks at a time, with up to 8 slabs of 1
// MiB for output each. A chunk that needs more (zeros shrink to a thousandth) pauses, and
// goes on when all before it has been read, as fast as its output is released. So
// a Reader that nobody reads stops by itself. [WithMemory] asks before each further worker.
//
// # Caveats
//
//   - The source is read ahead by up to two chunks per worker, and in whole segments:
//     128 KiB first, up to 512 KiB then. Nothing is decoded of a segment before it is there.
//     Runs of stored blocks are read in steps of 32 KiB or less, without segments.
//   - Blocks with fixed codes and the last block of a member are not searched for. A
//     stream of nothing else, or with blocks larger than a chunk, is decoded
//     serially, by workers.
//   - Bytes are delivered before the checksum behind them has been seen. Only io.EOF
//     says that all was well.
//   - Preset dictionaries and raw or zlib streams are not offered.
package deflate
