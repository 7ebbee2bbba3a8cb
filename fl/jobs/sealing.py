"""Models on their way: the first model to the server under the model key, the result to its recipients' keys."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.hybrid import HybridPrivateKey
from attestation.hybrid import seal as seal_to_key
from fl.errors import SealedDataRefused
from fl.guard.sealed_data import KEY_SIZE, SALT_SIZE, seal, unseal
from fl.tensors import Buffer

FIRST_MODEL: Final = "model.safetensors"
_FIRST_MODEL_PURPOSE: Final = b"sealwright-first-model-v1\0"
_RESULT_PURPOSE: Final = b"sealwright-result-v1\0"


def seal_first_model(model: bytes, model_key: bytes, job: str, *, random: Callable[[int], bytes]) -> bytes:
    """The first model of `job`, sealed under the model key for this job alone."""
    return b"".join(seal({FIRST_MODEL: model}, _key_of_job(model_key, job), salt=random(SALT_SIZE)))


def open_first_model(sealed: bytes, model_key: bytes, job: str, *, max_bytes: int) -> bytes:
    """Open what `seal_first_model` made for this job. Raises SealedDataRefused."""
    where = f"first model of {job}"
    entries = unseal(
        io.BytesIO(sealed), _key_of_job(model_key, job), where=where, max_bytes=max_bytes + 4096, file_size=len(sealed)
    )
    if entries.keys() != {FIRST_MODEL}:
        raise SealedDataRefused("it holds something else than one model", where=where)
    return entries[FIRST_MODEL]


@dataclass(frozen=True, slots=True)
class SealedResult:
    """A result: its files sealed once under a key of their own, and that key sealed to each recipient."""

    payload: bytes | bytearray
    keys: Mapping[str, bytes]


def seal_result(
    files: Mapping[str, Buffer], recipients: Mapping[str, bytes], job: str, *, random: Callable[[int], bytes]
) -> SealedResult:
    """Seal `files` of `job` to each recipient's raw hybrid public key."""
    key = random(KEY_SIZE)
    payload = bytearray()
    for piece in seal(files, key, salt=random(SALT_SIZE)):
        payload += piece
    return SealedResult(
        payload, {name: seal_to_key(key, public, info=_result_info(job, name)) for name, public in recipients.items()}
    )


def open_result(
    payload: bytes, sealed_key: bytes, key: HybridPrivateKey, job: str, recipient: str, *, max_bytes: int
) -> dict[str, bytes]:
    """The files of a result sealed to `recipient`. Raises Refused if it was made for another key, job or recipient."""
    file_key = key.open(sealed_key, info=_result_info(job, recipient))
    return unseal(io.BytesIO(payload), file_key, where=f"result of {job}", max_bytes=max_bytes, file_size=len(payload))


def _result_info(job: str, recipient: str) -> bytes:
    return _RESULT_PURPOSE + job.encode() + b"\0" + recipient.encode()


def _key_of_job(model_key: bytes, job: str) -> bytes:
    if len(model_key) != KEY_SIZE:
        raise SealedDataRefused(f"a model key has {KEY_SIZE} bytes, this one {len(model_key)}", where="model key")
    return HKDF(algorithm=SHA256(), length=KEY_SIZE, salt=None, info=_FIRST_MODEL_PURPOSE + job.encode()).derive(
        model_key
    )
