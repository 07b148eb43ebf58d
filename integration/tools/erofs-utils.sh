#!/bin/bash
# usage: erofs-utils.sh TOOLS BIN
#
# Puts mkfs.erofs, fsck.erofs and dump.erofs 1.7 or later into BIN: links to the
# machine's own where these are new enough, and otherwise wrappers around those
# of Debian 13, unpacked into TOOLS/erofs with all the libraries they need, the C
# library too. Debian 12's 1.5 knows no blocks of 512 bytes. Nothing is installed:
# apt works in folders of its own, on the machine's mirror and with Debian's keyring.
# Fetches at most once; a second run finds what it needs in TOOLS.
set -euo pipefail

suite=trixie
programs=(mkfs.erofs fsck.erofs dump.erofs)
tools=$(mkdir -p "$1" && cd "$1" && pwd)
bin=$(mkdir -p "$2" && cd "$2" && pwd)
root=$tools/erofs

# new_enough reports whether the program says that it is of version 1.7 or later.
new_enough() {
	local version
	version=$("$1" -V 2>&1 | grep -oE '[0-9]+\.[0-9]+' | head -n 1) || return 1
	[ "$(printf '%s\n1.7\n' "$version" | sort -V | head -n 1)" = 1.7 ]
}

# use_installed links to the machine's own programs if all are new enough.
use_installed() {
	local p found
	local -a all=()
	for p in "${programs[@]}"; do
		found=$(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin command -v "$p") || return 1
		new_enough "$found" || return 1
		all+=("$found")
	done
	for p in "${all[@]}"; do
		ln -sfn "$p" "$bin/${p##*/}"
	done
}

# mirror prints the address of the Debian archive that this machine uses.
mirror() {
	local format='$(CREATED_BY) $(COMPONENT) $(RELEASE) $(REPO_URI)' release
	release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	apt-get indextargets --no-release-info --format "$format" | awk -v r="$release" '$1 == "Packages" && $2 == "main" && $3 == r { print $4; exit }'
}

# keyring prints the file of Debian's keys, those of the suite among them.
keyring() {
	local keys=/usr/share/keyrings/debian-archive-keyring.gpg
	if [ ! -e "/usr/share/keyrings/debian-archive-$suite-stable.gpg" ] && [ "$(id -u)" = 0 ]; then
		apt-get update -q >&2
		apt-get install -qy --no-install-recommends debian-archive-keyring >&2
	fi
	[ -e "$keys" ] || { echo "no keyring of Debian at $keys: apt-get install debian-archive-keyring" >&2; return 1; }
	echo "$keys"
}

# private_apt runs apt-get on the suite alone. As far as it knows nothing is
# installed, so that every library is among what it fetches.
private_apt() {
	apt-get -q -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" \
		-o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
		-o Dir::Etc::preferences=/dev/null -o APT::Sandbox::User=root -o APT::Get::AllowUnauthenticated=false \
		-o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false "$@"
}

fetch() {
	local uri keys deb
	uri=$(mirror)
	if [ -z "$uri" ]; then
		echo "this machine's apt names no Debian archive: install erofs-utils 1.7 or later" >&2
		return 1
	fi
	keys=$(keyring)
	work=$(mktemp -d "$tools/erofs.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/root"
	: >"$work/status"
	echo "deb [signed-by=$keys] $uri $suite main" >"$work/sources.list"
	private_apt update
	private_apt install --download-only --no-install-recommends -y erofs-utils
	for deb in "$work"/cache/archives/*.deb; do
		dpkg-deb -x "$deb" "$work/root"
	done
	rm -rf "$work/root/usr/share"
	rm -rf "$root"
	mv "$work/root" "$root"
}

# wrap writes one program of BIN. It finds its root from where it lies itself
# where it can, so that the folders can be moved or linked together.
wrap() {
	local p=$1 loader libraries
	loader=$(cd "$root" && find usr/lib* -name 'ld-linux*.so.*' | head -n 1)
	libraries=$(cd "$root" && find usr/lib -name 'libc.so.6' -printf '%h' -quit)
	[ -n "$loader" ] && [ -n "$libraries" ] && [ -x "$root/usr/bin/$p" ] || { echo "$root has no complete $p" >&2; return 1; }
	cat >"$bin/.$p" <<-END
		#!/bin/sh
		# Made by integration/tools/erofs-utils.sh.
		root="\$(dirname "\$(readlink -f "\$0")")/../tools/erofs"
		[ -d "\$root" ] || root=$(printf %q "$root")
		exec "\$root/$loader" --argv0 $p --library-path "\$root/$libraries" "\$root/usr/bin/$p" "\$@"
	END
	chmod 0755 "$bin/.$p"
	mv -f "$bin/.$p" "$bin/$p"
}

if ! use_installed; then
	[ -x "$root/usr/bin/mkfs.erofs" ] || fetch
	for p in "${programs[@]}"; do
		wrap "$p"
	done
fi
for p in "${programs[@]}"; do
	new_enough "$bin/$p" || { echo "$bin/$p does not run, or is older than 1.7" >&2; exit 1; }
done
"$bin/mkfs.erofs" -V 2>&1 | head -n 1
