"""AMD's Key Distribution Service: fetch once, keep for ever, wait when it says so, and ask nothing that the cache has.

The service allows about one request in ten seconds from one address and answers others with 429. Therefore one request
at a time is in flight for an entry, in all processes that share a cache; a 429 makes all of them wait; and a machine
without a network works from a preloaded cache alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.serialization import Encoding

from attestation.endorsements.certificates import load_certificate, load_crl, split_pem
from attestation.endorsements.chain import Endorsements
from attestation.endorsements.kds_cache import KdsCache
from attestation.endorsements.kds_urls import KDS, Line, chain_path, crl_path, vcek_path
from attestation.endorsements.sources import from_certificate_table
from attestation.endorsements.vek import read_vek_extensions
from attestation.errors import EndorsementUnavailable, MalformedEndorsement
from attestation.evidence.certificate_table import (
    ARK_GUID,
    ASK_GUID,
    CRL_GUID,
    VCEK_GUID,
    VLEK_GUID,
    encode_certificate_table,
)
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import SIGNING_KEY_VLEK, Product, Report, parse_report, product_of
from attestation.evidence.tcb import Tcb, decode_tcb

MAX_ANSWER = 4 << 20
"""Bytes of an answer that are read."""

MAX_PAUSE = 3600.0
"""Seconds that a note of another process can make this one wait at most."""

_NUMBER = re.compile(rb"[0-9]{1,12}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service said: HTTP status, seconds to wait if it named them, body."""

    status: int
    retry_after: float | None
    body: bytes


class Fetch(Protocol):
    """One GET of a URL, without redirects; raises EndorsementUnavailable if nobody answers."""

    def __call__(self, url: str) -> Answer: ...


def https_fetch(timeout_seconds: float = 30.0) -> Fetch:
    """A fetch over HTTPS (or HTTP to a mirror) that reads 4 MiB at most."""
    import urllib3

    pool = urllib3.PoolManager(timeout=urllib3.Timeout(total=timeout_seconds), retries=False)

    def fetch(url: str) -> Answer:
        try:
            answer = pool.request("GET", url, redirect=False, preload_content=False)
            body = answer.read(MAX_ANSWER + 1, decode_content=True)
            answer.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise EndorsementUnavailable(
                f"the key distribution service does not answer: {error}", where=url, do="Check the network, or preload."
            ) from error
        if len(body) > MAX_ANSWER:
            raise EndorsementUnavailable(
                f"an answer of more than {MAX_ANSWER} bytes", where=url, do="Check what stands in its place."
            )
        waited = answer.headers.get("Retry-After", "")
        return Answer(answer.status, float(waited) if waited.isdecimal() else None, body)

    return fetch


