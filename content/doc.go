// Package content is containerd's content store on disk, with a write session
// that can take a download over.
//
// # Layout
//
// The root is laid out as containerd's own local store lays it out, so that a
// node can switch to gantry and back without moving a byte:
//
//	blobs/<algorithm>/<hex>   complete, verified, immutable
//	ingest/<sha256 of ref>/   ref, data, startedat, updatedat, total: what a client writes
//	discarded/<algorithm>/<hex>  what is left of a blob whose bytes are not kept (record.go)
//
// The name of an ingest's folder is a hash, so no ref leads out of the root.
// One process owns a root; transfers may be shared, blobs/ never.
//
// # Visible and hidden
//
// containerd calls Info, Abort, STAT and COMMIT while it holds its database's
// write transaction, where an fsync would stop the whole daemon. So data becomes
// durable before: when the STAT that waits for a transfer answers, or when the
// WRITE that completes a declared size returns, the blob lies in blobs/, file
// and folder fsynced, but hidden. Info, Walk and ReaderAt show it from COMMIT
// on, which only flips a flag in memory. Whoever staged a hidden blob holds it;
// when the last holder is aborted it is unlinked. After a start everything in
// blobs/ is visible, and containerd's garbage collection removes what nobody
// owns.
//
// An ingest without a declared size is synced every 8 MiB, so that its COMMIT,
// which cannot know it is coming, finds little to sync.
//
// # Leaders and followers
//
// When no transfer brings a blob (there is none, or it failed) and several
// sessions want it, one of them leads: its STAT answers with what could be salvaged,
// by shared blocks where the file system can, and its client fetches the rest. The
// STATs of the others wait and show the leader's offset. When the leader's WRITE
// has completed the blob and it lies in blobs/, they hold it too. Who comes later
// follows at once. Where namespaces do not share content, each has its own leader.
//
// A turn ends with the blob, with the leader's session, its abort, bytes that are
// not the blob's, or when its client has written nothing for Options.GiveUp while
// nothing else kept it busy. Then the next follower leads and salvages what the
// turn before or the transfer has, whichever is longer. A leader waits for nobody, and
// one that was replaced may go on: who finishes first publishes, the other adopts.
// Whoever's bytes they are, every ingest is hashed from its first to its last one;
// after a mismatch nobody salvages what may have caused it.
//
// # Discarded blobs
//
// A transfer may give its bytes up as they are unpacked. Then what is placed, held,
// shown and deleted is a record and not a file in blobs/: size, where the bytes came
// from and a SHA-256 of each chunk. Info, Walk, Commit and Delete make no difference.
// A read transfers the blob again (refetch.go), and hands out nothing that the record
// does not vouch for; a client that writes the blob itself, and Restore, put a file
// in the record's place. The record goes when the file's name is durable; where a
// crash leaves both, the file counts. Records work whether or not more blobs are
// being discarded.
//
// # Labels
//
// containerd's metadata store keeps the labels of blobs. The ones given to
// Commit and Update here live in memory and are gone after a restart.
//
// # Locks
//
// Store.mu guards the two maps and is never held during I/O, a callback or a
// call to Fetcher, Transfer or Observer. Store.files serialises renames into
// and unlinks from blobs/, and is taken before mu. Session.mu comes before
// both. A follower waits with its own Session.mu alone. refetches.mu, held while a
// Refetcher is asked, comes before Store.mu. No goroutine is started by this package,
// but a timer lets go of blobs that were brought back.
package content
