"""Key-encryption keys in files, in a token (SoftHSM) and in a vault's transit engine: each alone."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from transit_server import TransitServer, running_transit

from attestation.broker.config import CONFIG_NAME, load_config
from attestation.broker.keks import (
    KekFile,
    KeyEncryption,
    KeyRing,
    Wrapped,
    create_kek,
    load_kek,
    old_keks,
    open_resource,
    replace_kek,
    rewrap_resource,
    seal_resource,
)
from attestation.broker.token_kek import TokenKek, create_token_kek, token_kek
from attestation.broker.transit_kek import TransitKek
from attestation.errors import BrokerUnavailable
from policies.errors import Unusable, UnusableKey
from policies.keys import write_secret

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
NAME = "acme/key/model"
PIN = "7319"


def certificate_for(folder: Path, name: str = "vault") -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 in `folder`, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)

    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate, secret = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(made.public_bytes(Encoding.PEM))
    write_secret(secret, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, secret


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[TransitServer]:
    """A vault with the key `broker`; its CA is `vault.pem`, its token is in `token`."""
    certificate, key = certificate_for(tmp_path)
    write_secret(tmp_path / "token", b"s.a-token\n")
    server = TransitServer({"s.a-token"}, {"broker": [os.urandom(32)]})
    with running_transit(server, certificate, key) as running:
        yield running


def transit(vault: TransitServer, folder: Path, *, ca: str = "vault.pem") -> TransitKek:
    return TransitKek(vault.url, "broker", token_file=folder / "token", ca=folder / ca)


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A SoftHSM with the token `broker`, in which there is an AES key `kek`."""
    if not SOFTHSM.exists():
        pytest.skip("SoftHSM is not installed (apt install softhsm2)")
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    (folder / "softhsm.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nlog.level = ERROR\n")
    write_secret(folder / "pin", PIN.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm.conf"))
        init = ["softhsm2-util", "--init-token", "--free", "--label", "broker", "--pin", PIN, "--so-pin", "5678"]
        subprocess.run(init, check=True, capture_output=True, timeout=30)
        import pkcs11

        pkcs11.lib(str(SOFTHSM)).reinitialize()  # another test may have begun it with another folder
        create_token_kek(uri("kek"), PIN)
        create_token_kek(uri("second"), PIN)
        yield folder


def uri(key: str) -> str:
    return f"pkcs11:token=broker;object={key}?module-path={SOFTHSM}"


@pytest.fixture(params=["file", "token", "vault"])
def kek(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeyEncryption]:
    """A KEK of each kind."""
    made: KeyEncryption
    if request.param == "file":
        made = KekFile(os.urandom(32))
    elif request.param == "token":
        made = token_kek(uri("kek"), request.getfixturevalue("token_folder") / "pin", None)
    else:
        made = transit(request.getfixturevalue("vault"), tmp_path)
    yield made
    made.close()


def test_a_resource_comes_back_and_only_as_it_was_put(kek: KeyEncryption) -> None:
    stored = seal_resource(NAME, 3, b"value", kek)
    assert open_resource(stored, kek) == b"value"
    assert b"value" not in stored.sealed + stored.wrapped_key
    for other in (
        seal_resource("acme/key/other", 3, b"x", kek),
        seal_resource(NAME, 4, b"x", kek),
    ):
        moved = type(stored)(other.name, other.serial, stored.key_id, stored.wrapped_key, stored.sealed)
        with pytest.raises(BrokerUnavailable, match="were changed"):
            open_resource(moved, kek)
    for broken in (b"", stored.wrapped_key[:-1], bytes([stored.wrapped_key[0] ^ 1]) + stored.wrapped_key[1:]):
        with pytest.raises(BrokerUnavailable, match="were changed"):
            kek.unwrap(Wrapped(stored.key_id, broken), b"")
    with pytest.raises(BrokerUnavailable, match="another key-encryption key"):
        open_resource(stored, KekFile(bytes(32)))


def test_a_resource_goes_from_one_kek_to_another(kek: KeyEncryption) -> None:
    other = KekFile(os.urandom(32))
    old = seal_resource(NAME, 1, b"value", kek)
    new = rewrap_resource(old, KeyRing(other, [kek]))
    assert (new.key_id, new.sealed) == (other.key_id, old.sealed)
    assert open_resource(new, KeyRing(other)) == b"value"
    with pytest.raises(BrokerUnavailable, match="another key-encryption key"):
        open_resource(old, KeyRing(other))
    assert open_resource(rewrap_resource(new, KeyRing(kek, [other])), kek) == b"value"
    assert KeyRing(kek).probe() is None


def test_a_new_kek_file_keeps_the_old_one(tmp_path: Path) -> None:
    create_kek(tmp_path / "kek")
    old = load_kek(tmp_path / "kek")
    before, after = replace_kek(tmp_path / "kek")
    assert before == old.key_id != after == load_kek(tmp_path / "kek").key_id
    (kept,) = old_keks(tmp_path / "kek").iterdir()
    assert load_kek(kept).key_id == before
    assert kept.stat().st_mode & 0o777 == 0o600


# --- a token ----------------------------------------------------------------------------------------------------------


def test_a_token_that_is_gone_is_told_and_used_again_when_it_is_back(token_folder: Path) -> None:
    ring = KeyRing(kek := token_kek(uri("kek"), token_folder / "pin", None))
    stored = seal_resource(NAME, 1, b"value", ring)
    (token_folder / "tokens").rename(token_folder / "elsewhere")
    try:
        with pytest.raises(BrokerUnavailable, match="token broker cannot be used"):
            open_resource(stored, ring)
        assert "token broker cannot be used" in (KeyRing(kek).probe() or "")
    finally:
        (token_folder / "elsewhere").rename(token_folder / "tokens")
    assert open_resource(stored, ring) == b"value"
    assert KeyRing(kek).probe() is None
    kek.close()
    with pytest.raises(BrokerUnavailable, match="not used any more"):
        open_resource(stored, ring)


def test_a_token_that_hangs_holds_nobody_for_long(token_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attestation.broker.token_kek.SECONDS", 0.2)
    kek = token_kek(uri("kek"), token_folder / "pin", None)
    kek.wrap(bytes(32), b"")
    released = threading.Event()

    def stuck(_: object) -> bytes:
        released.wait(20)
        return b""

    with pytest.raises(BrokerUnavailable, match="did not answer"):
        kek._ask(stuck)
    with pytest.raises(BrokerUnavailable, match="has not answered"):
        kek.wrap(bytes(32), b"")
    released.set()
    monkeypatch.undo()
    end = time.monotonic() + 10
    while KeyRing(kek).probe() is not None and time.monotonic() < end:
        time.sleep(0.05)
    assert KeyRing(kek).probe() is None
    kek.close()


def test_a_pin_is_secret_and_comes_from_where_it_is_said(token_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_TEST_PIN", PIN)
    good = token_kek(uri("kek"), None, "SEAL_TEST_PIN")
    assert KeyRing(good).probe() is None
    good.close()
    monkeypatch.setenv("SEAL_TEST_PIN", "999999")
    wrong = token_kek(uri("kek"), None, "SEAL_TEST_PIN")
    problem = KeyRing(wrong).probe() or ""
    assert "pin incorrect" in problem
    assert "999999" not in problem
    monkeypatch.delenv("SEAL_TEST_PIN")
    assert "PIN is missing" in (KeyRing(wrong).probe() or "")
    wrong.close()


def test_two_keys_of_one_token_share_its_session(token_folder: Path) -> None:
    old, new = (token_kek(uri(name), token_folder / "pin", None) for name in ("kek", "second"))
    stored = seal_resource(NAME, 1, b"value", old)
    moved = rewrap_resource(stored, KeyRing(new, [old]))
    old.close()
    assert open_resource(moved, new) == b"value"
    new.close()


def test_a_token_s_key_must_be_one_that_cannot_be_read_out(token_folder: Path) -> None:
    import pkcs11

    none = TokenKek(uri("none"), lambda: PIN)
    assert "0 AES keys named none" in (KeyRing(none).probe() or "")
    none.close()
    with pkcs11.lib(str(SOFTHSM)).get_token(token_label="broker").open(rw=True, user_pin=PIN) as session:
        session.generate_key(
            pkcs11.KeyType.AES, 256, label="open", store=True, template={pkcs11.Attribute.EXTRACTABLE: True}
        )
    opened = TokenKek(uri("open"), lambda: PIN)
    assert "can be read out" in (KeyRing(opened).probe() or "")
    opened.close()
    with pytest.raises(UnusableKey, match="already"):
        create_token_kek(uri("kek"), PIN)


# --- a vault ----------------------------------------------------------------------------------------------------------


def test_a_vault_s_own_rotation_is_noticed_and_followed(vault: TransitServer, tmp_path: Path) -> None:
    ring = KeyRing(kek := transit(vault, tmp_path))
    old = seal_resource(NAME, 1, b"value", ring)
    assert old.key_id == "transit:transit/broker:v1"
    vault.rotate("broker")
    assert open_resource(old, ring) == b"value"
    assert KeyRing(kek).probe() is None
    assert ring.key_id == "transit:transit/broker:v2"
    new = rewrap_resource(old, ring)
    vault.min_decryption = 2
    assert open_resource(new, ring) == b"value"
    with pytest.raises(BrokerUnavailable, match="too old"):
        open_resource(old, ring)


def test_a_vault_that_refuses_or_is_gone_is_told_and_used_again_when_it_is_back(
    vault: TransitServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kek = transit(vault, tmp_path)
    stored = seal_resource(NAME, 1, b"value", kek)

    def refused(why: str) -> None:
        with pytest.raises(BrokerUnavailable, match=why) as told:
            open_resource(stored, kek)
        assert "s.a-token" not in str(told.value)

    vault.sealed = True
    refused("sealed")
    vault.sealed = False
    vault.tokens = {"s.another"}
    refused("permission denied")
    write_secret(tmp_path / "token", b"s.another")  # an agent has renewed it
    assert open_resource(stored, kek) == b"value"
    (tmp_path / "token").unlink()
    refused("cannot be asked")
    write_secret(tmp_path / "token", b"s.another")
    monkeypatch.setattr("attestation.broker.transit_kek.SECONDS", 1)
    slow = transit(vault, tmp_path)
    vault.delay = threading.Event()
    with pytest.raises(BrokerUnavailable, match=r"cannot be reached [(]ReadTimeout"):
        open_resource(stored, slow)
    vault.delay.set()
    vault.delay = None
    assert open_resource(stored, slow) == b"value"
    for one in (kek, slow):
        one.close()


def test_a_vault_that_ends_and_comes_back(tmp_path: Path) -> None:
    certificate, key = certificate_for(tmp_path)
    write_secret(tmp_path / "token", b"s.a-token")
    server = TransitServer({"s.a-token"}, {"broker": [os.urandom(32)]})
    with running_transit(server, certificate, key):
        kek = transit(server, tmp_path)
        stored = seal_resource(NAME, 1, b"value", kek)
    kek.close()
    with pytest.raises(BrokerUnavailable, match="cannot be reached"):
        open_resource(stored, kek)
    with running_transit(server, certificate, key):
        assert open_resource(stored, kek) == b"value"
    kek.close()


def test_another_s_vault_is_not_asked(vault: TransitServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate_for(tmp_path, "stranger")
    kek = transit(vault, tmp_path, ca="stranger.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "vault.pem"))
    monkeypatch.setenv("HTTPS_PROXY", vault.url)
    with pytest.raises(BrokerUnavailable, match=r"cannot be reached [(]SSLError"):
        kek.wrap(bytes(32), b"")
    assert vault.calls == []
    for wrong in ("http://127.0.0.1:1", "https://user:secret@vault.example", "vault.example"):
        with pytest.raises(UnusableKey):
            TransitKek(wrong, "broker", token_file=tmp_path / "token", ca=tmp_path / "vault.pem")
    with pytest.raises(UnusableKey):
        TransitKek(vault.url, "../sys/seal", token_file=tmp_path / "token", ca=tmp_path / "vault.pem")


def test_settings_name_a_kek(tmp_path: Path) -> None:
    def read(text: str) -> object:
        (tmp_path / CONFIG_NAME).write_text(f'name = "one"\nlisten = "127.0.0.1:1"\n{text}\n')
        return load_config(tmp_path / CONFIG_NAME).kek

    assert read("") == "keys/kek"
    assert read(f'kek = {{ kind = "pkcs11", uri = "{uri("kek")}", pin_env = "PIN" }}')
    assert read('[kek]\nkind = "transit"\nurl = "https://v"\nkey = "k"\ntoken_file = "t"\nca = "c"')
    for wrong in (
        f'kek = {{ kind = "pkcs11", uri = "{uri("kek")}" }}',
        f'kek = {{ kind = "pkcs11", uri = "{uri("kek")}", pin_env = "PIN", pin_file = "p" }}',
        f'kek = {{ kind = "pkcs11", uri = "{uri("kek")}", pin = "7319" }}',
        'kek = { kind = "cloud" }',
        "kek = 3",
    ):
        with pytest.raises(Unusable) as told:
            read(wrong)
        assert "7319" not in str(told.value)
