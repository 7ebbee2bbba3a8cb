"""An OCI image layout to and from a registry, by the OCI distribution specification 1.1 over urllib3.

A reference is `oci://HOST[:PORT]/NAME[:TAG | @sha256:…]`, over TLS with this host's trusted certificates (OpenSSL's
SSL_CERT_FILE names others); a registry of this host's loopback may be reached in clear, by `oci+http://`. Who asks for
a name and password gets them only from the registry itself, or from the token service that it names over TLS.

A registry is believed in nothing: each blob's size and digest are compared while it comes, and what they make up goes
through `cvm_image.oci.import_image` before it counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from pydantic import ValidationError
from urllib3.exceptions import HTTPError

from cvm_image.errors import ImageRefused, UnusableImage
from cvm_image.oci import MANIFEST_TYPE, MAX_DOCUMENT, Descriptor, Manifest, read_layout, write_layout

SCHEMES: Final = ("oci", "oci+http")
CONNECT_SECONDS: Final = 20.0
SILENT_SECONDS: Final = 120.0
"""How long a registry may say nothing in the middle of an answer."""
MAX_ANSWER: Final = 64 << 10
_PIECE: Final = 1 << 20
_REFERENCE: Final = re.compile(
    r"(?P<scheme>oci|oci\+http)://(?P<host>[A-Za-z0-9.-]{1,253}(?::\d{1,5})?)/"
    r"(?P<name>[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_LOOPBACK: Final = re.compile(r"(localhost|127\.\d+\.\d+\.\d+)(:\d+)?")
_PARAMETER: Final = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Reference:
    """A place in a registry: `where` is a tag or a digest."""

    base: str
    name: str
    where: str

    def url(self, rest: str) -> str:
        """The URL of a resource of this repository."""
        return f"{self.base}/v2/{self.name}/{rest}"


def is_reference(text: str) -> bool:
    """Whether it is meant as a reference, and not as a folder."""
    return text.partition("://")[0] in SCHEMES


def parse_reference(text: str) -> Reference:
    """Read a reference; the tag is `latest` if it names none. Raises UnusableImage."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise UnusableImage("this is no reference", where=text[:200], do="Write it like oci://registry.example/fl:1.")
    clear = match["scheme"] == "oci+http"
    if clear and not _LOOPBACK.fullmatch(match["host"]):
        raise UnusableImage("only a registry of this host is asked in clear", where=text, do="Use oci://.")
    base = f"{'http' if clear else 'https'}://{match['host']}"
    return Reference(base, match["name"], match["digest"] or match["tag"] or "latest")


def push_layout(layout: Path, reference: Reference, login: str | None = None) -> str:
    """Put the layout's one artefact into the registry under the reference; return its digest.

    `login`: `user:password`, if the registry asks. Raises ImageRefused if it does not take what it should.
    """
    described, manifest = read_layout(layout)
    if reference.where.startswith("sha256:") and reference.where != described.digest:
        raise ImageRefused("the artefact has another digest", where=reference.where, do=f"It is {described.digest}.")
    registry = _Registry(reference, login, "pull,push")
    for blob in {one.digest: one for one in (manifest.config, *manifest.layers)}.values():
        if registry.has(blob):
            continue
        with (layout / "blobs/sha256" / blob.digest.removeprefix("sha256:")).open("rb") as file:
            registry.upload(blob, file)
    raw = (layout / "blobs/sha256" / described.digest.removeprefix("sha256:")).read_bytes()
    registry.put_manifest(raw)
    return described.digest


def pull_layout(reference: Reference, layout: Path, login: str | None = None) -> str:
    """Write what the reference names as a new layout; return its digest.

    Raises UnusableImage for what is no artefact of ours, ImageRefused for bytes that are not what their digest says.
    """
    registry = _Registry(reference, login, "pull")
    raw = registry.get_manifest()
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    if reference.where.startswith("sha256:") and digest != reference.where:
        raise ImageRefused("the registry gave another manifest", where=reference.where, do="Ask another registry.")
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UnusableImage(
            f"this is no image of ours: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=reference.url(reference.where),
            do="Check the reference.",
        ) from None
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for blob in {one.digest: one for one in (manifest.config, *manifest.layers)}.values():
        with (blobs / blob.digest.removeprefix("sha256:")).open("xb") as file:
            registry.download(blob, file)
    write_layout(layout, raw, reference.where.removeprefix("sha256:")[:128])
    return digest


