"""What a kit's host lacks before anything of it starts: `seal doctor KIT`.

The steps go in the order in which one would mend them. Each looks and changes nothing; each has one thing to do.
"""

from __future__ import annotations

import errno
import socket
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from appliance import doctor
from appliance.doctor import Finding
from appliance.kits import firmware
from appliance.kits.making import host_of
from appliance.kits.starting import CHIP, DISKS, IMAGE, VENDOR, broker_key_problem, image_reasons
from attestation.connection import FetchedCharter, fetch_charter
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb
from attestation.verifier.appraisal_policy import load_appraisal_policy
from cvm_image.qemu import VAULT
from policies.errors import KitRefused, SealwrightError
from policies.forms import format_time
from policies.keys import load_private_key, public_pem, read_secret
from policies.kits import LOCAL, ROOT, KitImage, SignedKit, charter_reasons, open_signed_kit

CLOCK_TOLERANCE_SECONDS: Final = 30
ANSWER_SECONDS: Final = 5.0
"""How long a broker or a server may take to answer a probe."""
_GPU_VENDOR: Final = "0x10de"


def diagnose_kit(folder: Path, *, trust: bytes | None = None) -> list[Finding]:
    """Look at everything that the kit in `folder` needs on this host.

    If the kit itself is refused, its reasons are all there is: nothing that it says may be believed then.
    """
    try:
        kit = open_signed_kit(folder, trust=trust)
    except KitRefused as error:
        return [Finding("kit", False, reason, error.do) for reason in error.reasons]
    pinned = trust is not None or (folder / LOCAL / ROOT).is_file()
    return [finding for step in _steps(kit, folder, pinned=pinned) for finding in step]


def _steps(kit: SignedKit, folder: Path, *, pinned: bool) -> Iterator[Iterator[Finding]]:
    yield _kit(kit, pinned=pinned)
    yield (check() for check in _host_checks(kit))
    local = folder / LOCAL
    if kit.manifest.role == "broker":
        yield _broker_keys(kit, local)
    elif kit.manifest.role == "user":
        yield _user_keys(kit, local)
    elif kit.manifest.image is not None:
        yield _platform(kit, local, kit.manifest.image)
        yield _image(kit, local, kit.manifest.image)
        yield _disks(kit, local)
    yield _ports(kit)
    yield _names(kit)
    if kit.manifest.role != "broker":
        yield _broker(kit)
        yield _server(kit)


def _kit(kit: SignedKit, *, pinned: bool) -> Iterator[Finding]:
    manifest = kit.manifest
    made = f"{manifest.place}, {len(kit.files)} files as signed by {kit.signer} on {format_time(manifest.made)}"
    yield Finding("kit", True, made)
    how = "the one whose root you trust" if pinned else "compare this id with your member's signers"
    yield Finding(
        "charter", True, f"{manifest.charter}, version {manifest.charter_version}, {manifest.platform}: {how}"
    )


def _host_checks(kit: SignedKit) -> list[Callable[[], Finding]]:
    checks: list[Callable[[], Finding]] = [doctor.python_version, doctor.hybrid_kem]
    role, hardware = kit.manifest.role, kit.manifest.platform == "hardware"
    if role in {"broker", "user"}:
        return checks
    if hardware:
        return [*checks, doctor.kvm_device, doctor.snp_host, doctor.sev_device, doctor.qemu]
    if role == "site":
        checks.append(doctor.bubblewrap)
    return [*checks, doctor.erofs_tools, doctor.verity_tools, doctor.memory]


# --- the platform and what is started on it -------------------------------------------------------------------------


def _platform(kit: SignedKit, local: Path, image: KitImage) -> Iterator[Finding]:
    if kit.manifest.platform == "virtual":
        yield from _virtual(kit, local)
    else:
        yield _firmware(kit)
    if image.gpus:
        yield _gpus(image.gpus)


def _virtual(kit: SignedKit, local: Path) -> Iterator[Finding]:
    from attestation.virtual.chip import load_chip
    from attestation.virtual.vendor import load_vendor

    try:
        vendor = load_vendor(local / VENDOR)
        chip = load_chip(local / CHIP)
    except SealwrightError as error:
        do = (
            f"Make them: `seal vm vendor {local / VENDOR}` and `seal vm chip {local / CHIP} --vendor {local / VENDOR}`."
        )
        yield Finding("virtual chip", False, error.what, do)
        return
    yield Finding("virtual chip", True, f"{chip.product.value} {chip.chip_id.hex()[:16]}…")
    root = vendor.authorities[chip.product].ark_spki_sha256 if chip.product in vendor.authorities else ""
    named = {(one.product, one.ark_spki_sha256) for one in kit.charter.consortium.virtual_roots}
    yield Finding(
        "virtual vendor",
        (chip.product.value, root) in named,
        f"root for {chip.product.value} {root[:16]}…",
        f"The charter must name it: virtual_roots, product {chip.product.value}, ark_spki_sha256 {root}. "
        "Or take the vendor that it names.",
    )
    place = kit.charter.enrolment(kit.manifest.role, kit.manifest.name)
    if place is not None and place.chips is not None:
        enrolled = chip.chip_id.hex() in place.chips or chip.chip_id.hex()[:16] in place.chips
        do = "Start it on the chip that is enrolled, or have this one enrolled."
        yield Finding("enrolled chip", enrolled, f"{len(place.chips)} enrolled", do)
    yield _tcb_finding(kit, chip.product, chip.tcb, "the chip's firmware")


