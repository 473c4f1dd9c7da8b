#!/bin/sh
# Installs from this folder alone, without a network: ./install.sh [PACKAGE...], as root. It trusts
# the key here; compare it with what you were told: gpg --show-keys dgx-kvm-archive-keyring.asc
set -eu
here=$(cd "$(dirname "$0")" && pwd)
[ $# -gt 0 ] || set -- dgx-kvm-sw
found=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ "$found" = @RELEASE@ ] ||
    { echo "install.sh: this is ${found:-unknown}, the packages here are for @RELEASE@; take that bundle" >&2; exit 1; }
(cd "$here" && sha256sum --quiet --strict -c SHA256SUMS) || exit 1 # names a file damaged on its way
state=$(mktemp -d) && trap 'rm -rf "$state"' EXIT
mkdir -p "$state/lists/partial" "$state/sources" && chmod -R a+rX "$state"
cp "$here/dgx-kvm-archive-keyring.asc" "$state/"
place=$(printf '%s\n' "$here" | sed 's/%/%25/g; s/ /%20/g; s/[&|\\]/\\&/g')
sed "s|^URIs: .*|URIs: copy:$place|; s|^Signed-By: .*|Signed-By: $state/dgx-kvm-archive-keyring.asc|" \
    "$here/dgx-kvm.sources" >"$state/sources/dgx-kvm.sources"
only="-oDir::Etc::sourcelist=/dev/null -oDir::Etc::sourceparts=$state/sources"
only="$only -oDir::State::lists=$state/lists -oDir::Cache::pkgcache= -oDir::Cache::srcpkgcache="
# shellcheck disable=SC2086 # options without spaces
apt-get $only -qq update && apt-get $only --no-install-recommends --yes install "$@"
