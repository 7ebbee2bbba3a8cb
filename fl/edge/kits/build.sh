#!/usr/bin/env bash
# Build the device kits' cores and test them with the protocol's vectors: build.sh android|ios, or build.sh run COMMAND...
# All of it runs in a Debian tree of its own (build/kits/tools), made by mmdebstrap and entered by bubblewrap.
set -euo pipefail

kits=$(dirname "$(realpath "$0")")
project=$(realpath "$kits/../../..")
out=$project/build/kits
tools=$out/tools
packages=ca-certificates,default-jdk-headless,libbcprov-java,libssl-dev,swiftlang,zlib1g-dev
jar=/usr/share/java/bcprov.jar

make_tools() {
  [ -e "$tools.ready" ] && return
  for program in mmdebstrap bwrap; do
    command -v "$program" >/dev/null || { echo "kits: $program is missing: appliance/setup.sh mmdebstrap bubblewrap" >&2; exit 2; }
  done
  mkdir -p "$out"
  rm -rf "$tools"
  mmdebstrap --quiet --variant=apt --format=directory --aptopt='APT::Install-Recommends "false"' \
    --include="$packages" trixie "$tools" 'deb http://deb.debian.org/debian trixie main'
  touch "$tools.ready"
}

# The project is read-only in there; /out is the kits' own folder. It shares the host's loopback, for conversations.
enter() {
  bwrap --die-with-parent --unshare-pid --unshare-ipc --ro-bind "$tools" / --dev /dev --proc /proc --tmpfs /tmp \
    --ro-bind "$project" /mnt --bind "$out" /srv --setenv HOME /tmp --chdir /srv "$@"
}

android() {
  mkdir -p "$out/android"
  rm -rf "$out/android/classes"
  # Java 8's API is a part of what Android has from API 29 on.
  enter bash -c "javac --release 8 -Xlint:all,-options,-path -Werror -cp $jar -d android/classes \
    \$(find /mnt/fl/edge/kits/android/core/src -name '*.java')"
  enter java -cp "android/classes:$jar" org.sealwright.edge.VectorTests /mnt/tests/fl/edge/vectors android/made.json
}

ios() {
  enter swift build --package-path /mnt/fl/edge/kits/ios --scratch-path ios --cache-path ios/cache --disable-sandbox \
    -Xswiftc -warnings-as-errors
  enter ios/debug/EdgeTests vectors /mnt/tests/fl/edge/vectors ios/made.json
}

make_tools
case "${1:-}" in
  android | ios) "$1" ;;
  run) shift; enter "$@" ;;
  *) echo "usage: build.sh android|ios|run COMMAND..." >&2; exit 2 ;;
esac