def _firmware(kit: SignedKit) -> Finding:
    try:
        status = firmware.read_status()
    except OSError as error:
        do = "Load the ccp module as root, and update the firmware (fwupd, or the board's maker)."
        return Finding("SNP firmware", False, f"it does not answer: {error.strerror}", do)
    version = ".".join(map(str, status.api))
    if not (status.running and status.rmp):
        do = "Switch on SNP and the RMP in the firmware's setup, and boot with kvm_amd.sev_snp=1."
        return Finding("SNP firmware", False, f"{version}, SNP is not initialised", do)
    product = firmware.host_product(Path("/proc/cpuinfo").read_text("utf-8"))
    if product is None:
        return Finding("SNP firmware", False, f"{version}, on a processor that is none of Milan, Genoa, Turin", "")
    return _tcb_finding(kit, product, status.tcb(product), f"firmware {version}")


def _tcb_finding(kit: SignedKit, product: Product, tcb: Tcb, what: str) -> Finding:
    """Whether a broker will take this patch level: the charter's own floor, where it sets one."""
    text = kit.charter.policy("appraisal.toml")
    floor = None if text is None else load_appraisal_policy(text).cpu.tcb.of(product).reported
    ok = floor is None or tcb.at_least(floor.tcb)
    wanted = "" if floor is None else f", the charter asks for {floor.tcb}"
    return Finding(
        "SNP firmware", ok, f"{what}: {tcb}{wanted}", "Update the host's firmware; the charter admits no older."
    )


def _gpus(wanted: int) -> Finding:
    found = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        bound = (device / "driver").resolve().name if (device / "driver").exists() else ""
        found += vendor == _GPU_VENDOR and kind.startswith("0x03") and bound == "vfio-pci"
    do = "Switch the GPUs to confidential computing mode and bind them to vfio-pci."
    return Finding("GPUs for guests", found >= wanted, f"{found} of {wanted} NVIDIA GPUs are bound to vfio-pci", do)


def _image(kit: SignedKit, local: Path, image: KitImage) -> Iterator[Finding]:
    reasons = image_reasons(local / IMAGE, image)
    do = f"Get the image {image.name} from {image.source}; place it, or a link to it, at {local / IMAGE}."
    if not reasons:
        yield Finding("image", True, f"{image.name}, manifest {image.manifest_sha256[:16]}…")
    for reason in reasons:
        yield Finding("image", False, reason, do)


def _disks(kit: SignedKit, local: Path) -> Iterator[Finding]:
    for name in kit.manifest.disks:
        path = local / DISKS / name
        there = path.is_file()
        seen = f"{path.stat().st_size} bytes" if there else f"nothing at {path}"
        how = f"Seal the data there: `seal site seal … --out {path}`."
        do = f"Make it: `seal vm vault {path}`." if name == VAULT else how
        yield Finding(f"disk {name}", there, seen, do)


# --- keys -----------------------------------------------------------------------------------------------------------


def _broker_keys(kit: SignedKit, local: Path) -> Iterator[Finding]:
    entry = kit.charter.broker(kit.manifest.name)
    problem = "the charter has no such broker" if entry is None else broker_key_problem(local, entry)
    do = f"Move the folder that `seal broker init` made on this host to {local}."
    yield Finding("broker's keys", problem is None, problem or "signing key as in the charter", do)
    for name in ("keys/signing.pem", "keys/issuer.pem", "keys/kek") if (local / "keys").is_dir() else ():
        yield _secret(local / name)


def _user_keys(kit: SignedKit, local: Path) -> Iterator[Finding]:
    do = f"Move the folder that `seal charter user` made on this machine to {local}."
    for name in ("tls.key", "signing.key", "results.key") if local.is_dir() else ():
        yield _secret(local / name)
    user = kit.charter.user(kit.manifest.member, kit.manifest.name)
    try:
        own = public_pem(load_private_key(local / "signing.key"))
        certificate = (local / "tls.pem").read_text("ascii")
    except (OSError, UnicodeDecodeError, SealwrightError) as error:
        yield Finding("your keys", False, getattr(error, "what", str(error)), do)
        return
    same = user is not None and (own, certificate) == (user.signing_key, user.tls_certificate)
    seen = "as in the charter" if same else "not the ones in the charter"
    yield Finding("your keys", same, seen, "Send the request of these keys to your member, or use the keys it has.")


