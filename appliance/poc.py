"""All services of production on one machine, for one author: broker, server and sites on the virtual platform.

For a job of devices there are gateways in the place of sites, and inner nodes if wished; then the guests can also be
booted, as machines, from a built image. One member stands for all: it decides alone, so nothing here protects anybody
from anybody. What runs is what runs in a consortium: the same charter, kits, attestation, approval, sandboxes and
sealed results.
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

from appliance.demo.founding import approvable
from appliance.demo.guests import BOOT_SECONDS, EVALUATOR, START_SECONDS, wait_for_event
from appliance.demo.setting import HOST_SEEN_BY_GUEST, free_ports, now
from appliance.demo.verbs import Verbs
from appliance.kits.starting import CHIP, DISKS, VENDOR
from appliance.kits.starting import IMAGE as IMAGE_FOLDER
from appliance.processes import Processes
from fl.edge.task import DeviceTask
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
GROUP_KEY: Final = f"{MEMBER}/key/gateways"
ISSUER: Final = "devices"
"""Who lets devices in, and its key's file."""
APPROVAL_DAYS: Final = 7
APPROVED_RUNS: Final = 100
MAX_GUESTS: Final = 64
NO_DATA: Final = "no-data.txt"
BOOTED_BROKER_PORT: Final = 9443
BOOTED_PORTS: Final[Mapping[str, int]] = {"server": 8443, "inner": 8444, "gateway": 8445}
"""What the image's packet filter lets through (`cvm_image/recipes/fl.toml`): one booted guest of each role."""