@dataclass(frozen=True)
class KdsClient:
    """Endorsements out of the cache, and what is not there out of the service.

    Attributes:
        cache: Where everything is kept.
        fetch: How the service is asked; None never asks (a machine without a network).
        base: The service's address.
        patience_seconds: How long one entry may take, waits included.
        crl_days: Revocation lists are fetched anew after so many days.
        clock, sleep: Time, for waits.
    """

    cache: KdsCache
    fetch: Fetch | None = None
    base: str = KDS
    patience_seconds: float = 60.0
    crl_days: int = 1
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    first_wait_seconds: float = field(default=2.0, repr=False)

    def endorse(
        self, evidence: SnpEvidence, *, product: Product | None = None, revocation: bool = False
    ) -> Endorsements:
        """Everything that a report needs: what its host gave along, completed from cache and service.

        `product` is needed for reports before version 3, which do not name theirs. With `revocation` a list is added.

        Raises:
            EndorsementUnavailable: something is neither cached nor to be had, with what and where.
            MalformedEvidence: the report or its certificate table cannot be read.
        """
        report = parse_report(evidence.report)
        line = product or _product(report)
        brought = from_certificate_table(evidence.certificates)
        family: Line = "vlek" if report.signing_key == SIGNING_KEY_VLEK else "vcek"
        vek = brought.vek
        if vek is None:
            if family == "vlek":
                raise EndorsementUnavailable(
                    "a VLEK is to be had from the guest alone", where="certificate table", do="Have the guest send it."
                )
            vek = self.vcek(line, report.chip_id, decode_tcb(report.reported_tcb, line))
        return Endorsements(
            vek=vek,
            intermediates=brought.intermediates + self.chain(family, line),
            crls=brought.crls + ((self.crl(family, line),) if revocation else ()),
        )

    def complete_evidence(self, evidence: SnpEvidence, *, product: Product | None = None) -> SnpEvidence:
        """The same report with a whole certificate table: VEK, authorities and revocation list.

        A broker stores this form, so that an auditor finds beside the report all that its verdict rested on.

        Raises: as `endorse`.
        """
        report = parse_report(evidence.report)
        family: Line = "vlek" if report.signing_key == SIGNING_KEY_VLEK else "vcek"
        found = self.endorse(evidence, product=product)
        line = product or _product(report)
        authorities = self.chain(family, line)
        if found.vek is None or len(authorities) != 2:
            raise EndorsementUnavailable(
                f"the chain for {line.value} holds {len(authorities)} certificates, not two",
                where=str(self.cache.chain_file(family, line)),
                do="Fetch or preload it again.",
            )
        entries = (
            (VLEK_GUID if family == "vlek" else VCEK_GUID, _der(found.vek)),
            (ASK_GUID, _der(authorities[0])),
            (ARK_GUID, _der(authorities[1])),
            (CRL_GUID, self.crl(family, line)),
        )
        return SnpEvidence(evidence.report, encode_certificate_table(entries))

    def vcek(self, product: Product, chip_id: bytes, tcb: Tcb) -> bytes:
        """One chip's VCEK for one TCB, DER."""
        path = self.cache.vcek_file(product, chip_id, tcb)

        def check(body: bytes) -> bytes:
            extensions = read_vek_extensions(load_certificate(body))
            if self.cache.vcek_file(extensions.product, extensions.hwid or b"", extensions.tcb) != path:
                raise MalformedEndorsement("a VCEK of another chip or TCB", where=path.name, do="Ask again later.")
            return body

        return self._get(path, vcek_path(product, chip_id, tcb), check)

    def chain(self, line: Line, product: Product) -> tuple[bytes, ...]:
        """ASK (or ASVK) and ARK, PEM each."""

        def check(body: bytes) -> bytes:
            for block in split_pem(body, "CERTIFICATE"):
                load_certificate(block)
            return body

        return split_pem(
            self._get(self.cache.chain_file(line, product), chain_path(line, product), check), "CERTIFICATE"
        )

    def crl(self, line: Line, product: Product) -> bytes:
        """The revocation list, DER; fetched anew when it is older than `crl_days`, if that can be done."""
        path = self.cache.crl_file(line, product)

        def check(body: bytes) -> bytes:
            load_crl(body)
            return body

        kept = self.cache.read(path)
        if kept is not None and (self.fetch is None or not self._is_old(path)):
            return kept
        try:
            return self._get(path, crl_path(line, product), check, renew=True)
        except EndorsementUnavailable:
            if kept is None:
                raise
            return kept  # the verifier judges its age

    def _is_old(self, path: Path) -> bool:
        return self.clock() - path.stat().st_mtime > self.crl_days * 86400

    def _get(self, path: Path, request: str, check: Callable[[bytes], bytes], *, renew: bool = False) -> bytes:
        kept = None if renew else self.cache.read(path)
        if kept is not None:
            return kept
        if self.fetch is None:
            raise EndorsementUnavailable(
                f"{path.relative_to(self.cache.folder)} is not in the cache, and there is no network to ask",
                where=str(self.cache.folder),
                do="Preload it: `seal evidence preload`.",
            )
        with self.cache.exclusive(path):
            kept = self.cache.read(path)
            if kept is not None and not (renew and self._is_old(path)):
                return kept  # somebody else fetched it meanwhile
            body = check(self._ask(self.fetch, self.base + request))
            self.cache.write(path, body)
            return body

    def _ask(self, fetch: Fetch, url: str) -> bytes:
        """Ask until there is an answer, waiting longer each time the service is busy."""
        give_up, wait = self.clock() + self.patience_seconds, self.first_wait_seconds
        while True:
            self._await_turn(url, give_up)
            answer = fetch(url)
            if answer.status == 200:
                return answer.body
            if answer.status != 429 and answer.status < 500:
                raise EndorsementUnavailable(
                    f"the key distribution service answers {answer.status}",
                    where=url,
                    do="Check product, chip and TCB; a host may not have told its true ones.",
                )
            pause = wait if answer.retry_after is None else max(answer.retry_after, 1.0)
            wait = min(2 * wait, 30.0)
            self.cache.write(self.cache.folder / "not-before", str(self.clock() + pause).encode())

    def _await_turn(self, url: str, give_up: float) -> None:
        """Wait until the service may be asked again, as any process that shares the cache was told."""
        noted = self.cache.read(self.cache.folder / "not-before") or b""
        pause = min(float(noted), self.clock() + MAX_PAUSE) - self.clock() if _NUMBER.fullmatch(noted) else 0.0
        if pause <= 0:
            return
        if self.clock() + pause > give_up:
            raise EndorsementUnavailable(
                f"the key distribution service is busy for {pause:.0f} s more",
                where=url,
                do="Try again later, or preload the cache.",
            )
        self.sleep(pause)


def _der(certificate: bytes) -> bytes:
    return load_certificate(certificate).public_bytes(Encoding.DER)


def complete(endorsements: Endorsements, report: Report, cache: KdsCache) -> Endorsements:
    """The same endorsements with what the cache has for this report beside them; nothing is asked for."""
    line: Line = "vlek" if report.signing_key == SIGNING_KEY_VLEK else "vcek"
    vek, intermediates, crls = endorsements.vek, endorsements.intermediates, endorsements.crls
    for product in Product:
        kept = cache.read(
            cache.vcek_file(product, report.chip_id, decode_tcb(report.reported_tcb, product, strict=False))
        )
        if vek is None and line == "vcek":
            vek = kept
        chain = cache.read(cache.chain_file(line, product))
        intermediates += split_pem(chain, "CERTIFICATE") if chain else ()
        crl = cache.read(cache.crl_file(line, product))
        crls += (crl,) if crl else ()
    return Endorsements(vek, tuple(dict.fromkeys(intermediates)), tuple(dict.fromkeys(crls)))


def _product(report: Report) -> Product:
    product = None
    if report.cpuid_fam_id is not None and report.cpuid_mod_id is not None:
        product = product_of(report.cpuid_fam_id, report.cpuid_mod_id)
    if product is None:
        raise EndorsementUnavailable(
            "the report does not name its processor", where="ATTESTATION_REPORT", do="Say which product it is from."
        )
    return product
