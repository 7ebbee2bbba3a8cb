#!/usr/bin/env bash
# Install the system packages named as arguments by apt where that is possible, else print the one line to run.
set -euo pipefail

missing=()
for package in "$@"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ]; then
  apt-get -qq update >/dev/null && apt-get -qq install -y "${missing[@]}" >/dev/null && exit 0
elif sudo -n true 2>/dev/null; then
  sudo apt-get -qq update >/dev/null && sudo apt-get -qq install -y "${missing[@]}" >/dev/null && exit 0
fi
echo "setup: system packages are missing. Run this line, then the same make target again:" >&2
echo "  sudo apt-get install -y ${missing[*]}" >&2
exit 1
