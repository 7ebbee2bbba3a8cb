"""Endorsements kept on disk: the VCEK of a (product, chip, TCB) never changes, so it is fetched once, kept for ever.

    <folder>/vcek/<product>/<chip id>/<TCB>.der
    <folder>/<vcek or vlek>/<product>/cert_chain.pem
    <folder>/<vcek or vlek>/<product>/crl.der

Files are written whole and renamed, so that readers need no lock; `exclusive` lets one process or thread at a time work
on one entry. What is stored was looked at: a certificate lies where its own extensions say that it belongs. Hardware
alone is kept here; the virtual platform hands its certificates out with its reports.
"""

from __future__ import annotations

import fcntl
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from attestation.endorsements.certificates import MAX_BUNDLE_SIZE, load_certificate, load_crl, split_pem
from attestation.endorsements.chain import VekKind, issuer_name, root_name, vek_name
from attestation.endorsements.kds_urls import HWID_SIZE, Line
from attestation.endorsements.vek import read_vek_extensions
from attestation.errors import MalformedEndorsement
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb, encode_tcb
from policies.errors import Unusable

MAX_ARCHIVE_FILES = 100_000
MAX_ARCHIVE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class KdsCache:
    """The folder; it is made when something is first stored."""

    folder: Path

    def vcek_file(self, product: Product, chip_id: bytes, tcb: Tcb) -> Path:
        """Where this chip's VCEK for this TCB is kept."""
        chip = chip_id[: HWID_SIZE[product]].hex()
        return self.folder / "vcek" / product.value / chip / f"{encode_tcb(tcb, product).hex()}.der"

    def chain_file(self, line: Line, product: Product) -> Path:
        """Where the authorities of this line are kept."""
        return self.folder / line / product.value / "cert_chain.pem"

    def crl_file(self, line: Line, product: Product) -> Path:
        """Where the revocation list of this line is kept."""
        return self.folder / line / product.value / "crl.der"

    def read(self, path: Path) -> bytes | None:
        """The bytes of an entry, or None if it is not there."""
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error

    def write(self, path: Path, content: bytes) -> None:
        """Store an entry whole, or not at all."""
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        except OSError as error:
            raise self._unusable(error) from error
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(scratch).chmod(0o644)
            Path(scratch).replace(path)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            Path(scratch).unlink(missing_ok=True)

    def _unusable(self, error: OSError) -> Unusable:
        reason = (error.strerror or str(error)).lower()
        return Unusable(f"the cache cannot be used: {reason}", where=str(self.folder), do="Name a folder of your own.")

    @contextmanager
    def exclusive(self, path: Path) -> Iterator[None]:
        """Hold one entry against all other processes and threads. The lock goes with the process that holds it."""
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            lock = path.with_name(f".{path.name}.lock").open("w")
        except OSError as error:
            raise self._unusable(error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def store_certificate(self, raw: bytes) -> str | None:
        """Store a VCEK where it belongs; returns that place's name, or None for a certificate of another kind.

        Raises:
            MalformedEndorsement: no certificate, or a VCEK whose extensions break a rule.
        """
        certificate = load_certificate(raw)
        if _common_name(certificate.subject) != vek_name(VekKind.VCEK, virtual=False):
            return None
        extensions = read_vek_extensions(certificate)
        if extensions.hwid is None:
            raise MalformedEndorsement("a VCEK without a hardware id", where="VCEK", do="Take it from AMD's KDS.")
        path = self.vcek_file(extensions.product, extensions.hwid, extensions.tcb)
        self.write(path, certificate.public_bytes(Encoding.DER))
        return str(path.relative_to(self.folder))

    def preload(self, source: Path) -> tuple[str, ...]:
        """Store everything useful out of a folder, a tar or zip archive, or a single file; returns what was stored.

        VCEKs are kept each in its place; an ASK or ASVK is kept with its ARK; revocation lists are kept for their root.
        Files that are none of these are passed over. Nothing is unpacked to disk.

        Raises:
            Unusable: the source is missing, or an archive is broken or too large.
        """
        certificates: dict[str, x509.Certificate] = {}
        stored: list[str] = []
        for raw in _contents(source):
            stored += self._preload_one(raw, certificates)
        stored += self._store_chains(certificates)
        return tuple(dict.fromkeys(stored))

    def _preload_one(self, raw: bytes, authorities: dict[str, x509.Certificate]) -> list[str]:
        try:
            return self._store_crl(raw)
        except MalformedEndorsement:
            pass  # no revocation list: perhaps certificates
        stored: list[str] = []
        try:
            for block in split_pem(raw, "CERTIFICATE"):
                certificate = load_certificate(block)
                place = self.store_certificate(block)
                if place is not None:
                    stored.append(place)
                else:
                    authorities[_common_name(certificate.subject)] = certificate
        except MalformedEndorsement:
            return stored  # a file of another kind beside them
        return stored

    def _store_crl(self, raw: bytes) -> list[str]:
        blocks = split_pem(raw, "X509 CRL")
        crl = load_crl(blocks[0])
        issuer = _common_name(crl.issuer)
        stored = []
        lines: tuple[Line, ...] = ("vcek", "vlek")
        for product in Product:
            if issuer != root_name(product, virtual=False):
                continue
            for line in lines:
                path = self.crl_file(line, product)
                self.write(path, crl.public_bytes(Encoding.DER))
                stored.append(str(path.relative_to(self.folder)))
        return stored

    def _store_chains(self, authorities: dict[str, x509.Certificate]) -> list[str]:
        stored = []
        for product in Product:
            root = authorities.get(root_name(product, virtual=False))
            for kind in VekKind:
                issuer = authorities.get(issuer_name(kind, product, virtual=False))
                if root is None or issuer is None:
                    continue
                line: Line = "vcek" if kind is VekKind.VCEK else "vlek"
                path = self.chain_file(line, product)
                self.write(path, issuer.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM))
                stored.append(str(path.relative_to(self.folder)))
        return stored


