// Package transfer brings one blob from its hosts to a durable file.
//
// A transfer is known by digest and size. However many callers Join it, it runs once in this process and, by a file
// lock per folder, once among all processes that share the root. Its folder holds two files:
//
//	sha256-<hex>/data    the blob, sparse until it is complete
//	sha256-<hex>/state   an append-only log: which 256 KiB blocks are there, with a CRC-32C each
//	locks/sha256-<hex>   flock: its exclusive holder alone writes data and state; shared while a finished blob is in use
//
// # Order and frontier
//
// Workers claim chunks in order and at most a bounded distance ahead of the frontier, the first missing byte. What
// lies below the frontier can be read at once, before the digest is known; a goroutine of its own hashes it in order.
// io.EOF of Handle.ReadAt and a nil from Handle.Wait come only after the digest was right. If it is wrong the blob is
// fetched again into a new file and readers get ErrRestarted.
//
// # Hosts
//
// Hosts belongs to the process: all transfers share what is known of a host, and the connections to it. How many a host
// gets is found out by what they bring (hosts.go); a free one goes to the image, then to the transfer, that has the
// fewest. A host that asks for rest gets it from all transfers, and one that is not there is not tried by each anew.
// The hosts of one tier share the chunks, in the order given, as far as they have room; the next tier waits until none
// of them is any good. A connection that crawls at the end, when nothing else is left to ask for, loses its tail to a
// better one.
//
// # Crashes
//
// Blocks are recorded without fsync, and what is there of a block at every 64 KiB. After a crash, of the process or of
// the machine, a block counts only if the data on disk has the CRC of its record; so neither the order of write-back
// nor a torn record matters. A finished data file is fsynced before it is called complete, and is never written again:
// it may have hard links elsewhere.
//
// # Two sizes for one digest
//
// Only one of them can be true, and the one that lies must not hold up the other. The first takes the folder
// sha256-<hex>; any other size works in sha256-<hex>.<size>, with its own lock, and ends when its hosts contradict
// it or its digest does not match.
package transfer
