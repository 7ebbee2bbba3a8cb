"""From nothing to kits on every host, by the verbs that a consortium uses (docs/tutorials/found-a-consortium.md).

Each member works in its own folder; files that are needed elsewhere are copied into `shared`, as members would send
them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final

from appliance.demo.setting import (
    BOOTED_SERVER_PORT,
    BROKER_THRESHOLD,
    BROKERS,
    GUESTS,
    HOST_SEEN_BY_GUEST,
    IMAGE,
    MEMBERS,
    MODEL_KEY,
    MODEL_SHARES,
    OWNER,
    PRODUCTS,
    SCIENTIST,
    SERVER,
    SITES,
    Setting,
    broker_of,
    data_key,
    guest_kit,
    member_of,
    now,
    role_of,
    vcpu_model,
)
from appliance.kits.starting import CHIP, DISKS, VENDOR
from appliance.kits.starting import IMAGE as IMAGE_FOLDER
from cvm_image.manifest import ImageManifest
from cvm_image.verify import load_image
from policies.charter import read_store, write_store
from policies.charter.layout import release_path, split_path
from policies.errors import Refused, Unusable
from policies.forms import format_time
from policies.kits import LOCAL, ROOT

TRUST_DOMAIN: Final = "virtual.oncology.example"
THRESHOLD: Final = 2
APPROVAL_DAYS: Final = 30
LEASE_SECONDS: Final = 30
"""Half of the default, so that the end of a revoked job is not waited for long."""
SERVED_SECONDS: Final = 30.0
"""How long brokers may take to notice a newer charter."""
SIGNERS: Final = MEMBERS[:THRESHOLD]
"""Who signs what two members may decide."""


def found_consortium(setting: Setting) -> None:
    """Everybody makes keys at home; they write down who they are and where things stand; all sign the charter."""
    setting.shared.mkdir(mode=0o700)
    for member in MEMBERS:
        setting.home(member).mkdir(mode=0o700)
        setting.seal("charter", "key", setting.member_key(member), "--public", setting.shared / f"{member}.pub")
    for broker in BROKERS:
        _make_broker(setting, broker)
    _make_user(setting)
    chips = {guest: _make_chip(setting, guest) for guest in GUESTS}
    if setting.booted is None:
        _make_image(setting)
    else:
        approvable(setting.booted)
    setting.plan.write_text("\n".join(_plan(setting, chips)) + "\n", "utf-8")
    proposal = setting.shared / "founding.json"
    policies = [word for resource in resources() for word in _release_policy(setting, resource)]
    setting.seal("charter", "init", setting.plan, *policies, "--out", proposal)
    sign_and_publish(setting, proposal, MEMBERS)
    for member in MEMBERS:
        shutil.copy(setting.charter_folder / "metadata/1.root.json", setting.home(member) / ROOT)
    shutil.copy(setting.charter_folder / "metadata/1.root.json", setting.folder / ROOT)


def admit(setting: Setting, bundles: Mapping[str, tuple[str, int]]) -> None:
    """Two members sign for the image, the three guests' places, the scientist, and the jobs' bundles.

    `bundles`: by digest the job's name, and how many bits its jobs may let out of each member's sites.
    """
    words: list[str] = []
    for digest, (job, bits) in bundles.items():
        approval = setting.shared / f"{job}.approval.toml"
        approval.write_text(
            f'job = "{job}"\nsites = {json.dumps(list(SITES))}\nnote = "reviewed by two members"\n'
            f"expires = {format_time(now() + timedelta(days=APPROVAL_DAYS))}\n"
            f"budget = {{ bits = {bits} }}\n"
        )
        words += ["--put", f"code/{digest}.json={approval}"]
    proposal = setting.shared / "places.json"
    setting.seal("charter", "enrol", setting.plan, "--charter", setting.charter_folder, *words, "--out", proposal)
    sign_and_publish(setting, proposal, SIGNERS)


def sign_and_publish(setting: Setting, proposal: Path, signers: tuple[str, ...]) -> None:
    """Members sign a proposal, each at home; it becomes the charter, and as many brokers as it asks for put the time
    on it."""
    for member in signers:
        root = setting.home(member) / ROOT
        trust = ("--trust", root) if root.exists() else ()
        setting.seal("charter", "sign", proposal, "--key", setting.member_key(member), *trust, "--yes")
    setting.seal("charter", "publish", proposal, "--to", setting.charter_folder)
    for broker in list(BROKERS)[:BROKER_THRESHOLD]:
        key = _broker_home(setting, broker) / "keys/signing.pem"
        setting.seal("charter", "timestamp", setting.charter_folder, "--broker-key", key)


def deliver(setting: Setting) -> list[str]:
    """One member makes the kits; each goes to its host, which adds what it made itself. The kits' names."""
    key = ("--key", setting.member_key(OWNER), "--trust", setting.home(OWNER) / ROOT)
    out = setting.shared / "kits"
    setting.seal("charter", "kit", setting.plan, "--charter", setting.charter_folder, *key, "--out", out)
    made = sorted(path.name for path in out.iterdir())
    for broker in BROKERS:
        own = _broker_home(setting, broker)
        shutil.move(out / f"broker-{broker}", setting.broker_kit(broker))
        shutil.move(own, setting.broker_kit(broker) / LOCAL)
        shutil.copy(setting.home(BROKERS[broker]) / ROOT, setting.broker_kit(broker) / LOCAL / ROOT)
    for guest in GUESTS:
        home, kit = setting.home(member_of(guest)), setting.guest_kit(guest)
        shutil.move(out / guest_kit(guest), kit)
        (kit / LOCAL / DISKS).mkdir(parents=True)
        (kit / LOCAL / IMAGE_FOLDER).symlink_to(setting.image)
        shutil.copy(home / ROOT, kit / LOCAL / ROOT)
        shutil.move(home / f"{guest}.vendor", kit / LOCAL / VENDOR)
        shutil.move(home / f"{guest}.chip", kit / LOCAL / CHIP)
    shutil.move(out / setting.kit.name, setting.kit)
    shutil.move(setting.home(OWNER) / SCIENTIST, setting.kit / LOCAL)
    shutil.copy(setting.home(OWNER) / ROOT, setting.kit / LOCAL / ROOT)
    return made