@dataclass(frozen=True)
class Place:
    """A guest: `parent` is the guest that it joins, `port` where it listens, on the host as in itself."""

    role: str
    name: str
    parent: str | None = None
    port: int | None = None

    @property
    def address(self) -> str:
        """Where others on this machine reach it."""
        return f"127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Poc:
    """A proof of concept: where it lies and who takes part. Everything is made anew in `folder`, which is empty."""

    folder: Path
    sites: Sequence[str]
    data: Mapping[str, Path]
    """Each site's folder of data; a site without one has a file that says so."""
    bundles: Sequence[Path]
    gateways: Sequence[str] = ()
    inner: Sequence[str] = ()
    """Inner nodes between gateways and server; every gateway is below one of them, in turn."""
    booted: Path | None = None
    """The built image that the guests boot as machines; None: guests are processes of a generated image."""

    @property
    def kit(self) -> Path:
        """The author's kit."""
        return self.folder / f"user-{MEMBER}-{USER}"

    @property
    def issuer_key(self) -> Path:
        """The private key of the devices' issuer."""
        return self.folder / f"{ISSUER}.key"

    def for_devices(self, gateways: Mapping[str, str]) -> dict[str, object]:
        """What devices begin with: where gateways are, the root that they pin, who issues tokens, by which key."""
        if not gateways:
            return {}
        return {
            "gateways": {name: f"https://{address}" for name, address in gateways.items()},
            "root": str(self.folder / ROOT),
            "issuer": ISSUER,
            "issuer_key": str(self.issuer_key),
        }

    @contextmanager
    def running(self) -> Iterator[tuple[Processes, Mapping[str, str]]]:
        """Found it and start everything; leaving the context ends it all. Gives the processes, and where each gateway
        listens. Raises Refused, Unusable.
        """
        broker_port, places = self._placed()
        seal, processes = Verbs(self.folder), Processes(self.folder / "logs")
        try:
            self._found(seal, places, broker_port)
            self._deliver(seal, places)
            self._start(processes, BROKER, "broker", "run", self.folder / f"broker-{BROKER}")
            wait_for_event(processes.log_of(BROKER), "ready")
            self._deposit(seal, broker_port)
            for place in places:
                self._start(processes, place.name, "vm", "launch", self.kit_of(place))
            patience = BOOT_SECONDS if self.booted else START_SECONDS * (1 + len(places) / 2)
            for place in places:
                ready = "joined" if place.role == "site" else "serving"
                wait_for_event(processes.log_of(place.name), ready, within=patience)
            yield processes, {place.name: place.address for place in places if place.role == "gateway"}
        finally:
            processes.stop_all()
            seal.close()

    def kit_of(self, place: Place) -> Path:
        """A guest's kit."""
        return self.folder / f"{place.role}-{place.name}"

    def _placed(self) -> tuple[int, tuple[Place, ...]]:
        """The broker's port, and every guest."""
        names = [*self.sites, *self.inner, *self.gateways]
        if not 1 <= len(names) <= MAX_GUESTS or len({SERVER, *names}) != len(names) + 1:
            what = f"there must be 1 to {MAX_GUESTS} sites or nodes, each with its own name"
            raise Unusable(what, where="--site, --gateway, --inner", do="Name them.")
        if self.inner and not self.gateways:
            raise Unusable("inner nodes are above gateways", where="--inner", do="Name a --gateway.")
        if self.booted is not None and (self.sites or len(self.inner) > 1 or len(self.gateways) > 1):
            what = "the image's packet filter has a port for one inner node and one gateway"
            raise Unusable(what, where="--vm", do="Name one of each, and no site.")
        if self.booted is None:
            broker_port, *ports = free_ports(2 + len(self.inner) + len(self.gateways))
        else:
            broker_port, ports = BOOTED_BROKER_PORT, [BOOTED_PORTS["server"]]
            ports += [BOOTED_PORTS["inner"] for _ in self.inner] + [BOOTED_PORTS["gateway"] for _ in self.gateways]
        free = iter(ports)
        places = [Place("server", SERVER, None, next(free))]
        places += [Place("site", name, SERVER) for name in self.sites]
        places += [Place("inner", name, SERVER, next(free)) for name in self.inner]
        parents = self.inner or (SERVER,)
        for number, name in enumerate(self.gateways):
            places.append(Place("gateway", name, parents[number % len(parents)], next(free)))
        return broker_port, tuple(places)

    def _start(self, processes: Processes, name: str, *words: object) -> None:
        command = [sys.executable, "-m", "appliance.cli", *map(str, words)]
        processes.start(name, command, lasting=EVALUATOR)

    def _found(self, seal: Verbs, places: Sequence[Place], broker_port: int) -> None:
        """Keys, chips, an image, the charter with every place and every bundle."""
        home, at = self.folder, f"127.0.0.1:{broker_port}"
        key = home / "member.key"
        seal("charter", "key", key, "--public", home / "member.pub")
        broker = ("--name", BROKER, "--member", MEMBER, "--url", f"https://{at}", "--listen", at)
        seal("broker", "init", home / "broker", *broker)
        seal("charter", "user", home / USER, "--as", f"{MEMBER}/{USER}", "--trust-domain", TRUST_DOMAIN, "--submits")
        roots = json.loads(seal("vm", "vendor", home / "vendor", "--product", PRODUCT, "--json"))["roots"]
        chips = {}
        for place in places:
            words = (home / f"{place.name}.chip", "--vendor", home / "vendor", "--product", PRODUCT, "--json")
            chips[place.name] = str(json.loads(seal("vm", "chip", *words))["chip_id"])
        if self.booted is None:
            seal("image", "keys", home / "builder")
            generated = ("--name", IMAGE, "--keys", home / "builder", "--vcpu-model", f"EPYC-{PRODUCT}")
            seal("image", "generate", home / "image", *generated)
        else:
            approvable(self.booted)
            (home / "image").symlink_to(self.booted)
        plan = home / "consortium.toml"
        plan.write_text("\n".join(self._plan(roots, chips, broker_port, places)) + "\n", "utf-8")
        policies: list[object] = []
        for resource, who in self._resources().items():
            rules = home / f"{resource.replace('/', '.')}.rego"
            rules.write_text(seal("charter", "release-policy", *who, "--member", MEMBER))
            policies += ["--put", f"{release_path(resource)}={rules}"]
        seal("charter", "init", plan, *policies, "--out", home / "founding.json")
        self._publish(seal, home / "founding.json")
        shutil.copy(home / "charter/metadata/1.root.json", home / ROOT)
        approvals = [word for path in self.bundles for word in self._approval(read_bundle(path))]
        if self.gateways:
            seal("charter", "key", self.issuer_key, "--public", home / f"{ISSUER}.pub")
            (home / f"{ISSUER}.toml").write_text(f'member = "{MEMBER}"\nsigning_key_file = "{ISSUER}.pub"\n')
            approvals += ["--put", f"enrolments/device-issuer/{ISSUER}.json={home / f'{ISSUER}.toml'}"]
        seal("charter", "enrol", plan, "--charter", home / "charter", *approvals, "--out", home / "places.json")
        self._publish(seal, home / "places.json")

    def _publish(self, seal: Verbs, proposal: Path) -> None:
        root = self.folder / ROOT
        trust = ("--trust", root) if root.exists() else ()
        seal("charter", "sign", proposal, "--key", self.folder / "member.key", *trust, "--yes")
        seal("charter", "publish", proposal, "--to", self.folder / "charter")
        signing = self.folder / "broker/keys/signing.pem"
        seal("charter", "timestamp", self.folder / "charter", "--broker-key", signing)

    def _approval(self, bundle: Bundle) -> list[str]:
        """A bundle's approval; and, for a job of devices, that of what they run."""
        at, settings = self.folder / f"{bundle.digest}.approval.toml", bundle.settings
        edge = settings.recipe == "fedbuff"
        takers = [*self.inner, *self.gateways] if edge else list(self.sites)
        ends = f'note = "a proof of concept"\nexpires = {format_time(now() + timedelta(days=APPROVAL_DAYS))}\n'
        at.write_text(
            f'job = "{settings.name}"\nsites = {json.dumps(takers)}\n{ends}'
            f"budget = {{ bits = {capacity(bundle, len(takers)).job * APPROVED_RUNS} }}\n"
        )
        words = ["--put", f"code/{bundle.digest}.json={at}"]
        if edge:
            task = DeviceTask.of(bundle)
            file = self.folder / f"{task.digest}.task.toml"
            file.write_text(f'job = "{settings.name}"\n{ends}')
            words += ["--put", f"code/device-{task.digest}.json={file}"]
        return words

    def _resources(self) -> dict[str, tuple[str, ...]]:
        """Each resource, and to which guest its policy gives it."""
        sites = {f"{MEMBER}/key/data-{site}": ("--role", "site", "--name", site) for site in self.sites}
        gateways = {GROUP_KEY: ("--role", "gateway", "--max-releases", "1000000")} if self.gateways else {}
        return {MODEL_KEY: ("--role", "server"), **sites, **gateways}

    def _deliver(self, seal: Verbs, places: Sequence[Place]) -> None:
        """Kits, each where it will run, with what its host made and its site's sealed data."""
        home, out = self.folder, self.folder / "kits"
        signed = ("--key", home / "member.key", "--trust", home / ROOT)
        seal("charter", "kit", home / "consortium.toml", "--charter", home / "charter", *signed, "--out", out)
        for kit in sorted(out.iterdir()):
            shutil.move(kit, home / kit.name)
        shutil.move(home / "broker", home / f"broker-{BROKER}" / LOCAL)
        shutil.move(home / USER, self.kit / LOCAL)
        for place in places:
            local = self.kit_of(place) / LOCAL
            (local / DISKS).mkdir(parents=True)
            (local / IMAGE_FOLDER).symlink_to(home / "image")
            copy = shutil.copytree if (home / "vendor").is_dir() else shutil.copy
            copy(home / "vendor", local / VENDOR)
            shutil.move(home / f"{place.name}.chip", local / CHIP)
        for kit in (home / f"broker-{BROKER}", self.kit, *map(self.kit_of, places)):
            shutil.copy(home / ROOT, kit / LOCAL / ROOT)
        for place in places:
            if place.role == "site":
                self._seal_data(seal, place)

    def _seal_data(self, seal: Verbs, place: Place) -> None:
        site = place.name
        key = self.folder / f"{site}.data.key"
        seal("site", "key", key)
        files = sorted(path for path in self.data[site].iterdir() if path.is_file()) if site in self.data else []
        if not files:
            nothing = self.folder / NO_DATA
            nothing.write_text("This site was given no data.\n")
            files = [nothing]
        disk = self.kit_of(place) / LOCAL / DISKS / "data"
        seal("site", "seal", *(f"{path.name}={path}" for path in files), "--key", key, "--out", disk)

    def _deposit(self, seal: Verbs, broker_port: int) -> None:
        """The keys go to the broker, signed by the member."""
        words = ("--key", self.folder / "member.key", "--root", self.folder / ROOT)
        at = ("--broker", f"{BROKER}=https://127.0.0.1:{broker_port}")
        seal("secret", "put", MODEL_KEY, self.kit / LOCAL / "model.key", *words, *at)
        for site in self.sites:
            seal("secret", "put", f"{MEMBER}/key/data-{site}", self.folder / f"{site}.data.key", *words, *at)
        if self.gateways:
            seal("site", "group-key", self.folder / "group.key")
            seal("secret", "put", GROUP_KEY, self.folder / "group.key", *words, *at)

    def _plan(
        self,
        roots: Sequence[Mapping[str, str]],
        chips: Mapping[str, str],
        broker_port: int,
        places: Sequence[Place],
    ) -> Iterator[str]:
        yield f'name = "{MEMBER}"\nplatform = "virtual"\ntrust_domain = "{TRUST_DOMAIN}"\nthreshold = 1'
        yield f'\n[[members]]\nname = "{MEMBER}"\npublic_key_file = "member.pub"'
        yield '\n[[brokers]]\nentry_file = "broker/entry.json"'
        for root in roots:
            yield f'\n[[virtual_roots]]\nproduct = "{root["product"]}"'
            yield f'ark_spki_sha256 = "{root["ark_spki_sha256"]}"'
        yield f'\n[[deployment.images]]\nname = "{IMAGE}"\nfolder = "image"\nsource = "this folder"'
        yield f"roles = {json.dumps(sorted({place.role for place in places}))}"
        yield f'\n[[deployment.brokers]]\nname = "{BROKER}"\nlisten = "127.0.0.1:{broker_port}"'
        at = {place.name: place for place in places}
        for place in places:
            yield f'\n[[deployment.guests]]\nrole = "{place.role}"\nname = "{place.name}"\nmember = "{MEMBER}"'
            yield f'image = "{IMAGE}"\nvcpu_model = "EPYC-{PRODUCT}"\nchips = ["{chips[place.name]}"]'
            if place.port is not None:
                listens = place.address if self.booted is None else f"0.0.0.0:{place.port}"
                yield f'listen = "{listens}"\naddress = "{place.address}"'
            if place.parent is not None:
                yield f'server = "{place.parent}"'
            if place.role == "server":
                yield f'resources = {{ model = "{MODEL_KEY}" }}'
            elif place.role == "site":
                yield f'disks = ["data"]\nresources = {{ data = "{MEMBER}/key/data-{place.name}" }}'
            elif place.role == "gateway":
                yield f'resources = {{ group = "{GROUP_KEY}" }}'
            if self.booted is not None:
                yield "vcpus = 1\nmemory_mib = 3072"
                yield f'reaches = [{{ name = "{BROKER}", url = "https://{HOST_SEEN_BY_GUEST}:{broker_port}" }}]'
                if place.parent is not None:
                    yield f'server_at = "{HOST_SEEN_BY_GUEST}:{at[place.parent].port}"'
        yield f'\n[[deployment.users]]\nname = "{USER}"\nmember = "{MEMBER}"\nserver = "{SERVER}"'
        yield f'request = "{USER}/request.json"\nrights = "lead"'


def read_bundle(path: Path) -> Bundle:
    """A bundle's file. Raises Unusable, MalformedMessage."""
    try:
        with path.open("rb") as file:
            return parse_bundle(file.read(MAX_BUNDLE + 1))
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}", where="--bundle", do="Name a job.bundle.") from error
