"""The key distribution service: asked once, waited for when busy, and not at all where there is no network."""

from __future__ import annotations

import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from kds_service import CHIP, NOW, TCB, chain, revocation_list, serving, vcek

from attestation.endorsements.kds import Answer, Fetch, KdsClient, https_fetch
from attestation.endorsements.kds_cache import KdsCache
from attestation.endorsements.kds_urls import chain_path, crl_path, vcek_path
from attestation.errors import EndorsementUnavailable, MalformedEndorsement
from attestation.evidence.certificate_table import (
    ARK_GUID,
    ASK_GUID,
    CRL_GUID,
    VCEK_GUID,
    parse_certificate_table,
)
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb
from attestation.virtual.chip import Chip
from attestation.virtual.processor import sign_report
from attestation.virtual.vendor import Vendor
from policies.errors import Unusable

MILAN, TURIN = Product.MILAN, Product.TURIN


class Service:
    """A service that answers from a table, and a clock that moves only when somebody sleeps."""

    def __init__(self, answers: Mapping[str, bytes], busy: int = 0, retry_after: float | None = None) -> None:
        self.answers = dict(answers)
        self.busy, self.retry_after = busy, retry_after
        self.asked: list[str] = []
        self.now = 1_000_000.0
        self.slept: list[float] = []

    def fetch(self, url: str) -> Answer:
        path = url.removeprefix("https://kds.test")
        self.asked.append(path)
        if self.busy:
            self.busy -= 1
            return Answer(429, self.retry_after, b"busy")
        return Answer(200, None, self.answers[path]) if path in self.answers else Answer(404, None, b"")

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def client(self, folder: Path, fetch: Fetch | None = None) -> KdsClient:
        return KdsClient(
            KdsCache(folder),
            fetch or self.fetch,
            base="https://kds.test",
            clock=lambda: self.now,
            sleep=self.sleep,
        )


def test_paths_are_the_services() -> None:
    assert vcek_path(MILAN, CHIP, TCB) == f"/vcek/v1/Milan/{CHIP.hex()}?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219"
    turin = vcek_path(TURIN, CHIP, Tcb(1, 0, 2, 71, 0))
    assert turin == f"/vcek/v1/Turin/{CHIP[:8].hex()}?fmcSPL=00&blSPL=01&teeSPL=00&snpSPL=02&ucodeSPL=71"
    assert chain_path("vlek", MILAN) == "/vlek/v1/Milan/cert_chain"
    assert crl_path("vcek", TURIN) == "/vcek/v1/Turin/crl"


def test_a_vcek_is_fetched_once_and_kept(tmp_path: Path) -> None:
    body = vcek()
    service = Service({vcek_path(MILAN, CHIP, TCB): body})
    assert service.client(tmp_path).vcek(MILAN, CHIP, TCB) == body
    assert service.client(tmp_path).vcek(MILAN, CHIP, TCB) == body
    assert len(service.asked) == 1
    offline = KdsClient(KdsCache(tmp_path))
    assert offline.vcek(MILAN, CHIP, TCB) == body


def test_a_busy_service_is_waited_for_longer_each_time(tmp_path: Path) -> None:
    service = Service({vcek_path(MILAN, CHIP, TCB): vcek()}, busy=3)
    service.client(tmp_path).vcek(MILAN, CHIP, TCB)
    assert service.slept == pytest.approx([2, 4, 8], abs=1e-3)
    assert len(service.asked) == 4


def test_the_wait_that_the_service_names_is_kept(tmp_path: Path) -> None:
    service = Service({vcek_path(MILAN, CHIP, TCB): vcek()}, busy=1, retry_after=10)
    service.client(tmp_path).vcek(MILAN, CHIP, TCB)
    assert service.slept == pytest.approx([10], abs=1e-3)


def test_patience_ends(tmp_path: Path) -> None:
    service = Service({}, busy=100)
    with pytest.raises(EndorsementUnavailable, match="busy"):
        service.client(tmp_path).vcek(MILAN, CHIP, TCB)
    assert sum(service.slept) <= 60
    service = Service({}, busy=100, retry_after=0)
    with pytest.raises(EndorsementUnavailable, match="busy"):
        service.client(tmp_path / "other").vcek(MILAN, CHIP, TCB)
    assert len(service.asked) <= 61


