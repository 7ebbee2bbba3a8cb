"""Three members on three hosts: from nothing, by commands alone, to a job. Only kits and public parts travel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from three_hosts import SEAL, Host, three_hosts, why_not

from appliance.demo.guests import wait_for_event
from appliance.demo.job import EXAMPLE
from appliance.processes import Processes

MEMBERS = ("acme-pharma", "borealis-hospital", "cygnus-bio")
PRODUCTS = dict(zip(MEMBERS, ("Genoa", "Milan", "Turin"), strict=True))
BROKER = "broker.acme-pharma.example"
SERVER = "fl.acme-pharma.example"
BROKER_AT = f"acme-broker=https://{BROKER}:8443"

SITE = """
[[deployment.guests]]
role = "site"
name = "{short}-site"
member = "{member}"
image = "fl"
vcpu_model = "EPYC-{product}"
server = "acme-server"
disks = ["data"]
resources = {{ data = "{member}/key/data" }}
"""
PLAN = f"""
name = "tumour-atlas"
platform = "virtual"
trust_domain = "virtual.tumour-atlas.example"
threshold = 2
members = [MEMBERS]
brokers = [{{ entry_file = "acme-pharma.broker.json" }}]
virtual_roots = [ROOTS]

[[deployment.images]]
name = "fl"
folder = "image"
source = "the builder's release page"

[[deployment.guests]]
role = "server"
name = "acme-server"
member = "acme-pharma"
image = "fl"
vcpu_model = "EPYC-Genoa"
listen = "0.0.0.0:9443"
address = "{SERVER}:9443"
resources = {{ model = "acme-pharma/key/model" }}

[[deployment.users]]
name = "ada"
member = "acme-pharma"
server = "acme-server"
request = "acme-pharma.ada.json"
rights = "lead"

[[deployment.hosts]]
address = "10.77.0.1"
names = ["{BROKER}", "{SERVER}"]
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with three_hosts(MEMBERS, tmp_path) as made:
        yield made


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path / "logs")
    try:
        yield running
    finally:
        running.stop_all()


def make_keys(hosts: list[Host], post: Path) -> None:
    """Each member's own keys and chip on its own host; public halves into the post."""
    for host in hosts:
        host.seal("charter", "key", "member.key", "--public", str(post / f"{host.name}.pub"))
        product = PRODUCTS[host.name]
        roots = json.loads(host.seal("vm", "vendor", "vendor", "--product", product, "--json"))["roots"]
        (post / f"{host.name}.roots.json").write_text(json.dumps(roots))
        host.seal("vm", "chip", "chip", "--vendor", "vendor", "--product", product)
    acme = hosts[0]
    at = ["--url", f"https://{BROKER}:8443", "--listen", "0.0.0.0:8443"]
    acme.seal("broker", "init", "broker", "--name", "acme-broker", "--member", "acme-pharma", *at)
    shutil.copy(acme.folder / "broker/entry.json", post / "acme-pharma.broker.json")
    acme.seal(
        "charter",
        "user",
        "ada",
        "--as",
        "acme-pharma/ada",
        "--trust-domain",
        "virtual.tumour-atlas.example",
        "--submits",
    )
    shutil.copy(acme.folder / "ada/request.json", post / "acme-pharma.ada.json")
    acme.seal("image", "keys", "builder")
    models = [word for product in PRODUCTS.values() for word in ("--vcpu-model", f"EPYC-{product}")]
    acme.seal("image", "generate", str(post / "image"), "--name", "fl", "--keys", "builder", *models)


def found(hosts: list[Host], post: Path) -> None:
    """The members found the charter, then admit the plan's places and the job's bundle."""
    acme = hosts[0]
    names = ", ".join(f'{{ name = "{name}", public_key_file = "{name}.pub" }}' for name in MEMBERS)
    roots = [root for name in MEMBERS for root in json.loads((post / f"{name}.roots.json").read_text())]
    pinned = ", ".join(
        f'{{ product = "{root["product"]}", ark_spki_sha256 = "{root["ark_spki_sha256"]}" }}' for root in roots
    )
    sites = "".join(
        SITE.format(short=name.partition("-")[0], member=name, product=PRODUCTS[name]) for name in MEMBERS[1:]
    )
    toml = post / "consortium.toml"
    toml.write_text(PLAN.replace("MEMBERS", names).replace("ROOTS", pinned) + sites)
    policies = []
    for host in hosts:
        role, resource = ("server", "model") if host is acme else ("site", "data")
        rules = host.seal("charter", "release-policy", "--role", role, "--member", host.name)
        (post / f"{host.name}.rego").write_text(rules)
        policies += ["--put", f"members/{host.name}/release/key.{resource}.rego={post}/{host.name}.rego"]
    acme.seal("charter", "init", str(toml), *policies, "--out", str(post / "founding.json"))
    signed_and_published(hosts, post, "founding.json")
    for host in hosts:
        shutil.copy(post / "charter/metadata/1.root.json", host.folder / "root.json")
    acme.seal("charter", "enrol", str(toml), "--charter", str(post / "charter"), "--out", str(post / "places.json"))
    signed_and_published(hosts, post, "places.json")
    acme.seal("job", "bundle", str(EXAMPLE / "job.py"), "--out", str(post / "bundle"))
    bundle = str(post / "bundle/job.bundle")
    acme.seal("charter", "approve", str(post / "charter"), bundle, "--out", str(post / "approval.json"))
    signed_and_published(hosts, post, "approval.json")
    words = [
        "--charter",
        str(post / "charter"),
        "--key",
        "member.key",
        "--out",
        str(post / "kits"),
        "--trust",
        "root.json",
    ]
    acme.seal("charter", "kit", str(toml), *words)


