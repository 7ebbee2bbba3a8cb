"""All services of production on one machine, for one author: broker, server and sites on the virtual platform.

One member stands for all: it decides alone, so nothing here protects anybody from anybody. What runs is what runs in a
consortium: the same charter, kits, attestation, approval, sandboxes and sealed results.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from appliance.demo.guests import EVALUATOR, START_SECONDS, wait_for_event
from appliance.demo.setting import free_ports, now
from appliance.demo.verbs import Verbs
from appliance.kits.starting import CHIP, DISKS, VENDOR
from appliance.kits.starting import IMAGE as IMAGE_FOLDER
from appliance.processes import Processes
from fl.jobs.bundle import MAX_BUNDLE, Bundle, parse_bundle
from fl.jobs.outputs import capacity
from policies.charter.layout import release_path
from policies.errors import Unusable
from policies.forms import format_time
from policies.kits import LOCAL, ROOT

MEMBER: Final = "poc"
USER: Final = "scientist"
BROKER: Final = "poc-broker"
SERVER: Final = "poc-server"
IMAGE: Final = "fl"
PRODUCT: Final = "Genoa"
TRUST_DOMAIN: Final = "virtual.poc.example"
MODEL_KEY: Final = f"{MEMBER}/key/model"
APPROVAL_DAYS: Final = 7
APPROVED_RUNS: Final = 100
MAX_SITES: Final = 64
NO_DATA: Final = "no-data.txt"


@dataclass(frozen=True)
class Poc:
    """A proof of concept: where it lies and who takes part. Everything is made anew in `folder`, which is empty."""

    folder: Path
    sites: Sequence[str]
    data: Mapping[str, Path]
    """Each site's folder of data; a site without one has a file that says so."""
    bundles: Sequence[Path]

    @property
    def kit(self) -> Path:
        """The author's kit."""
        return self.folder / f"user-{MEMBER}-{USER}"

    def _kit_of(self, guest: str) -> Path:
        return self.folder / (f"server-{guest}" if guest == SERVER else f"site-{guest}")

    @contextmanager
    def running(self) -> Iterator[Processes]:
        """Found it and start everything; leaving the context ends it all. Raises Refused, Unusable."""
        if not 1 <= len(self.sites) <= MAX_SITES or len(set(self.sites)) != len(self.sites):
            what = f"there must be 1 to {MAX_SITES} sites, each with its own name"
            raise Unusable(what, where="--site", do="Name them.")
        seal, processes = Verbs(self.folder), Processes(self.folder / "logs")
        ports = free_ports(2)
        try:
            self._found(seal, *ports)
            self._deliver(seal)
            self._start(processes, BROKER, "broker", "run", self.folder / f"broker-{BROKER}")
            wait_for_event(processes.log_of(BROKER), "ready")
            self._deposit(seal, ports[0])
            for guest in (SERVER, *self.sites):
                self._start(processes, guest, "vm", "launch", self._kit_of(guest))
            for guest in (SERVER, *self.sites):
                ready = "serving" if guest == SERVER else "joined"
                wait_for_event(processes.log_of(guest), ready, within=START_SECONDS * (1 + len(self.sites) / 2))
            yield processes
        finally:
            processes.stop_all()
            seal.close()

    def _start(self, processes: Processes, name: str, *words: object) -> None:
        command = [sys.executable, "-m", "appliance.cli", *map(str, words)]
        processes.start(name, command, lasting=EVALUATOR)

    def _found(self, seal: Verbs, broker_port: int, server_port: int) -> None:
        """Keys, chips, an image, the charter with every place and every bundle."""
        home, at = self.folder, f"127.0.0.1:{broker_port}"
        key = home / "member.key"
        seal("charter", "key", key, "--public", home / "member.pub")
        broker = ("--name", BROKER, "--member", MEMBER, "--url", f"https://{at}", "--listen", at)
        seal("broker", "init", home / "broker", *broker)
        seal("charter", "user", home / USER, "--as", f"{MEMBER}/{USER}", "--trust-domain", TRUST_DOMAIN, "--submits")
        roots = json.loads(seal("vm", "vendor", home / "vendor", "--product", PRODUCT, "--json"))["roots"]
        chips = {}
        for guest in (SERVER, *self.sites):
            words = (home / f"{guest}.chip", "--vendor", home / "vendor", "--product", PRODUCT, "--json")
            chips[guest] = str(json.loads(seal("vm", "chip", *words))["chip_id"])
        seal("image", "keys", home / "builder")
        generated = ("--name", IMAGE, "--keys", home / "builder", "--vcpu-model", f"EPYC-{PRODUCT}")
        seal("image", "generate", home / "image", *generated)
        plan = home / "consortium.toml"
        plan.write_text("\n".join(self._plan(roots, chips, broker_port, server_port)) + "\n", "utf-8")
        policies: list[object] = []
        for resource, who in self._resources().items():
            rules = home / f"{resource.replace('/', '.')}.rego"
            rules.write_text(seal("charter", "release-policy", *who, "--member", MEMBER))
            policies += ["--put", f"{release_path(resource)}={rules}"]
        seal("charter", "init", plan, *policies, "--out", home / "founding.json")
        self._publish(seal, home / "founding.json")
        shutil.copy(home / "charter/metadata/1.root.json", home / ROOT)
        approvals = [word for path in self.bundles for word in self._approval(read_bundle(path))]
        seal("charter", "enrol", plan, "--charter", home / "charter", *approvals, "--out", home / "places.json")
        self._publish(seal, home / "places.json")

    def _publish(self, seal: Verbs, proposal: Path) -> None:
        root = self.folder / ROOT
        trust = ("--trust", root) if root.exists() else ()
        seal("charter", "sign", proposal, "--key", self.folder / "member.key", *trust, "--yes")
        seal("charter", "publish", proposal, "--to", self.folder / "charter")
        signing = self.folder / "broker/keys/signing.pem"
        seal("charter", "timestamp", self.folder / "charter", "--broker-key", signing)

    def _approval(self, bundle: Bundle) -> tuple[str, str]:
        file = self.folder / f"{bundle.digest}.approval.toml"
        file.write_text(
            f'job = "{bundle.settings.name}"\nsites = {json.dumps(list(self.sites))}\nnote = "a proof of concept"\n'
            f"expires = {format_time(now() + timedelta(days=APPROVAL_DAYS))}\n"
            f"budget = {{ bits = {capacity(bundle, len(self.sites)).job * APPROVED_RUNS} }}\n"
        )
        return "--put", f"code/{bundle.digest}.json={file}"

    def _resources(self) -> dict[str, tuple[str, ...]]:
        """Each resource, and to which guest its policy gives it."""
        sites = {f"{MEMBER}/key/data-{site}": ("--role", "site", "--name", site) for site in self.sites}
        return {MODEL_KEY: ("--role", "server"), **sites}

    def _deliver(self, seal: Verbs) -> None:
        """Kits, each where it will run, with what its host made and its site's sealed data."""
        home, out = self.folder, self.folder / "kits"
        signed = ("--key", home / "member.key", "--trust", home / ROOT)
        seal("charter", "kit", home / "consortium.toml", "--charter", home / "charter", *signed, "--out", out)
        for kit in sorted(out.iterdir()):
            shutil.move(kit, home / kit.name)
        shutil.move(home / "broker", home / f"broker-{BROKER}" / LOCAL)
        shutil.move(home / USER, self.kit / LOCAL)
        for guest in (SERVER, *self.sites):
            local = self._kit_of(guest) / LOCAL
            (local / DISKS).mkdir(parents=True)
            (local / IMAGE_FOLDER).symlink_to(home / "image")
            copy = shutil.copytree if (home / "vendor").is_dir() else shutil.copy
            copy(home / "vendor", local / VENDOR)
            shutil.move(home / f"{guest}.chip", local / CHIP)
        for kit in (home / f"broker-{BROKER}", self.kit, *map(self._kit_of, (SERVER, *self.sites))):
            shutil.copy(home / ROOT, kit / LOCAL / ROOT)
        for site in self.sites:
            self._seal_data(seal, site)

    def _seal_data(self, seal: Verbs, site: str) -> None:
        key = self.folder / f"{site}.data.key"
        seal("site", "key", key)
        files = sorted(path for path in self.data[site].iterdir() if path.is_file()) if site in self.data else []
        if not files:
            nothing = self.folder / NO_DATA
            nothing.write_text("This site was given no data.\n")
            files = [nothing]
        disk = self._kit_of(site) / LOCAL / DISKS / "data"
        seal("site", "seal", *(f"{path.name}={path}" for path in files), "--key", key, "--out", disk)

    def _deposit(self, seal: Verbs, broker_port: int) -> None:
        """The keys go to the broker, signed by the member."""
        words = ("--key", self.folder / "member.key", "--root", self.folder / ROOT)
        at = ("--broker", f"{BROKER}=https://127.0.0.1:{broker_port}")
        seal("secret", "put", MODEL_KEY, self.kit / LOCAL / "model.key", *words, *at)
        for site in self.sites:
            seal("secret", "put", f"{MEMBER}/key/data-{site}", self.folder / f"{site}.data.key", *words, *at)

    def _plan(
        self, roots: Sequence[Mapping[str, str]], chips: Mapping[str, str], broker_port: int, server_port: int
    ) -> Iterator[str]:
        yield f'name = "{MEMBER}"\nplatform = "virtual"\ntrust_domain = "{TRUST_DOMAIN}"\nthreshold = 1'
        yield f'\n[[members]]\nname = "{MEMBER}"\npublic_key_file = "member.pub"'
        yield '\n[[brokers]]\nentry_file = "broker/entry.json"'
        for root in roots:
            yield f'\n[[virtual_roots]]\nproduct = "{root["product"]}"'
            yield f'ark_spki_sha256 = "{root["ark_spki_sha256"]}"'
        yield f'\n[[deployment.images]]\nname = "{IMAGE}"\nfolder = "image"\nsource = "this folder"'
        yield f'\n[[deployment.brokers]]\nname = "{BROKER}"\nlisten = "127.0.0.1:{broker_port}"'
        for guest in (SERVER, *self.sites):
            role = "server" if guest == SERVER else "site"
            yield f'\n[[deployment.guests]]\nrole = "{role}"\nname = "{guest}"\nmember = "{MEMBER}"\nimage = "{IMAGE}"'
            yield f'vcpu_model = "EPYC-{PRODUCT}"\nchips = ["{chips[guest]}"]'
            if guest == SERVER:
                address = f"127.0.0.1:{server_port}"
                yield f'listen = "{address}"\naddress = "{address}"\nresources = {{ model = "{MODEL_KEY}" }}'
            else:
                data = f"{MEMBER}/key/data-{guest}"
                yield f'server = "{SERVER}"\ndisks = ["data"]\nresources = {{ data = "{data}" }}'
        yield f'\n[[deployment.users]]\nname = "{USER}"\nmember = "{MEMBER}"\nserver = "{SERVER}"'
        yield f'request = "{USER}/request.json"\nrights = "lead"'


def read_bundle(path: Path) -> Bundle:
    """A bundle's file. Raises Unusable, MalformedMessage."""
    try:
        with path.open("rb") as file:
            return parse_bundle(file.read(MAX_BUNDLE + 1))
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}", where="--bundle", do="Name a job.bundle.") from error