class _Registry:
    """One repository of one registry, for one push or pull."""

    def __init__(self, reference: Reference, login: str | None, actions: str) -> None:
        self._reference = reference
        self._login = login
        self._actions = actions
        self._authorization: str | None = None
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=SILENT_SECONDS)
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._pool = urllib3.PoolManager(timeout=timeout, retries=False, ssl_context=context)

    def has(self, blob: Descriptor) -> bool:
        with self._asked("HEAD", self._reference.url(f"blobs/{blob.digest}"), good=(200, 404)) as answer:
            return answer.status == 200

    def upload(self, blob: Descriptor, file: BinaryIO) -> None:
        """POST, then one PUT (distribution-spec, "Pushing a blob monolithically")."""
        start = self._reference.url("blobs/uploads/")
        with self._asked("POST", start, good=(202,)) as answer:
            location = urljoin(start, answer.headers.get("Location", ""))
        if urlsplit(location)[:2] != urlsplit(start)[:2]:
            raise self._refused("it sends uploads to another host", location)
        joint = "&" if urlsplit(location).query else "?"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
        url = f"{location}{joint}{urlencode({'digest': blob.digest})}"
        with self._asked("PUT", url, good=(201,), headers=headers, body=file):
            return

    def put_manifest(self, raw: bytes) -> None:
        url = self._reference.url(f"manifests/{self._reference.where}")
        with self._asked("PUT", url, good=(201,), headers={"Content-Type": MANIFEST_TYPE}, body=raw):
            return

    def get_manifest(self) -> bytes:
        url = self._reference.url(f"manifests/{self._reference.where}")
        with self._asked("GET", url, good=(200,), headers={"Accept": MANIFEST_TYPE}) as answer:
            raw = answer.read(MAX_DOCUMENT + 1)
        if len(raw) > MAX_DOCUMENT:
            raise self._refused("its manifest is too large", url)
        return bytes(raw)

    def download(self, blob: Descriptor, file: BinaryIO) -> None:
        """GET, compared with size and digest while it comes. A registry may send to a storage of its own."""
        url = self._reference.url(f"blobs/{blob.digest}")
        digest, left = hashlib.sha256(), blob.size
        with self._asked("GET", url, good=(200,), redirects=True) as answer:
            while piece := answer.read(min(_PIECE, left + 1)):
                left -= len(piece)
                if left < 0:
                    break
                digest.update(piece)
                file.write(piece)
        if left != 0 or f"sha256:{digest.hexdigest()}" != blob.digest:
            raise ImageRefused("a blob is not what its descriptor says", where=url, do="Ask another registry.")

    @contextlib.contextmanager
    def _asked(
        self,
        method: str,
        url: str,
        *,
        good: tuple[int, ...],
        headers: Mapping[str, str] | None = None,
        body: bytes | BinaryIO | None = None,
        redirects: bool = False,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """One request, and once more if the registry asks who we are. The answer's body is read within the block."""
        sent = dict(headers or {})
        try:
            for attempt in range(2):
                if self._authorization is not None:
                    sent["Authorization"] = self._authorization
                answer = self._pool.request(
                    method, url, headers=sent, body=body, preload_content=False, redirect=False, decode_content=False
                )
                if answer.status == 401 and attempt == 0:
                    self._authorization = self._authorized(answer)
                    answer.close()
                    if not (body is None or isinstance(body, bytes)):
                        body.seek(0)
                    continue
                break
            if redirects and answer.status in {302, 303, 307, 308}:
                answer = self._elsewhere(url, answer)
            try:
                if answer.status not in good:
                    raise self._refused(f"{method}: status {answer.status}: {_words(answer)}", url)
                yield answer
            finally:
                answer.close()
        except HTTPError as error:
            raise UnusableImage(
                f"the registry cannot be asked: {error}",
                where=self._reference.base,
                do="Check its name and certificate.",
            ) from None

    def _elsewhere(self, url: str, answer: urllib3.BaseHTTPResponse) -> urllib3.BaseHTTPResponse:
        """Follow a blob to its storage: once, without our name, and never from TLS to clear."""
        target = urljoin(url, answer.headers.get("Location", ""))
        answer.close()
        if urlsplit(target).scheme != urlsplit(url).scheme:
            raise self._refused("it sends downloads to another scheme", target)
        return self._pool.request("GET", target, preload_content=False, redirect=False, decode_content=False)

    def _authorized(self, answer: urllib3.BaseHTTPResponse) -> str:
        """What to answer to `WWW-Authenticate`: the login itself, or a token that it earns (token authentication)."""
        asked = answer.headers.get("WWW-Authenticate", "")
        kind, _, rest = asked.partition(" ")
        basic = None if self._login is None else urllib3.make_headers(basic_auth=self._login)["authorization"]
        if kind.lower() == "basic" and basic is not None:
            return basic
        if kind.lower() != "bearer":
            raise self._refused("it wants to know who asks", self._reference.base)
        words = dict(_PARAMETER.findall(rest))
        realm = urlsplit(words.get("realm", ""))
        if realm.scheme != "https" and realm[:2] != urlsplit(self._reference.base)[:2]:
            raise self._refused("its token service is not reached by TLS", words.get("realm", ""))
        scope = f"repository:{self._reference.name}:{self._actions}"
        query = urlencode({"service": words.get("service", ""), "scope": scope})
        url = f"{realm.geturl()}{'&' if realm.query else '?'}{query}"
        given = self._pool.request(
            "GET", url, headers={"Authorization": basic} if basic else {}, preload_content=False, redirect=False
        )
        raw = given.read(MAX_ANSWER)
        given.close()
        try:
            document: Any = json.loads(raw)
            token = document.get("token") or document["access_token"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            token = None
        if given.status != 200 or not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]{1,16384}", token):
            raise self._refused(f"its token service gives no token (status {given.status})", realm.geturl())
        return f"Bearer {token}"

    def _refused(self, what: str, where: str) -> ImageRefused:
        return ImageRefused(f"the registry refuses: {what}", where=where[:300], do="Check name, login and rights.")


def _words(answer: urllib3.BaseHTTPResponse) -> str:
    """What an answer says is wrong (distribution-spec, "Error codes"), shortened and printable."""
    text = answer.read(2048).decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, IndexError):
        text = str(json.loads(text)["errors"][0]["code"])
    return re.sub(r"[^\x20-\x7e]+", " ", text)[:200].strip() or "it says nothing"