def test_all_who_share_a_cache_wait_together(tmp_path: Path) -> None:
    first = Service({vcek_path(MILAN, CHIP, TCB): vcek()}, busy=1, retry_after=20)
    client = replace(first.client(tmp_path), patience_seconds=5)
    with pytest.raises(EndorsementUnavailable):
        client.vcek(MILAN, CHIP, TCB)
    second = Service({chain_path("vcek", MILAN): chain()})
    second.client(tmp_path).chain("vcek", MILAN)
    assert second.slept == pytest.approx([20], abs=1e-3)


@pytest.mark.parametrize("noted", [b"", b"soon", b"1e400", b"-5", b"\xff" * 40, b"9" * 12])
def test_a_spoiled_note_does_not_stop_anybody_for_long(tmp_path: Path, noted: bytes) -> None:
    (tmp_path / "not-before").write_bytes(noted)
    service = Service({chain_path("vcek", MILAN): chain()})
    replace(service.client(tmp_path), patience_seconds=4000).chain("vcek", MILAN)
    assert sum(service.slept) <= 3600


def test_another_answer_is_said(tmp_path: Path) -> None:
    with pytest.raises(EndorsementUnavailable, match="404"):
        Service({}).client(tmp_path).vcek(MILAN, CHIP, TCB)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", vcek(bytes(64)), vcek(tcb=Tcb(3, 0, 8, 115)), vcek(product=Product.GENOA)]
)
def test_what_was_not_asked_for_is_not_kept(tmp_path: Path, body: bytes) -> None:
    service = Service({vcek_path(MILAN, CHIP, TCB): body})
    with pytest.raises(MalformedEndorsement):
        service.client(tmp_path).vcek(MILAN, CHIP, TCB)
    assert not list(tmp_path.rglob("*.der"))


def test_one_request_is_in_flight_for_an_entry(tmp_path: Path) -> None:
    body, asked, released = vcek(), [], threading.Event()

    def slow(url: str) -> Answer:
        asked.append(url)
        released.wait(5)
        return Answer(200, None, body)

    found: list[bytes] = []
    clients = [KdsClient(KdsCache(tmp_path), slow) for _ in range(4)]
    threads = [threading.Thread(target=lambda one=one: found.append(one.vcek(MILAN, CHIP, TCB))) for one in clients]
    for thread in threads:
        thread.start()
    threading.Timer(0.2, released.set).start()
    for thread in threads:
        thread.join(10)
    assert found == [body] * 4
    assert len(asked) == 1


def test_without_a_network_the_cache_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(EndorsementUnavailable, match=r"Milan.*not in the cache"):
        KdsClient(KdsCache(tmp_path)).chain("vcek", MILAN)


def test_a_revocation_list_is_renewed_but_an_old_one_is_better_than_none(tmp_path: Path) -> None:
    service = Service({crl_path("vcek", MILAN): revocation_list()})
    service.now = NOW.timestamp()
    client = service.client(tmp_path)
    first = client.crl("vcek", MILAN)
    assert client.crl("vcek", MILAN) == first
    assert len(service.asked) == 1
    service.answers[crl_path("vcek", MILAN)] = second = revocation_list()
    service.now += 2 * 86400
    assert client.crl("vcek", MILAN) == second
    service.answers.clear()
    service.now += 2 * 86400
    assert client.crl("vcek", MILAN) == second
    assert KdsClient(KdsCache(tmp_path)).crl("vcek", MILAN) == second


