"""An image to a registry and back: a real one (Debian's docker-registry), with and without TLS, login and tokens.

What the registry's host changes is refused on the way in. skopeo, another client, carries the same artefact.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from joserfc import jwt
from joserfc.jwk import ECKey
from typer.testing import CliRunner

from appliance.commands.image import app
from cvm_image.errors import ImageRefused, UnusableImage
from cvm_image.generate import generate_image
from cvm_image.oci import export_image, import_image
from cvm_image.registry import parse_reference, pull_layout, push_layout
from cvm_image.signing import SigningKeys
from policies.errors import Unusable

KEYS = SigningKeys(Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()))
BUILDER = KEYS.builder.public_key()
LOGIN = "acme:a password"
HTPASSWD = "acme:$2b$05$abcdefghijklmnopqrstuu2sM.EEHj4jPcCa5rwqJGg1PNBllkZXy\n"
START_SECONDS = 20.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("source") / "probe"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "entry.py").write_text("def main(guest):\n    return 0\n")
    folder = tmp_path_factory.mktemp("made") / "image"
    generate_image(folder, name="probe", keys=KEYS, packages=[package], entry="probe.entry")
    return folder


@pytest.fixture
def layout(image: Path, tmp_path: Path) -> Path:
    export_image(image, tmp_path / "layout")
    return tmp_path / "layout"


@dataclass
class Registry:
    """A running registry: the base of references to it, and the folder that it stores in."""

    base: str
    storage: Path

    def blob(self, digest: str) -> Path:
        """Where it keeps a blob."""
        algorithm, _, value = digest.partition(":")
        return self.storage / "docker/registry/v2/blobs" / algorithm / value[:2] / value / "data"


@contextlib.contextmanager
def running(folder: Path, scheme: str = "oci+http", **sections: Any) -> Iterator[Registry]:
    """docker-registry on a free port of the loopback interface; `sections` go into its settings."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (apt-get install docker-registry)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    http = {"addr": f"127.0.0.1:{port}", "secret": "x", **sections.pop("http", {})}
    settings = {
        "version": 0.1, "log": {"level": "warn"}, "http": http,
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}}, **sections,
    }  # fmt: skip
    (folder / "registry.json").write_text(json.dumps(settings))  # JSON is YAML
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(folder / "registry.json")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            gone = process.poll() is not None or time.monotonic() > deadline
            assert not gone, (folder / "registry.log").read_text()
            time.sleep(0.05)
        yield Registry(f"{scheme}://127.0.0.1:{port}", folder / "storage")
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as one:
        yield one


def builder_pem() -> bytes:
    return BUILDER.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_image_comes_back_as_it_went(registry: Registry, image: Path, layout: Path, tmp_path: Path) -> None:
    reference = parse_reference(f"{registry.base}/acme/probe:1.0")
    digest = push_layout(layout, reference)
    assert push_layout(layout, reference) == digest, "again, with every blob there already"
    assert pull_layout(reference, tmp_path / "again") == digest
    import_image(tmp_path / "again", tmp_path / "image", BUILDER)
    assert contents(tmp_path / "image") == contents(image)
    named = parse_reference(f"{registry.base}/acme/probe@{digest}")
    assert pull_layout(named, tmp_path / "named") == digest


def test_the_verbs_take_references(registry: Registry, image: Path, tmp_path: Path) -> None:
    (tmp_path / "builder.pem").write_bytes(builder_pem())
    (tmp_path / "login").touch(mode=0o600)
    (tmp_path / "login").write_text(f"{LOGIN}\n")
    where, known = f"{registry.base}/by/verbs:2", ("--login", tmp_path / "login", "--json")
    assert seal("export", image, where, *known)["reference"] == where
    taken = seal("import", where, tmp_path / "new/image", "--builder", tmp_path / "builder.pem", *known)
    assert taken["verified"] is True
    assert contents(tmp_path / "new/image") == contents(image)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["image"]
    with pytest.raises(ImageRefused, match="status 404: MANIFEST_UNKNOWN"):
        seal("import", f"{registry.base}/by/nobody:2", tmp_path / "none", "--builder", tmp_path / "builder.pem")
    assert not (tmp_path / "none").exists()
    (tmp_path / "login").write_text("no login")
    with pytest.raises(Unusable, match="is not one line `user:password`"):
        seal("export", image, where, *known)


def seal(*words: object) -> dict[str, Any]:
    """The verb of `seal image` in this process; what it prints, or what it raises."""
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None:
        raise done.exception
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_what_the_registry_s_host_changes_is_refused(registry: Registry, layout: Path, tmp_path: Path) -> None:
    reference = parse_reference(f"{registry.base}/changed/probe:1")
    push_layout(layout, reference)
    manifest = json.loads(registry.blob(pushed(layout)).read_bytes())
    for change in (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: raw + b"x", lambda raw: raw[:-1]):
        blob = registry.blob(manifest["layers"][0]["digest"])
        honest = blob.read_bytes()
        blob.write_bytes(change(honest))
        try:
            with pytest.raises((ImageRefused, UnusableImage)) as caught:
                pull_layout(reference, tmp_path / f"refused-{len(list(tmp_path.iterdir()))}")
        finally:
            blob.write_bytes(honest)
        assert "a blob is not what its descriptor says" in str(caught.value) or "cannot be asked" in str(caught.value)


