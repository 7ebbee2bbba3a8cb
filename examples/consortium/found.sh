#!/bin/sh
# Found a charter to practise on, in this folder: three members, one broker, one image, three places.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cp "$here"/*.toml .
for member in acme-pharma borealis-hospital cygnus-bio; do
    seal charter key "$member.key" --public "$member.pub" > /dev/null
done
seal broker init broker --name broker-1 --member acme-pharma --url https://127.0.0.1:8443 > /dev/null
seal charter release-policy --role site --name borealis > key.data.rego
seal charter init consortium.toml \
    --put images/demo.json=demo.toml \
    --put enrolments/server/server.json=server.toml \
    --put enrolments/site/borealis.json=borealis.toml \
    --put enrolments/site/cygnus.json=cygnus.toml \
    --put members/borealis-hospital/release/key.data.rego=key.data.rego \
    --out founding.json > founding.txt
for member in acme-pharma borealis-hospital; do
    seal charter sign founding.json --key "$member.key" --yes > /dev/null
done
seal charter publish founding.json --to charter --broker-key broker/keys/signing.pem
cp charter/metadata/1.root.json root.json