def seal_site_data(setting: Setting, plain: Mapping[str, bytes]) -> None:
    """Each hospital encrypts its patients' file under a key of its own, as the disk of its guest. `plain`: by site."""
    for site, content in plain.items():
        home = setting.home(member_of(site))
        setting.seal("site", "key", home / "data.key")
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:  # noqa: S108
            patients = Path(scratch) / "train.safetensors"
            patients.write_bytes(content)
            disk = setting.guest_kit(site) / LOCAL / DISKS / "data"
            setting.seal("site", "seal", f"{patients.name}={patients}", "--key", home / "data.key", "--out", disk)


def deposit_keys(setting: Setting) -> None:
    """Each hospital deposits its key at its own broker, signed by its own hand."""
    for site in SITES:
        owner = member_of(site)
        words = ("--key", setting.member_key(owner), "--root", setting.home(owner) / ROOT)
        at = _address(setting, broker_of(owner))
        setting.seal("secret", "put", data_key(site), setting.home(owner) / "data.key", *words, "--broker", at)


def split_model_key(setting: Setting) -> None:
    """The model's owner splits its key over all brokers, so that none of them holds it; two members sign that."""
    home, proposal, document = setting.home(OWNER), setting.shared / "split.json", setting.shared / "model.split.json"
    at = [word for broker in BROKERS for word in ("--broker", _address(setting, broker))]
    words = ("--key", setting.member_key(OWNER), "--root", home / ROOT, "--k", MODEL_SHARES, "--out", document)
    setting.seal("secret", "split", MODEL_KEY, setting.kit / LOCAL / "model.key", *words, *at)
    put = ("--put", f"{split_path(MODEL_KEY)}={document}", "--out", proposal)
    setting.seal("charter", "propose", setting.charter_folder, *put, "--trust", home / ROOT)
    sign_and_publish(setting, proposal, SIGNERS)
    serve_charter(setting)