def pushed(layout: Path) -> str:
    """The digest of the layout's artefact."""
    return str(json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"])


def test_an_image_that_somebody_else_signed_is_refused(registry: Registry, layout: Path, tmp_path: Path) -> None:
    reference = parse_reference(f"{registry.base}/foreign/probe:1")
    push_layout(layout, reference)
    pull_layout(reference, tmp_path / "pulled")
    with pytest.raises(ImageRefused):
        import_image(tmp_path / "pulled", tmp_path / "image", Ed25519PrivateKey.generate().public_key())
    assert not (tmp_path / "image").exists()


def test_skopeo_carries_the_artefact(registry: Registry, image: Path, layout: Path, tmp_path: Path) -> None:
    """Another client pushes the layout, and takes what we pushed."""
    program = shutil.which("skopeo")
    if program is None:
        pytest.skip("skopeo is not installed (apt-get install skopeo)")
    host = registry.base.partition("://")[2]
    insecure = ("--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false")

    def copy(source: str, target: str) -> None:
        done = subprocess.run(
            [program, *insecure, source, target], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr

    copy(f"oci:{layout}", f"docker://{host}/skopeo/probe:1")
    assert pull_layout(parse_reference(f"{registry.base}/skopeo/probe:1"), tmp_path / "pulled") == pushed(layout)
    copy(f"docker://{host}/skopeo/probe:1", f"oci:{tmp_path / 'copied'}:probe")
    import_image(tmp_path / "copied", tmp_path / "image", BUILDER)
    assert contents(tmp_path / "image") == contents(image)


# --- TLS, logins, tokens ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, as files."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "registry")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


def test_over_tls_with_a_login(
    certificate: tuple[Path, Path], layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    tls = {"tls": {"certificate": str(certificate[0]), "key": str(certificate[1])}}
    auth = {"htpasswd": {"realm": "here", "path": str(tmp_path / "htpasswd")}}
    with running(tmp_path, "oci", http=tls, auth=auth) as registry:
        reference = parse_reference(f"{registry.base}/acme/probe:1")
        with pytest.raises(UnusableImage, match="certificate verify failed"):
            push_layout(layout, reference, LOGIN)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with pytest.raises(ImageRefused, match="it wants to know who asks"):
            push_layout(layout, reference)
        digest = push_layout(layout, reference, LOGIN)
        assert pull_layout(reference, tmp_path / "pulled", LOGIN) == digest
        with pytest.raises(ImageRefused, match="status 401") as caught:
            pull_layout(reference, tmp_path / "none", "acme:another password")
        assert "another password" not in str(caught.value)
    assert contents(tmp_path / "pulled").keys() == contents(layout).keys()


def token_service(certificate: Path, key: Path, *, tls: bool) -> http.server.ThreadingHTTPServer:
    """The issuer that registries with token authentication send their clients to; it knows LOGIN alone."""
    signing = ECKey.import_key(key.read_bytes())
    der = x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(Encoding.DER)
    header = {"alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
    known = f"Basic {base64.b64encode(LOGIN.encode()).decode()}"

    class Service(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = parse_qs(urlsplit(self.path).query)
            kind, name, actions = asked["scope"][0].split(":")
            allowed = actions.split(",") if self.headers.get("Authorization") == known else []
            now = int(time.time())
            claims = {
                "iss": "here", "sub": "acme", "aud": asked["service"][0], "jti": os.urandom(8).hex(),
                "exp": now + 300, "nbf": now - 10, "iat": now,
                "access": [{"type": kind, "name": name, "actions": allowed}],
            }  # fmt: skip
            raw = json.dumps({"token": jwt.encode(header, claims, signing)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


@contextlib.contextmanager
def with_tokens(certificate: tuple[Path, Path], folder: Path, *, tls: bool) -> Iterator[Registry]:
    """A registry whose clients need tokens of a service."""
    server = token_service(*certificate, tls=tls)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    realm = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}/token"
    auth = {"token": {"realm": realm, "service": "probe", "issuer": "here", "rootcertbundle": str(certificate[0])}}
    try:
        with running(folder, auth=auth) as one:
            yield one
    finally:
        server.shutdown()
        server.server_close()


def test_with_tokens(
    certificate: tuple[Path, Path], layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with with_tokens(certificate, tmp_path, tls=True) as registry:
        reference = parse_reference(f"{registry.base}/acme/probe:1")
        digest = push_layout(layout, reference, LOGIN)
        assert pull_layout(reference, tmp_path / "pulled", LOGIN) == digest
        with pytest.raises(ImageRefused, match="HEAD: status 401"):
            push_layout(layout, reference)
        with pytest.raises(ImageRefused, match="status 401: UNAUTHORIZED"):
            pull_layout(reference, tmp_path / "none", "acme:wrong")


def test_a_login_is_not_told_to_a_token_service_in_clear(
    certificate: tuple[Path, Path], layout: Path, tmp_path: Path
) -> None:
    with with_tokens(certificate, tmp_path, tls=False) as registry:
        reference = parse_reference(f"{registry.base}/acme/probe:1")
        with pytest.raises(ImageRefused, match="its token service is not reached by TLS"):
            push_layout(layout, reference, LOGIN)


# --- references ---


@pytest.mark.parametrize(
    "text",
    [
        "oci://", "oci://host", "oci://host/", "oci://host/UPPER", "oci://host/a/../b", "oci://user@host/a",
        "oci://host/a:b:c", "oci://host/a@sha256:12", "oci://host/a?x=1", "https://host/a", "oci+http://example.com/a:1",
        "oci+http://127.0.0.1.example.com/a",
    ],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UnusableImage):
        parse_reference(text)