def test_a_report_is_endorsed_by_host_cache_and_service(
    tmp_path: Path, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> None:
    chip = virtual_chips[MILAN]
    body = vcek(chip.chip_id, chip.tcb)
    answers = {
        vcek_path(MILAN, chip.chip_id, chip.tcb): body,
        chain_path("vcek", MILAN): chain(),
        crl_path("vcek", MILAN): revocation_list(),
    }
    service = Service(answers)
    client = service.client(tmp_path)
    endorsed = client.endorse(SnpEvidence(sign_report(chip)), revocation=True)
    assert endorsed.vek == body
    assert len(endorsed.intermediates) == 2
    assert len(endorsed.crls) == 1
    given = SnpEvidence(sign_report(chip), chip.certificate_table(virtual_vendor))
    assert client.endorse(given).vek == chip.vcek  # the host's goes first: pins decide
    older = SnpEvidence(sign_report(chip, version=2))
    with pytest.raises(EndorsementUnavailable, match="does not name its processor"):
        client.endorse(older)
    assert client.endorse(older, product=MILAN).vek == body
    with pytest.raises(EndorsementUnavailable, match="VLEK"):
        client.endorse(SnpEvidence(sign_report(chip, key_info=1 << 2)))


def test_evidence_is_completed_for_who_keeps_it(tmp_path: Path, virtual_chips: Mapping[Product, Chip]) -> None:
    chip = virtual_chips[MILAN]
    answers = {
        vcek_path(MILAN, chip.chip_id, chip.tcb): vcek(chip.chip_id, chip.tcb),
        chain_path("vcek", MILAN): chain(),
        crl_path("vcek", MILAN): revocation_list(),
    }
    bare = SnpEvidence(sign_report(chip))
    completed = Service(answers).client(tmp_path).complete_evidence(bare)
    assert completed.report == bare.report
    table = dict(parse_certificate_table(completed.certificates))
    assert set(table) == {VCEK_GUID, ASK_GUID, ARK_GUID, CRL_GUID}
    assert table[VCEK_GUID] == answers[vcek_path(MILAN, chip.chip_id, chip.tcb)]
    assert KdsClient(KdsCache(tmp_path)).complete_evidence(bare) == completed
    Path(tmp_path / "vcek/Milan/cert_chain.pem").write_bytes(chain() * 2)
    with pytest.raises(EndorsementUnavailable, match="4 certificates"):
        KdsClient(KdsCache(tmp_path)).complete_evidence(bare)


def archive_of(kind: str, files: Mapping[str, bytes], folder: Path) -> Path:
    if kind == "folder":
        for name, content in files.items():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes(content)
        return folder / "source"
    path = folder / f"source.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, content in files.items():
                packed.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["folder", "tar.gz", "zip"])
def test_a_cache_is_preloaded(tmp_path: Path, kind: str) -> None:
    files = {
        "a/vcek.der": vcek(),
        "a/turin.der": vcek(tcb=Tcb(1, 0, 2, 71, 3), product=TURIN),
        "b/chain.pem": chain(),
        "crl": revocation_list(),
        "README": b"not a certificate",
        "../../escape.der": vcek(bytes(64)),
    }
    if kind == "folder":
        del files["../../escape.der"]
    cache = KdsCache(tmp_path / "cache")
    stored = cache.preload(archive_of(kind, files, tmp_path))
    assert any(name.startswith("vcek/Milan/0001") for name in stored)
    assert any(name.startswith("vcek/Turin/0001") for name in stored)
    assert {"vcek/Milan/cert_chain.pem", "vcek/Milan/crl.der", "vlek/Milan/crl.der"} <= set(stored)
    offline = KdsClient(cache)
    assert offline.vcek(MILAN, CHIP, TCB) == files["a/vcek.der"]
    assert offline.vcek(TURIN, CHIP, Tcb(1, 0, 2, 71, 3)) == files["a/turin.der"]
    assert len(offline.chain("vcek", MILAN)) == 2
    assert offline.crl("vcek", MILAN) == files["crl"]
    outside = [path for path in tmp_path.rglob("*.der") if not re.search(r"/(cache|source)/", str(path))]
    assert not outside


def test_the_virtual_platform_is_not_kept_with_hardware(tmp_path: Path, virtual_chips: Mapping[Product, Chip]) -> None:
    (tmp_path / "vcek.der").write_bytes(virtual_chips[MILAN].vcek)
    assert KdsCache(tmp_path / "cache").preload(tmp_path / "vcek.der") == ()


def test_a_source_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="cannot be read"):
        KdsCache(tmp_path / "cache").preload(tmp_path / "missing")


@pytest.fixture
def server() -> Iterator[str]:
    answers = {
        "/chain": (200, {}, chain()),
        "/busy": (429, {"Retry-After": "7"}, b""),
        "/later": (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""),
        "/moved": (302, {"Location": "/chain"}, b""),
        "/large": (200, {}, bytes((4 << 20) + 1)),
    }
    with serving(answers) as address:
        yield address


def test_http_is_asked_without_redirects_and_bounded(server: str) -> None:
    fetch = https_fetch(5)
    assert fetch(f"{server}/chain").status == 200
    assert fetch(f"{server}/busy") == Answer(429, 7.0, b"")
    assert fetch(f"{server}/later").retry_after is None
    assert fetch(f"{server}/moved").status == 302
    assert fetch(f"{server}/nothing").status == 404
    with pytest.raises(EndorsementUnavailable, match="more than"):
        fetch(f"{server}/large")
    with pytest.raises(EndorsementUnavailable, match="does not answer"):
        fetch("http://127.0.0.1:9/")