def _secret(path: Path) -> Finding:
    """A key file is there, is ours, and is readable by its owner alone."""
    try:
        read_secret(path)
    except SealwrightError as error:
        return Finding(f"key file {path.name}", False, error.what, error.do)
    mode = stat.S_IMODE(path.stat().st_mode)
    return Finding(f"key file {path.name}", True, f"mode {mode:04o}")


# --- the network ----------------------------------------------------------------------------------------------------


def _ports(kit: SignedKit) -> Iterator[Finding]:
    for port in kit.manifest.ports:
        yield port_finding(port.listen)


def port_finding(listen: str) -> Finding:
    """Whether `host:port` can be listened on now."""
    host, number = host_of(listen), int(listen.rpartition(":")[2])
    check = f"port {listen}"
    try:
        family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, number), family=family):
            return Finding(check, True, "free")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            do = f"See who listens (`ss -ltnp 'sport = :{number}'`) and stop it, unless it is this very kit's."
            return Finding(check, False, "something listens there already", do)
        if error.errno == errno.EADDRNOTAVAIL:
            return Finding(check, False, "this host has no such address", "Give the host its address, or plan another.")
        return Finding(check, False, error.strerror or str(error), "Plan another port, or allow this one.")


def _names(kit: SignedKit) -> Iterator[Finding]:
    manifest = kit.manifest
    hosts = {urlsplit(broker.url).hostname or "" for broker in manifest.brokers}
    hosts |= {host_of(manifest.server.address)} if manifest.server is not None else set()
    planned = {name: entry.address for entry in manifest.hosts for name in entry.names}
    for host in sorted(hosts):
        if not _is_address(host):
            yield name_finding(host, planned.get(host))


def name_finding(host: str, planned: str | None) -> Finding:
    """Whether a name resolves, and to the planned address if there is one."""
    do = f"Add the line `{planned} {host}` to /etc/hosts." if planned else f"Have {host} entered into the DNS."
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        return Finding(f"name {host}", False, f"does not resolve: {error.strerror or error}", do)
    return Finding(f"name {host}", planned is None or planned in found, ", ".join(found), do)


def _broker(kit: SignedKit) -> Iterator[Finding]:
    """A broker answers; this host's clock is near the time that it signs; its charter still has this place."""
    addresses = [(broker.name, broker.url) for broker in kit.manifest.brokers]
    try:
        fetched = fetch_charter(addresses, root=kit.root, timeout=ANSWER_SECONDS)
    except SealwrightError as error:
        do = "Start the broker first; then see name, route and firewall between this host and it."
        yield Finding("broker", False, error.what, do)
        return
    try:
        here = datetime.now(UTC)
        yield Finding("broker", True, f"{fetched.client.name} answers, with charter version {fetched.charter.version}")
        yield clock_finding(here, fetched.client.time().time)
        yield _still_so(kit, fetched)
    except SealwrightError as error:
        yield Finding("broker", False, error.what, error.do)
    finally:
        fetched.client.close()


def clock_finding(here: datetime, signed: datetime) -> Finding:
    """Whether this host's clock is within CLOCK_TOLERANCE_SECONDS of the time that a broker signed."""
    apart = (here - signed).total_seconds()
    seen = f"{abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} the broker's {format_time(signed)}"
    ok = abs(apart) <= CLOCK_TOLERANCE_SECONDS
    return Finding("clock", ok, seen, "Set the clock (`timedatectl set-ntp true`).")


def _still_so(kit: SignedKit, fetched: FetchedCharter) -> Finding:
    reasons = charter_reasons(kit.manifest, kit.files, fetched.charter)
    seen = "; ".join(reasons) or f"version {fetched.charter.version} has this place as the kit has it"
    return Finding("current charter", not reasons, seen, "Ask your member for a new kit.")


def _server(kit: SignedKit) -> Iterator[Finding]:
    server = kit.manifest.server
    if server is None:
        return
    do = "Start the server first; then see route and firewall between this host and it."
    try:
        socket.create_connection(
            (host_of(server.address), int(server.address.rpartition(":")[2])), timeout=ANSWER_SECONDS
        ).close()
    except OSError as error:
        yield Finding("server", False, f"{server.name} at {server.address}: {error.strerror or error}", do)
        return
    yield Finding("server", True, f"{server.name} listens at {server.address}")


def _is_address(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        return False
    return True
