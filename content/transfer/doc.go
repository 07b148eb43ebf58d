// Package transfer brings one blob from its hosts to a durable file.
//
// A transfer is known by digest and size. However many callers Join it, it runs once in this process and, by a file
// lock per folder, once among all processes that share the root. Its folder holds two files:
//
//	sha256-<hex>/data           the blob, sparse until it is complete
//	sha256-<hex>/state          an append-only log: which 256 KiB blocks are there, with a CRC-32C each
//	sha256-<hex>.<size>         the same for another size of that digest, see below
//	sha256-<hex>.<size>.<n>     private folders, n from 1: the same for processes whose holder is stuck
//	locks/<name of the folder>  flock: its exclusive holder alone writes data and state; shared while a finished blob is
//	                            in use. Its time is the holder's sign of life
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
// Blocks are recorded without fsync, and what is there of a block at every 64 KiB; bytes that come faster are written and
// recorded by up to 256 KiB. A kill costs of each connection what it has not recorded, less than one of them, beside what
// the kernel holds of it. After a crash, of the process or of the machine, a block counts only if the data on disk has
// the CRC of its record; so neither the order of write-back nor a torn record matters. A finished data file is fsynced before it is called complete, and is never written again:
// it may have hard links elsewhere.
//
// # Memory
//
// Of a blob that is unpacked as it arrives the page cache keeps only what its hash and its unpack have yet to read, and
// what is not on disk yet (behind.go). A blob that nobody reads, or that is read without Handle.Discard, stays there.
//
// # Between processes
//
// Whoever wants a blob looks at its folders in this order: a finished one is locked shared, verified, and used; else one
// whose holder makes progress is followed; else a free one is locked exclusively and completed, of several that with the
// most bytes; else, if all holders are stuck and there is a source to ask, the first private folder that is free.
//
// To follow is to read the state file as it grows. A block counts once its bytes match its record, because a holder that
// resumes has old records too that no data may belong to; the frontier moves over such blocks, and over the first part of
// one that is recorded in part. They are hashed as they are shown, so that at the end only the rest is read. A holder that
// finds bytes wrong begins a new state file, with a new generation; those who follow tell their readers ErrRestarted.
//
// The lock has no timeout: the kernel frees it when its holder ends, and whoever gets it goes on behind the last block.
// A holder is stuck when for Options.GiveUp neither a record was added nor the lock file's time changed. It sets that
// time while bytes arrive, and while it waits only for itself: for its turn, for a connection, for the hash or the disk.
//
// A waiter whose holder is stuck clones or copies what it has followed to a private folder, checks it there, and is a
// holder like any other, followed by later ones. Who finishes first has published: every holder looks once a second, and
// first of all when it gets a lock, whether another folder is complete. It then verifies that one, compares it with what
// its readers had, uses it, and removes its own folder.
//
// # Who removes what
//
//	a folder in which nobody completed the blob  its holder, after it took the blob from another folder or when the
//	                                             data was wrong; else Sweep, after Options.KeepPartial, and Forget
//	a finished folder                            the same two, unless another file links its data
//	a folder of bytes that are not kept          its process, when the transfer ends; else Sweep, at once
//	a lock file                                  whoever removes its folder, under that lock; Sweep, if there is no folder
//
// All of them need the exclusive lock, and a crash at any point leaves a folder or a lock file of a name that Sweep
// knows, private ones included. Manager.List shows what is left as PhaseKept.
//
// # Bytes that are not kept
//
// A transfer that was joined with JoinDiscarding gives up what its readers say that they need no more (Handle.Discard),
// once it is hashed: the range is punched out of the data file, and what the kernel has not written back by then never
// reaches the disk. ext4 from Linux 6.14 on, without data=journal, drops such pages; older ones and XFS write them back
// first, so there it saves space only. So that write-back does not come first, nothing starts it here and nothing is
// fsynced.
//
// Such a transfer works below discarding/<process>/<n>, where no other process looks, with a lock of the process beside
// the others in locks/; what lies there without a living process is removed by Sweep. It cannot be resumed. What nobody
// has begun to discard when it is complete is made durable by Handle.Keep, and then is like any other blob.
//
// # Two sizes for one digest
//
// Only one of them can be true, and the one that lies must not hold up the other. The first takes the folder
// sha256-<hex>; any other size works in sha256-<hex>.<size>, with its own lock, and ends when its hosts contradict
// it or its digest does not match.
package transfer