def serve_charter(setting: Setting) -> None:
    """Each broker's operator copies the charter as it was published; wait until all of them serve it."""
    store, version = read_store(setting.charter_folder), setting.charter().version
    for broker in BROKERS:
        write_store(setting.broker_kit(broker) / LOCAL / "charter", store)
    deadline = time.monotonic() + SERVED_SECONDS
    for broker in BROKERS:
        root = setting.home(BROKERS[broker]) / ROOT
        while (
            json.loads(setting.seal("broker", "check", _address(setting, broker), "--root", root, "--json"))["charter"][
                "version"
            ]
            < version
        ):
            if time.monotonic() > deadline:
                raise Refused(
                    f"{broker} does not serve version {version} of the charter",
                    where=str(setting.broker_kit(broker)),
                    do="Read its log.",
                )
            time.sleep(0.1)


def _address(setting: Setting, broker: str) -> str:
    return f"{broker}={setting.broker(broker).url}"


def resources() -> tuple[str, ...]:
    """What is deposited at brokers: the model's key, and each hospital's."""
    return (MODEL_KEY, *(data_key(site) for site in SITES))


def approvable(image: Path) -> ImageManifest:
    """The manifest of a built image. Raises Unusable unless it is the one that the demonstration can approve."""
    manifest = load_image(image)
    if (manifest.name, manifest.platform) != (IMAGE, "virtual"):
        raise Unusable(
            f"the image is {manifest.name} for the {manifest.platform} platform, not {IMAGE} for the virtual one",
            where=str(image),
            do="Make it: make image",
        )
    return manifest


# --- what is made at home -------------------------------------------------------------------------------------------


def _broker_home(setting: Setting, broker: str) -> Path:
    """A broker's own folder: where `seal broker init` made it, or the `local` of its kit."""
    kit = setting.broker_kit(broker)
    return kit / LOCAL if kit.exists() else setting.home(BROKERS[broker]) / broker


def _make_broker(setting: Setting, broker: str) -> None:
    at = f"127.0.0.1:{setting.broker_ports[broker]}"
    words = ("--name", broker, "--member", BROKERS[broker], "--url", f"https://{at}", "--listen", at)
    own = _broker_home(setting, broker)
    setting.seal("broker", "init", own, *words)
    shutil.copy(own / "entry.json", setting.shared / f"{broker}.json")


def _make_user(setting: Setting) -> None:
    keys = setting.home(OWNER) / SCIENTIST
    words = ("--as", f"{OWNER}/{SCIENTIST}", "--trust-domain", TRUST_DOMAIN, "--submits")
    setting.seal("charter", "user", keys, *words)
    shutil.copy(keys / "request.json", setting.shared / f"{SCIENTIST}.json")


def _make_chip(setting: Setting, guest: str) -> str:
    """A virtual processor for a guest's host, with a vendor of its own; the chip's id."""
    home, product = setting.home(member_of(guest)), PRODUCTS[guest].value
    vendor = home / f"{guest}.vendor"
    roots = setting.seal("vm", "vendor", vendor, "--product", product, "--json")
    (setting.shared / f"{guest}.roots.json").write_text(roots)
    made = setting.seal("vm", "chip", home / f"{guest}.chip", "--vendor", vendor, "--product", product, "--json")
    return str(json.loads(made)["chip_id"])


def _make_image(setting: Setting) -> None:
    keys = setting.home(OWNER) / "builder"
    models = [word for product in dict.fromkeys(PRODUCTS.values()) for word in ("--vcpu-model", vcpu_model(product))]
    setting.seal("image", "keys", keys)
    setting.seal("image", "generate", setting.image, "--name", IMAGE, "--keys", keys, *models)


