package config

import "time"

// field is one key of the file. The table of fields is the only place that
// knows keys: reading, checking, printing and the README's table follow it.
type field struct {
	key      string // dotted, as in an error message
	value    value
	fallback string // the default, in TOML's notation without quotes
	doc      string // one sentence or two, for the printed defaults and the README

	// A place that is not in the file is derived below parent.
	parent  *string
	derived string
}

// fields returns the keys of c's file, in the order in which they are printed:
// keys without a table first, then table by table.
func fields(c *Config) []field {
	return []field{
		{key: "root", value: path(&c.Root), fallback: "/var/lib/gantry",
			doc: "What outlives a reboot: blobs, layer files, snapshots. A folder of gantryd's own on a disk, not on overlayfs or tmpfs."},
		{key: "state", value: path(&c.State), fallback: "/run/gantry",
			doc: "What does not: the socket."},
		{key: "address", value: socket(&c.Address), parent: &c.State, derived: "gantry.sock",
			doc: "The unix socket (mode 0600) that containerd and `gantry status` connect to."},

		{key: "log.level", value: oneOf(&c.Log.Level, "trace", "debug", "info", "warn", "error"), fallback: "info",
			doc: "The least severe messages that are logged."},
		{key: "log.format", value: oneOf(&c.Log.Format, "text", "json"), fallback: "text",
			doc: "How a message is written to standard error."},

		{key: "containerd.address", value: path(&c.Containerd.Address), fallback: "/run/containerd/containerd.sock",
			doc: "containerd's own socket. gantryd asks there which registry an image came from; it starts and stays up without it."},
		{key: "containerd.content_sharing_policy", value: oneOf(&c.Containerd.ContentSharingPolicy, PolicyShared, PolicyIsolated), fallback: PolicyShared,
			doc: "Must equal content_sharing_policy of containerd's io.containerd.metadata.v1.bolt. With isolated, a transfer or a layer file serves only the namespaces that fetched it themselves."},

		{key: "content.root", value: path(&c.Content.Root), parent: &c.Root, derived: "content",
			doc: "Complete blobs, laid out as containerd's own store lays them out. Set it to containerd's own folder (io.containerd.content.v1.content) on a node that has images."},
		{key: "content.retain", value: oneOf(&c.Content.Retain, RetainAll, RetainNone), fallback: RetainAll,
			doc: "What becomes of the compressed bytes of layers that gantry fetched and unpacked. all: they are kept. none: they are discarded as they are unpacked, and fetched again if somebody reads them."},

		{key: "transfer.root", value: path(&c.Transfer.Root), parent: &c.Root, derived: "transfers",
			doc: "Blobs that are being fetched. Must be on the file system of content.root."},
		{key: "transfer.chunk_size", value: size(&c.Transfer.ChunkSize, 1<<20, 64<<20), fallback: "0",
			doc: "Bytes that one request asks a registry for. 0: 1MiB to 64MiB, by what is left of the blob and how fast the registry is."},
		{key: "transfer.connections_per_host", value: count(&c.Transfer.ConnectionsPerHost, 1, 256), fallback: "32",
			doc: "The most requests to one registry host at once, over all blobs. How many it gets below that is found out by how much more they bring."},
		{key: "transfer.connections", value: count(&c.Transfer.Connections, 1, 1024), fallback: "64",
			doc: "The most requests to all hosts together."},
		{key: "transfer.keep_partial", value: duration(&c.Transfer.KeepPartial, time.Minute, 365*24*time.Hour), fallback: "24h",
			doc: "How long a partial download that nobody asks for is kept for a retry."},
		{key: "transfer.give_up", value: duration(&c.Transfer.GiveUp, time.Second, 2*time.Minute), fallback: "2m",
			doc: "How long a download may stand still before it is left to containerd's own fetch. The kubelet cancels a pull after 5m."},

		{key: "registry.config_path", value: optionalPath(&c.Registry.ConfigPath), fallback: "/etc/containerd/certs.d",
			doc: "The hosts.toml folders that containerd uses too. Empty: none."},
		{key: "registry.credentials", value: optionalPath(&c.Registry.Credentials), fallback: "/root/.docker/config.json",
			doc: "Docker's config.json with logins and credential helpers, read anew for each login. Need not exist. Empty: none."},

		{key: "unpack.workers", value: count(&c.Unpack.Workers, 0, 1024), fallback: "0",
			doc: "Layers that are unpacked at once. 0: 8, or the number of CPUs if that is more: most of them wait for bytes."},

		{key: "snapshotter.mount", value: oneOf(&c.Snapshotter.Mount, "auto", "file", "loop", "directory"), fallback: "auto",
			doc: "How a layer is mounted: EROFS from plain files (Linux 6.12), EROFS through loop devices, or unpacked into a directory. auto: the first of these that works."},
		{key: "snapshotter.upper", value: oneOf(&c.Snapshotter.Upper, "directory", "file"), fallback: "directory",
			doc: "Where a new container's changes are kept: in a directory, which may fill the disk, or in a sparse file with an ext4 file system (needs mkfs.ext4), which is full when upper_size is."},
		{key: "snapshotter.upper_size", value: fixedSize(&c.Snapshotter.UpperSize, 16<<20, 1<<40), fallback: "10GiB",
			doc: "The size of such a file. The label containerd.io/snapshot/max-size (bytes) of a container's snapshot overrides it."},
	}
}
