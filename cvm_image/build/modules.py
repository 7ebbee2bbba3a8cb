"""Kernel modules that the build compiles, and their signatures, which outlive the key that made them.

A key that anyone can use proves nothing, and a key that is made anew for each build makes each build another image. So
the modules are signed once, when the recipe is locked: by a key that is made for it and is gone when the lock is
written. Lock and image hold its certificate and the signatures; a build compiles the modules again, the same bits,
compares them with those that were signed, and puts the signatures on. Nobody can sign another module for the image.

A signature is what the kernel's own `sign-file` makes: PKCS#7 without certificates and attributes, behind the module,
with its length and a magic word (Linux, Documentation/admin-guide/module-signing.rst).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import struct
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from asn1crypto import cms
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cvm_image.build.errors import BuildFailed
from cvm_image.build.lock import LockedModule
from cvm_image.build.tools import Mount, Tools

MAGIC = b"~Module signature appended~\n"
_TRAILER = struct.Struct(">BBBBB3sI")
_PKCS7 = 2
_RSA_BITS = 4096
_OPTIONS = [
    pkcs7.PKCS7Options.DetachedSignature,
    pkcs7.PKCS7Options.Binary,
    pkcs7.PKCS7Options.NoAttributes,
    pkcs7.PKCS7Options.NoCerts,
]


@dataclass(frozen=True)
class Edit:
    """A change of the source before it is compiled: `old` stands in `file` exactly once, and becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class ModuleSource:
    """Where modules come from: a tar archive, the folder in it with a Makefile, and which modules are wanted."""

    archive: Path
    folder: str
    modules: tuple[str, ...]
    edits: tuple[Edit, ...] = ()


def compile_modules(
    compiler: Tools, source: ModuleSource, folder: Path, *, release: str, epoch: int
) -> dict[str, bytes]:
    """Compile the modules for the kernel `release`, whose headers are in the compiler's tree; return name → bytes.

    `folder` is an empty one to work in. The same tree and source give the same bytes. Raises BuildFailed.
    """
    with tarfile.open(source.archive) as archive:
        archive.extractall(folder, filter="data")
    where = folder / source.folder
    for edit in source.edits:
        path = where / edit.file
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise BuildFailed(
                f"{edit.file} is not the source that the edit is for", where=str(source.archive), do="Renew the edit."
            )
        path.write_text(text.replace(edit.old, edit.new))
    common = re.sub(r"-(cloud-)?amd64$", "-common", release)
    env = {
        "SOURCE_DATE_EPOCH": str(epoch),
        "KBUILD_BUILD_TIMESTAMP": f"@{epoch}",
        "KBUILD_BUILD_USER": "build",
        "KBUILD_BUILD_HOST": "build",
    }
    inside = f"/build/source/{source.folder}"
    words = ["make", "-C", inside, f"-j{os.cpu_count() or 1}", "modules", f"SYSSRC=/usr/src/linux-headers-{common}"]
    words += [f"SYSOUT=/usr/src/linux-headers-{release}", "IGNORE_CC_MISMATCH=1"]
    mounts = (Mount(folder, "/build/source", writable=True),)
    compiler.run(words, what="compiling kernel modules", mounts=mounts, env=env, timeout=7200)
    files = [f"{inside}/{name}.ko" for name in source.modules]
    compiler.run(["strip", "--strip-debug", *files], what="stripping kernel modules", mounts=mounts)
    return {name: (where / f"{name}.ko").read_bytes() for name in source.modules}


def sign_modules(modules: Mapping[str, bytes], name: str) -> tuple[str, list[LockedModule]]:
    """Sign the modules with a key that is made here and kept nowhere; return what the lock holds of it."""
    key = rsa.generate_private_key(65537, _RSA_BITS)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} drivers")])
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=36500))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    signed = []
    for module, data in sorted(modules.items()):
        builder = pkcs7.PKCS7SignatureBuilder().set_data(data).add_signer(certificate, key, hashes.SHA256())
        signature = builder.sign(serialization.Encoding.DER, _OPTIONS)
        digest = hashlib.sha256(data).hexdigest()
        signed.append(LockedModule(name=module, sha256=digest, signature=base64.b64encode(signature).decode()))
    return base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode(), signed


def put_signatures(
    modules: Mapping[str, bytes], signed: Sequence[LockedModule], certificate: bytes
) -> dict[str, bytes]:
    """Return the modules with the lock's signatures behind them, as the kernel reads them.

    Raises BuildFailed for a module that is not the one that was signed, or a signature by another key.
    """
    if sorted(modules) != sorted(one.name for one in signed):
        raise BuildFailed("the lock has signatures of other modules", where="lock", do="Renew it: seal image lock.")
    whole = {}
    for one in signed:
        data = modules[one.name]
        if hashlib.sha256(data).hexdigest() != one.sha256:
            raise BuildFailed(
                f"the module {one.name} was compiled to other bits than those that were signed",
                where="lock",
                do="Compile with the lock's packages, or renew it: seal image lock.",
            )
        signature = base64.b64decode(one.signature, validate=True)
        whole[one.name] = data + signature + _TRAILER.pack(0, 0, _PKCS7, 0, 0, bytes(3), len(signature)) + MAGIC
        if not is_signed_by(whole[one.name], certificate):
            raise BuildFailed(
                f"the signature of {one.name} is not by the lock's certificate", where="lock", do="Renew the lock."
            )
    return whole


def is_signed_by(module: bytes, certificate: bytes) -> bool:
    """Whether a module ends with a valid signature by the key of the certificate (DER), as the kernel checks it."""
    try:
        if not module.endswith(MAGIC):
            return False
        end = len(module) - len(MAGIC) - _TRAILER.size
        *head, size = _TRAILER.unpack_from(module, end)
        if head != [0, 0, _PKCS7, 0, 0, bytes(3)] or not 0 < size < end:
            return False
        info = cms.ContentInfo.load(module[end - size : end], strict=True)["content"]["signer_infos"]
        if len(info) != 1 or info[0]["signed_attrs"] or info[0]["digest_algorithm"]["algorithm"].native != "sha256":
            return False
        public = x509.load_der_x509_certificate(certificate).public_key()
        if not isinstance(public, rsa.RSAPublicKey):
            return False
        public.verify(info[0]["signature"].native, module[: end - size], padding.PKCS1v15(), hashes.SHA256())
    except (ValueError, TypeError, KeyError, struct.error, InvalidSignature):
        return False
    return True


def signer_of(module: bytes) -> str | None:
    """Which certificate a module says it is signed by (issuer and serial number); nothing is verified. None: unread."""
    try:
        end = len(module) - len(MAGIC) - _TRAILER.size
        size = _TRAILER.unpack_from(module, end)[-1]
        sid = cms.ContentInfo.load(module[end - size : end], strict=True)["content"]["signer_infos"][0]["sid"].chosen
        return str(sid.dump().hex())
    except (ValueError, TypeError, KeyError, IndexError, struct.error):
        return None


def needs_of(module: bytes) -> tuple[str, ...]:
    """The modules that a module says it needs (`depends=` of its .modinfo)."""
    found = re.search(rb"(?:^|\0)depends=([a-z0-9_,-]*)\0", module)
    return tuple(name for name in found[1].decode().split(",") if name) if found else ()
