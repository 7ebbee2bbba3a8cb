"""Documents from outside: one form each, or a clear refusal; never anything else, whatever the bytes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from charter_world import NOW, World, bundle, enrolment, image, issuer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.charter import found, load_charter, parse_proposal, propose_founding, write_proposal
from policies.charter.words import visible
from policies.charter.written import read_consortium, written_target
from policies.documents import Document, Enrolment, parse_document
from policies.errors import CharterRefused, MalformedDocument, UnusableKey
from policies.forms import load_certificate
from policies.init_data import (
    INIT_DATA_LIMIT,
    BrokerAddress,
    DataExport,
    InitData,
    ServerAddress,
    init_data_digest,
    parse_init_data,
    write_init_data,
)
from policies.keys import fingerprint, generate_ed25519, load_private_key, load_public_pem, public_pem

DOCUMENTS: list[Document] = [
    image("demo"),
    enrolment("site", "borealis", "borealis-hospital"),
    bundle(),
    user("acme-pharma", "ada"),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)
def test_documents_have_one_form(document: Document) -> None:
    raw = document.to_bytes()
    assert parse_document(type(document), raw, "x") == document
    table = json.loads(raw)
    others = [
        raw + b"\n",
        b" " + raw,
        json.dumps(table).encode(),
        json.dumps({**table, "extra": 1}, separators=(",", ":"), sort_keys=True).encode(),
        raw.replace(b'"name"', b'"name":"twice","name"', 1) if b'"name"' in raw else raw[:-1],
        raw[:-1],
        b"",
        b"null",
        b"[]",
        b"\xff",
    ]
    for other in others:
        with pytest.raises(MalformedDocument):
            parse_document(type(document), other, "x")
    for field in table:
        with pytest.raises(MalformedDocument):
            parse_document(type(document), json.dumps({k: v for k, v in table.items() if k != field}).encode(), "x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Demo"),
        ("name", "demo\n"),
        ("name", ""),
        ("name", "a" * 64),
        ("name", "../demo"),
        ("svn", "1"),
        ("svn", 1.0),
        ("svn", True),
        ("svn", -1),
        ("svn", 2**32),
        ("platform", "amd"),
        ("manifest_sha256", "CD" * 32),
        ("manifest_sha256", "cd" * 31),
        ("roles", []),
        ("roles", ["site", "site"]),
        ("roles", "site"),
        ("measurements", []),
    ],
)
def test_fields_hold_what_they_must(field: str, value: object) -> None:
    table = {**json.loads(image("demo").to_bytes()), field: value}
    with pytest.raises(MalformedDocument):
        parse_document(type(image("demo")), json.dumps(table, separators=(",", ":"), sort_keys=True).encode(), "x")


def test_a_field_of_a_later_version_leaves_older_documents_readable() -> None:
    class Later(Enrolment):
        floor: int = 3

    signed = enrolment("site", "borealis-site", "borealis-hospital").to_bytes()
    assert parse_document(Later, signed, "enrolment").to_bytes() == signed
    assert b'"floor"' in parse_document(Later, signed, "enrolment").model_copy(update={"floor": 4}).to_bytes()
    with pytest.raises(MalformedDocument, match="canonical"):
        parse_document(Later, signed.replace(b'"image"', b'"floor":3,"image"'), "enrolment")


def test_times_are_in_utc_and_whole_seconds() -> None:
    raw = bundle().to_bytes()
    assert b'"expires":"2026-03-31T12:00:00Z"' in raw
    for other in (b"2026-03-31T12:00:00+00:00", b"2026-03-31T12:00:00.5Z", b"2026-03-31T12:00:00", b"1774958400"):
        with pytest.raises(MalformedDocument):
            parse_document(type(bundle()), raw.replace(b"2026-03-31T12:00:00Z", other), "x")


INIT = InitData(
    version=1,
    algorithm="sha256",
    charter="ab" * 32,
    role="site",
    name="borealis",
    brokers=(BrokerAddress(name="broker-1", url="https://127.0.0.1:8443"),),
    listen="127.0.0.1:9000",
    server=ServerAddress(name="server", address="[::1]:9443"),
    resources={"data": "borealis-hospital/key/data"},
    user_data=DataExport(server="192.0.2.7", path="/exports/borealis/volume"),
)


def test_init_data_is_written_and_read() -> None:
    raw = write_init_data(INIT)
    assert parse_init_data(raw) == INIT
    assert len(init_data_digest(raw)) == 64
    bare = INIT.model_copy(update={"listen": None, "server": None, "resources": {}, "user_data": None})
    assert parse_init_data(write_init_data(bare)) == bare


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=30)
ADDRESSES = st.sampled_from(["127.0.0.1:9000", "[::1]:443", "hub.example:8443"])
WAYS = st.sampled_from(["mtls", "tls", "clear"])


@given(
    names=st.lists(st.sampled_from(["a", "data", "model.v1", "x-2", "0", "true", "1.5"]), unique=True, max_size=4),
    more=st.lists(ADDRESSES, max_size=3),
    ways=st.tuples(WAYS, WAYS, st.sampled_from(["grpc", "https"])),
    texts=st.tuples(st.none() | TEXTS, st.none() | TEXTS),
    ports=st.tuples(st.none() | ADDRESSES, st.none() | ADDRESSES),
)
def test_whatever_init_data_say_is_read_back(names: Any, more: Any, ways: Any, texts: Any, ports: Any) -> None:
    server = ServerAddress(
        name="server",
        address="[::1]:9443",
        more_addresses=tuple(more),
        driver=ways[2],
        connection_security=ways[1],
        proxy=texts[0],
        custom_ca_cert=texts[1],
    )
    said = {"listen": ports[0], "listen_https": ports[1], "connection_security": ways[0], "server": server}
    init = INIT.model_copy(update={**said, "resources": dict.fromkeys(names, "borealis-hospital/key/data")})
    assert parse_init_data(write_init_data(init)) == init


def test_init_data_with_what_toml_cannot_say_are_not_written() -> None:
    server = ServerAddress(name="server", address="[::1]:9443", proxy="http://\x7f:1")
    with pytest.raises(MalformedDocument, match="control character"):
        write_init_data(INIT.model_copy(update={"server": server}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version = 1", "version = 2"),
        ("version = 1", 'version = "1"'),
        ("version = 1", "version = true"),
        ('"sha256"', '"sha384"'),
        ('role = "site"', 'role = "king"'),
        ('role = "site"', 'role = "site"\nextra = 1'),
        ('name = "borealis"', 'name = "Borealis"'),
        ("https://127.0.0.1:8443", "http://127.0.0.1:8443"),
        ("https://127.0.0.1:8443", "https://user@127.0.0.1:8443"),
        ("https://127.0.0.1:8443", "https://127.0.0.1:8443/?x"),
        ("https://127.0.0.1:8443", "https://127.0.0.1:99999"),
        ("127.0.0.1:9000", "127.0.0.1"),
        ("borealis-hospital/key/data", "borealis-hospital/key"),
        ("borealis-hospital/key/data", "borealis-hospital/key/data/x"),
        ("[[brokers]]", "[brokers]"),
        ("192.0.2.7", "nfs.example"),
        ("192.0.2.7", "2001:db8::7"),
        ("192.0.2.7", "127.0.0.1"),
        ("192.0.2.7", "224.0.0.1"),
        ("192.0.2.7", "0.0.0.0"),  # noqa: S104 - what nobody may name
        ("192.0.2.7", "192.0.2.7,hard"),
        ("/exports/borealis/volume", "exports/volume"),
        ("/exports/borealis/volume", "/exports/../volume"),
        ("/exports/borealis/volume", "/exports/volume/"),
        ("/exports/borealis/volume", "/exports/a volume"),
        ("/exports/borealis/volume", "/exports,hard/volume"),
        ('path = "', 'port = 2050\npath = "'),
    ],
)
def test_init_data_of_another_shape_is_refused(old: str, new: str) -> None:
    text = write_init_data(INIT).decode()
    assert old in text
    with pytest.raises(MalformedDocument):
        parse_init_data(text.replace(old, new, 1).encode())


def test_init_data_is_bounded() -> None:
    with pytest.raises(MalformedDocument, match="larger than"):
        parse_init_data(write_init_data(INIT) + b"#" * INIT_DATA_LIMIT)
    with pytest.raises(MalformedDocument, match="not valid TOML"):
        parse_init_data(b"a = " + b"[" * 60_000)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_bytes_break_a_parser(raw: bytes) -> None:
    for parse in (
        lambda: parse_init_data(raw),
        lambda: parse_proposal(raw, "x"),
        lambda: parse_document(type(DOCUMENTS[0]), raw, "x"),
        lambda: read_consortium(raw, "x.toml", lambda name: b""),
        lambda: written_target("images/x.json", raw, "x.json"),
        lambda: written_target("images/x.json", raw, "x.toml"),
    ):
        with pytest.raises(MalformedDocument):
            parse()


_WORLD = World()
_PROPOSAL = write_proposal(propose_founding(_WORLD.consortium, _WORLD.files(), NOW))
_STORE = found(_WORLD.consortium, _WORLD.files(), _WORLD.keys.values(), [_WORLD.broker_key], NOW)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_bent_proposal_is_no_proposal_or_not_the_same(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(_PROPOSAL) - 1))
    raw = _PROPOSAL[:place] + bytes([data.draw(st.integers(0, 255))]) + _PROPOSAL[place + 1 :]
    try:
        bent = parse_proposal(raw, "x")
    except MalformedDocument:
        return
    assert write_proposal(bent) == raw


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_bent_store_is_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(_STORE)))
    raw = _STORE[name]
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(len(raw), start + 20)))
    bent = raw[:start] + data.draw(st.binary(max_size=20)) + raw[stop:]
    store = {**_STORE, name: bent}
    root = _STORE["metadata/1.root.json"]
    if bent == raw:
        assert load_charter(store, root, NOW).version == 1
        return
    with pytest.raises(CharterRefused) as caught:
        load_charter(store, root, NOW)
    assert any(name in reason for reason in caught.value.reasons)


def test_nothing_hides_on_a_signers_screen() -> None:
    assert visible("a\x1b[2Jb\r\u202ec\u200bd\te") == "a\\u{1b}[2Jb\\u{d}\\u{202e}c\\u{200b}d    e"
    assert visible("naïve – ok") == "naïve – ok"


def test_keys_are_made_once_and_read_back(tmp_path: Path) -> None:
    key = generate_ed25519(tmp_path / "a.key")
    assert (tmp_path / "a.key").stat().st_mode & 0o777 == 0o600
    assert public_pem(load_private_key(tmp_path / "a.key")) == public_pem(key)
    assert len(fingerprint(public_pem(key))) == 64
    with pytest.raises(UnusableKey, match="a file already"):
        generate_ed25519(tmp_path / "a.key")
    for text in (public_pem(key) + "\n", public_pem(key).replace("\n", "\r\n"), "", "x", image("demo").name):
        with pytest.raises(ValueError, match="PEM"):
            load_public_pem(text)


def test_key_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(20_000))
    (tmp_path / "text").write_text("no key")
    (tmp_path / "folder").mkdir()
    for name in ("big", "text"):
        (tmp_path / name).chmod(0o600)
    for name in ("big", "text", "folder", "nowhere"):
        with pytest.raises(UnusableKey):
            load_private_key(tmp_path / name)


def test_a_certificate_whose_key_nobody_can_use_is_refused_as_malformed() -> None:
    """One flipped bit in the name of the curve: a form of damage, and no fault of the reader's."""
    pem = issuer("broker-1")
    der = bytearray(base64.b64decode("".join(pem.splitlines()[1:-1])))
    curve = bytes.fromhex("06082a8648ce3d030107")
    der[der.index(curve) + len(curve) - 1] ^= 0x40
    body = base64.b64encode(bytes(der)).decode()
    lines = [body[start : start + 64] for start in range(0, len(body), 64)]
    damaged = "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])
    with pytest.raises(ValueError, match="its key cannot be used"):
        load_certificate(damaged)