def _release_policy(setting: Setting, resource: str) -> tuple[str, str]:
    """An owner's rules for its resource, as the words that put them into the charter."""
    if resource == MODEL_KEY:
        who = ["--role", "server", "--member", OWNER]
    else:
        site = next(site for site in SITES if data_key(site) == resource)
        who = ["--role", "site", "--name", site, "--member", member_of(site)]
    file = setting.shared / f"{resource.replace('/', '.')}.rego"
    file.write_text(setting.seal("charter", "release-policy", *who))
    return "--put", f"{release_path(resource)}={file}"


# --- consortium.toml ------------------------------------------------------------------------------------------------


def _plan(setting: Setting, chips: Mapping[str, str]) -> Iterator[str]:
    """The lines of consortium.toml: what members sign, then the plan of their hosts."""
    yield 'name = "oncology"\nplatform = "virtual"'
    yield f'trust_domain = "{TRUST_DOMAIN}"\nthreshold = {THRESHOLD}\nlease_seconds = {LEASE_SECONDS}'
    if BROKER_THRESHOLD > 1:
        yield f"broker_threshold = {BROKER_THRESHOLD}"
    for member in MEMBERS:
        yield f'\n[[members]]\nname = "{member}"\npublic_key_file = "{member}.pub"'
    for broker in BROKERS:
        yield f'\n[[brokers]]\nentry_file = "{broker}.json"'
    for guest in GUESTS:
        for root in json.loads((setting.shared / f"{guest}.roots.json").read_text())["roots"]:
            yield f'\n[[virtual_roots]]\nproduct = "{root["product"]}"'
            yield f'ark_spki_sha256 = "{root["ark_spki_sha256"]}"'
    folder, source = ("image", "the shared folder") if setting.booted is None else (str(setting.booted), "make image")
    yield f'\n[[deployment.images]]\nname = "{IMAGE}"\nfolder = "{folder}"\nsource = "{source}"'
    for broker, port in setting.broker_ports.items():
        yield f'\n[[deployment.brokers]]\nname = "{broker}"\nlisten = "127.0.0.1:{port}"'
    for guest in GUESTS:
        yield from _planned_guest(setting, guest, chips[guest])
    yield f'\n[[deployment.users]]\nname = "{SCIENTIST}"\nmember = "{OWNER}"\nserver = "{SERVER}"'
    yield f'request = "{SCIENTIST}.json"\nrights = ["submit", "view", "download"]'


def _planned_guest(setting: Setting, guest: str, chip: str) -> Iterator[str]:
    yield f'\n[[deployment.guests]]\nrole = "{role_of(guest)}"\nname = "{guest}"\nmember = "{member_of(guest)}"'
    yield f'image = "{IMAGE}"\nvcpu_model = "{vcpu_model(PRODUCTS[guest])}"\nchips = ["{chip}"]'
    address = f"127.0.0.1:{setting.server_port}"
    if guest == SERVER:
        listen = address if setting.booted is None else f"0.0.0.0:{BOOTED_SERVER_PORT}"
        yield f'listen = "{listen}"\naddress = "{address}"\nresources = {{ model = "{MODEL_KEY}" }}'
    else:
        yield f'server = "{SERVER}"\ndisks = ["data"]\nresources = {{ data = "{data_key(guest)}" }}'
    if setting.booted is not None:
        urls = {name: f"https://{HOST_SEEN_BY_GUEST}:{port}" for name, port in setting.broker_ports.items()}
        listed = ", ".join(f'{{ name = "{name}", url = "{url}" }}' for name, url in urls.items())
        yield f"vcpus = 1\nmemory_mib = 3072\nreaches = [{listed}]"
        if guest != SERVER:
            yield f'server_at = "{HOST_SEEN_BY_GUEST}:{BOOTED_SERVER_PORT}"'
