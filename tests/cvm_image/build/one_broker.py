"""One member with one broker, who enrolled one guest: found by the verbs of `seal`, for guests that are booted."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SEAL = [sys.executable, "-m", "appliance.cli"]
MEMBER, BROKER, GUEST = "acme-pharma", "acme-broker", "acme-server"
MODEL_KEY = f"{MEMBER}/key/model"
VAULT = f"{MEMBER}/vault-server/{GUEST}"
BOOT_SECONDS = 300.0
PLAN = """
name = "probing"
platform = "virtual"
trust_domain = "virtual.probing.example"
threshold = 1
members = [{{ name = "acme-pharma", public_key_file = "member.pub" }}]
brokers = [{{ entry_file = "broker/entry.json" }}]
virtual_roots = [{roots}]

[[deployment.images]]
name = "probe"
folder = "{image}"
source = "the builder"

[[deployment.brokers]]
name = "acme-broker"
listen = "127.0.0.1:{port}"

[[deployment.guests]]
role = "server"
name = "acme-server"
member = "acme-pharma"
image = "probe"
vcpu_model = "EPYC-v4"
vcpus = 1
memory_mib = 512
listen = "0.0.0.0:8443"
address = "127.0.0.1:8443"
disks = ["vault", "wish"]
resources = {{ model = "acme-pharma/key/model", vault = "{vault}" }}
reaches = [{{ name = "acme-broker", url = "https://10.0.2.2:{port}" }}]
"""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def seal(folder: Path, *words: object) -> str:
    """Run `seal` in `folder` and return what it printed."""
    done = subprocess.run(
        [*SEAL, *map(str, words)],
        cwd=folder, env=_environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"seal {' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


@dataclass(frozen=True)
class Consortium:
    """Where everything lies. The guest's kit holds the init-data that were enrolled."""

    folder: Path
    image: Path

    @property
    def init_data(self) -> Path:
        """The enrolled init-data."""
        return self.folder / "kits" / f"server-{GUEST}" / "init-data.toml"

    def sign(self, proposal: str) -> None:
        """The member signs, and the broker puts the time on it."""
        trust = ("--trust", "root.json") if (self.folder / "root.json").exists() else ()
        seal(self.folder, "charter", "sign", proposal, "--key", "member.key", *trust, "--yes")
        seal(self.folder, "charter", "publish", proposal, "--to", "charter")
        seal(self.folder, "charter", "timestamp", "charter", "--broker-key", "broker/keys/signing.pem")

    @contextmanager
    def booted(self, name: str, line: Sequence[str] | None = None, **how: Any) -> Iterator[Booted]:
        """Start the guest (`boot_line`, or another program that does) and yield it; it is ended in the end."""
        log = self.folder / f"{name}.log"
        words = list(line) if line is not None else self.boot_line(name, **how)
        with log.open("wb") as output:
            process = subprocess.Popen(
                words,
                cwd=self.folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        guest = Booted(process, log)
        try:
            yield guest
        finally:
            process.terminate()
            process.wait(30)

    def boot_line(
        self,
        name: str,
        *,
        image: Path | None = None,
        init_data: Path | None = None,
        wish: str = "",
        vault: Path | None = None,
        chip: str = "chip",
        id_block: bool = True,
    ) -> list[str]:
        """`seal vm boot` with the guest's disks; a new vault's disk is made where there is none."""
        disk = vault or self.folder / "vault.img"
        if not disk.exists():
            seal(self.folder, "vm", "vault", disk, "--size", "48")
        (self.folder / f"{name}.wish").write_bytes(wish.encode().ljust(512, b"\0"))
        words = ["vm", "boot", str(image or self.image), "--init-data", str(init_data or self.init_data)]
        words += ["--vendor", "vendor", "--chip", chip, "--run", f"{name}.run", "--memory", "512"]
        words += ["--disk", f"vault={disk}", "--disk", f"wish={self.folder / f'{name}.wish'}"]
        return [*SEAL, *words, *([] if id_block else ["--no-id-block"])]


@dataclass(frozen=True)
class Booted:
    """A guest under way: its process and console."""

    process: subprocess.Popen[bytes]
    log: Path

    def console(self) -> str:
        """Everything that it has said."""
        return self.log.read_text(errors="replace")

    def events(self) -> dict[str, Mapping[str, Any]]:
        """The last line of each event."""
        lines = [line for line in self.console().splitlines() if line.startswith('{"event"') and line.endswith("}")]
        return {event["event"]: event for event in map(json.loads, lines)}

    def wait(self, event: str | None = None, *, within: float = BOOT_SECONDS) -> dict[str, Mapping[str, Any]]:
        """Wait for an event, or until the machine is off; return the events."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            events = self.events()
            if ended or (event is not None and event in events):
                assert event is None or event in events, self.console()[-3000:]
                return events
            time.sleep(0.1)
        raise AssertionError(f"{event or 'the end'} did not come within {within:.0f} s:\n{self.console()[-3000:]}")


def found(folder: Path, image: Path, port: int, *, plan: str = PLAN, more: Sequence[str] = ()) -> Consortium:
    """Make keys, charter, enrolment and kits in `folder`; the guest's plan may name `more` resources of its own."""
    made = Consortium(folder, image)
    seal(folder, "charter", "key", "member.key", "--public", "member.pub")
    at = ("--url", f"https://127.0.0.1:{port}", "--listen", f"127.0.0.1:{port}")
    seal(folder, "broker", "init", "broker", "--name", BROKER, "--member", MEMBER, *at)
    roots = json.loads(seal(folder, "vm", "vendor", "vendor", "--product", "Milan", "--json"))["roots"]
    listed = ", ".join(
        f'{{ product = "{root["product"]}", ark_spki_sha256 = "{root["ark_spki_sha256"]}" }}' for root in roots
    )
    for chip in ("chip", "chip2"):
        seal(folder, "vm", "chip", chip, "--vendor", "vendor", "--product", "Milan")
    (folder / "consortium.toml").write_text(plan.format(roots=listed, image=image, port=port, vault=VAULT))
    put = []
    for resource in (MODEL_KEY, VAULT, *more):
        rules = folder / f"{resource.replace('/', '.')}.rego"
        rules.write_text(seal(folder, "charter", "release-policy", "--role", "server"))
        _, kind, tag = resource.split("/")
        put += ["--put", f"members/{MEMBER}/release/{kind}.{tag}.rego={rules}"]
    seal(folder, "charter", "init", "consortium.toml", *put, "--out", "founding.json")
    made.sign("founding.json")
    shutil.copy(folder / "charter/metadata/1.root.json", folder / "root.json")
    seal(folder, "charter", "enrol", "consortium.toml", "--charter", "charter", "--out", "places.json")
    made.sign("places.json")
    words = ("--charter", "charter", "--key", "member.key", "--trust", "root.json", "--out", "kits")
    seal(folder, "charter", "kit", "consortium.toml", *words)
    shutil.move(folder / "broker", folder / "kits" / f"broker-{BROKER}" / "local")
    shutil.copy(folder / "root.json", folder / "kits" / f"broker-{BROKER}" / "local/root.json")
    return made


@contextmanager
def running_broker(made: Consortium, key: bytes, more: Sequence[str] = ()) -> Iterator[None]:
    """Run the broker, with the model's key deposited at it, also under the names in `more`."""
    kit = made.folder / "kits" / f"broker-{BROKER}"
    with (made.folder / "broker.log").open("wb") as output:
        line = [*SEAL, "broker", "run", str(kit)]
        broker = subprocess.Popen(line, cwd=made.folder, env=_environment(), stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while b'"ready"' not in (made.folder / "broker.log").read_bytes():
            ended = broker.poll() is not None or time.monotonic() > deadline
            assert not ended, (made.folder / "broker.log").read_text()
            time.sleep(0.1)
        (made.folder / "model.key").touch(mode=0o600)
        (made.folder / "model.key").write_bytes(key)
        url = json.loads((kit / "local/entry.json").read_text())["url"]
        words = ("--key", "member.key", "--root", "root.json", "--broker", f"{BROKER}={url}")
        for resource in (MODEL_KEY, *more):
            seal(made.folder, "secret", "put", resource, "model.key", *words)
        yield
    finally:
        broker.terminate()
        broker.wait(30)
