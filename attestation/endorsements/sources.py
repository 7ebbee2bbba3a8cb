"""Where endorsements come from: a certificate table, files, folders. Pins decide what they are worth, not sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attestation.endorsements.certificates import MAX_BUNDLE_SIZE, MAX_CRL_SIZE, load_certificate, load_crl, split_pem
from attestation.endorsements.chain import Endorsements
from attestation.errors import MalformedEndorsement, MalformedEvidence
from attestation.evidence.certificate_table import (
    ARK_GUID,
    ASK_GUID,
    CRL_GUID,
    VCEK_GUID,
    VLEK_GUID,
    parse_certificate_table,
)
from policies.errors import Unusable

CERTIFICATE_SUFFIXES = frozenset({".pem", ".der", ".crt", ".cer", ".cert"})
MAX_FILES = 256


def from_certificate_table(
    table: bytes, *, intermediates: tuple[bytes, ...] = (), crls: tuple[bytes, ...] = ()
) -> Endorsements:
    """Endorsements out of the table that a host gave its guest, together with others already at hand.

    Raises:
        MalformedEvidence: the table lies about itself, or holds a VCEK and a VLEK at once.
    """
    entries = dict(parse_certificate_table(table))
    if VCEK_GUID in entries and VLEK_GUID in entries:
        raise MalformedEvidence(
            "the table holds a VCEK and a VLEK",
            where="certificate table",
            do="Keep the one whose key signed the report.",
        )
    found = tuple(entries[guid] for guid in (ASK_GUID, ARK_GUID) if guid in entries)
    lists = (entries[CRL_GUID],) if CRL_GUID in entries else ()
    return Endorsements(
        vek=entries.get(VCEK_GUID, entries.get(VLEK_GUID)),
        intermediates=tuple(dict.fromkeys(found + intermediates)),
        crls=tuple(dict.fromkeys(lists + crls)),
    )


def from_files(*, vek: Path | None = None, chain: Path | None = None, crls: Sequence[Path] = ()) -> Endorsements:
    """Endorsements out of files: the VEK's certificate, a file or a folder of CA certificates, revocation lists.

    In a folder every `.pem .der .crt .cer .cert` file counts, PEM files without a certificate excepted; certificates of
    other products in it do no harm.

    Raises:
        Unusable: a file is missing, unreadable or too large.
        MalformedEndorsement: a file is not what it was given for; the error names it.
    """
    return Endorsements(
        vek=None if vek is None else _one_certificate(vek),
        intermediates=() if chain is None else _certificates(chain),
        crls=tuple(raw for path in crls for raw in _lists(path)),
    )


def read_bounded(path: Path, limit: int, what: str) -> bytes:
    """The bytes of a file, at most `limit`.

    Raises:
        Unusable: missing, a directory, unreadable, or larger than the limit.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError:
        raise Unusable(f"there is no such {what}", where=str(path), do="Check the path.") from None
    except IsADirectoryError:
        raise Unusable(f"this is a directory, and no {what}", where=str(path), do="Name the file in it.") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Unusable(f"the {what} cannot be read: {reason}", where=str(path), do="Check its permissions.") from error
    if len(raw) > limit:
        raise Unusable(
            f"the {what} is larger than {limit} bytes", where=str(path), do="Check that it is the right file."
        )
    return raw


def _one_certificate(path: Path) -> bytes:
    raw = read_bounded(path, MAX_BUNDLE_SIZE, "certificate")
    try:
        blocks = split_pem(raw, "CERTIFICATE")
        load_certificate(blocks[0])
    except MalformedEndorsement as error:
        raise MalformedEndorsement(error.what, where=str(path), do=error.do) from error
    if len(blocks) > 1:
        raise MalformedEndorsement(
            f"the file holds {len(blocks)} certificates",
            where=str(path),
            do="Give the VCEK or VLEK alone, its chain apart.",
        )
    return blocks[0]


def _certificates(path: Path) -> tuple[bytes, ...]:
    files = [path]
    try:
        in_folder = path.is_dir()
        found_in_it = sorted(path.iterdir()) if in_folder else []
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Unusable(f"the chain cannot be read: {reason}", where=str(path), do="Check its permissions.") from error
    if in_folder:
        files = [one for one in found_in_it if one.suffix in CERTIFICATE_SUFFIXES and one.is_file()]
        if not files or len(files) > MAX_FILES:
            raise MalformedEndorsement(
                f"the folder holds {len(files)} certificate files",
                where=str(path),
                do=f"Put ASK and ARK there, as {', '.join(sorted(CERTIFICATE_SUFFIXES))} files (at most {MAX_FILES}).",
            )
    found: dict[bytes, None] = {}
    for file in files:
        raw = read_bounded(file, MAX_BUNDLE_SIZE, "certificate file")
        if file is not path and b"-----BEGIN " in raw and b"-----BEGIN CERTIFICATE-----" not in raw:
            continue  # a revocation list or a key beside the certificates
        try:
            for block in split_pem(raw, "CERTIFICATE"):
                load_certificate(block)
                found[block] = None
        except MalformedEndorsement as error:
            raise MalformedEndorsement(error.what, where=str(file), do=error.do) from error
    return tuple(found)


def _lists(path: Path) -> tuple[bytes, ...]:
    raw = read_bounded(path, MAX_CRL_SIZE, "revocation list")
    try:
        blocks = split_pem(raw, "X509 CRL")
        for block in blocks:
            load_crl(block)
    except MalformedEndorsement as error:
        raise MalformedEndorsement(error.what, where=str(path), do=error.do) from error
    return blocks