def _common_name(name: x509.Name) -> str:
    names = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _contents(source: Path) -> Iterator[bytes]:
    """The files of a folder or an archive one after another, or the one file itself; large ones are passed over."""
    try:
        if source.is_dir():
            yield from _folder(source)
        elif tarfile.is_tarfile(source):
            yield from _tar(source)
        elif zipfile.is_zipfile(source):
            yield from _zip(source)
        else:
            yield source.read_bytes()
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise Unusable(
            f"this cannot be read: {error}", where=str(source), do="Give a folder, an archive or a file."
        ) from error


def _folder(source: Path) -> Iterator[bytes]:
    for count, path in enumerate(sorted(source.rglob("*"))):
        _bound(count, 0, source)
        if path.is_file() and path.stat().st_size <= MAX_BUNDLE_SIZE:
            yield path.read_bytes()


def _tar(source: Path) -> Iterator[bytes]:
    total = 0
    with tarfile.open(source) as archive:
        for count, member in enumerate(archive):
            if not member.isfile() or member.size > MAX_BUNDLE_SIZE:
                continue
            total += member.size
            _bound(count, total, source)
            file = archive.extractfile(member)
            if file is not None:
                yield file.read(MAX_BUNDLE_SIZE)


def _zip(source: Path) -> Iterator[bytes]:
    total = 0
    with zipfile.ZipFile(source) as archive:
        for count, member in enumerate(archive.infolist()):
            if member.is_dir() or member.file_size > MAX_BUNDLE_SIZE:
                continue
            total += member.file_size
            _bound(count, total, source)
            with archive.open(member) as file:
                yield file.read(MAX_BUNDLE_SIZE)


def _bound(count: int, total: int, source: Path) -> None:
    if count >= MAX_ARCHIVE_FILES or total > MAX_ARCHIVE_BYTES:
        raise Unusable("this holds too much", where=str(source), do=f"At most {MAX_ARCHIVE_FILES} files and 1 GiB.")