def signed_and_published(hosts: list[Host], post: Path, proposal: str) -> None:
    for host in hosts:
        host.seal("charter", "sign", str(post / proposal), "--key", "member.key", "--yes")
    hosts[0].seal("charter", "publish", str(post / proposal), "--to", str(post / "charter"))


def receive(host: Host, post: Path, kit: str, local: Path | None = None) -> Path:
    """The kit comes to its host, and what was made there comes into it."""
    target = host.folder / kit
    shutil.copytree(post / "kits" / kit, target)
    if local is None:
        (target / "local").mkdir()
        shutil.copytree(post / "image", target / "local/image")
        for name in ("vendor", "chip"):
            (host.folder / name).rename(target / "local" / name)
    else:
        local.rename(target / "local")
    if not (target / "local/root.json").exists():
        shutil.copy(host.folder / "root.json", target / "local/root.json")
    return target


def missing(host: Host, kit: Path, status: int) -> dict[str, str]:
    """What the doctor finds missing: check → what to do."""
    report = json.loads(host.seal("doctor", str(kit), "--json", status=status))
    return {finding["check"]: finding["do"] for finding in report["findings"] if not finding["ok"]}


@pytest.mark.long
def test_kits_bring_up_three_members_on_three_hosts(hosts: list[Host], processes: Processes, tmp_path: Path) -> None:
    post = tmp_path / "post"
    post.mkdir()
    make_keys(hosts, post)
    found(hosts, post)
    acme, *hospitals = hosts

    broker = receive(acme, post, "broker-acme-broker", acme.folder / "broker")
    wanted = missing(acme, broker, 1)
    assert wanted == {f"name {BROKER}": f"Add the line `10.77.0.1 {BROKER}` to /etc/hosts."}
    for host in hosts:
        with (host.folder / "hosts").open("a") as file:
            file.write(f"10.77.0.1 {BROKER} {SERVER}\n")
    assert missing(acme, broker, 0) == {}
    processes.start("broker", acme.command(*SEAL, "broker", "run", str(broker)))
    wait_for_event(processes.log_of("broker"), "ready")

    server = receive(acme, post, "server-acme-server")
    user = receive(acme, post, "user-acme-pharma-ada", acme.folder / "ada")
    put = ["--key", "member.key", "--broker", BROKER_AT, "--root", "root.json"]
    acme.seal("secret", "put", "acme-pharma/key/model", str(user / "local/model.key"), *put)
    assert missing(acme, server, 0) == {}
    processes.start("server", acme.command(*SEAL, "vm", "launch", str(server)))
    wait_for_event(processes.log_of("server"), "serving")

    for host in hospitals:
        kit = receive(host, post, f"site-{host.name.partition('-')[0]}-site")
        assert set(missing(host, kit, 1)) == {"disk data"}
        host.run(SEAL[0], str(EXAMPLE / "prepare.py"), "patients")
        host.seal("site", "key", "data.key")
        data = f"train.safetensors=patients/{host.name}/train.safetensors"
        host.seal("site", "seal", data, "--key", "data.key", "--out", str(kit / "local/disks/data"))
        host.seal("secret", "put", f"{host.name}/key/data", "data.key", *put)
        assert missing(host, kit, 0) == {}
        processes.start(kit.name, host.command(*SEAL, "vm", "launch", str(kit)))
    for host in hospitals:
        wait_for_event(processes.log_of(f"site-{host.name.partition('-')[0]}-site"), "joined")

    assert missing(acme, user, 0) == {}
    bundle = [str(post / "bundle/job.bundle"), "--model", str(post / "bundle/model.safetensors")]
    job = acme.seal("job", "submit", *bundle, "--kit", str(user)).strip()
    assert "finished" in acme.seal("job", "watch", job, "--kit", str(user))
    acme.seal("job", "download", job, "--kit", str(user), "--out", "result")
    assert (acme.folder / "result/model.safetensors").stat().st_size > 1000
    assert processes.dead() is None
