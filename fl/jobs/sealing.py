"""Models on their way: the first model to the server under the model key, the result to its recipients' keys."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.hybrid import HybridPrivateKey
from attestation.hybrid import seal as seal_to_key
from fl.errors import SealedDataRefused
from fl.guard.sealed_data import KEY_SIZE, SALT_SIZE, Long, entries_of, opened, seal, sealed_size, sizes_of, unseal
from fl.tensors import Buffer
from fl.transport.drafts import ModelDraft, written
from fl.transport.memory import SealedMemory
from fl.transport.spool import PIECE, Spool, Spooled
from fl.transport.stored import Stored

FIRST_MODEL: Final = "model.safetensors"
_FILE_PURPOSE: Final = b"sealwright-job-file-v1\0"
_FIRST_MODEL_PURPOSE: Final = b"sealwright-first-model-v1\0"
_RESULT_PURPOSE: Final = b"sealwright-result-v1\0"


def seal_first_model(model: Buffer, model_key: bytes, job: str, *, random: Callable[[int], bytes]) -> bytes:
    """The first model of `job`, sealed under the model key for this job alone."""
    return b"".join(seal({FIRST_MODEL: model}, _key_of_job(model_key, job), salt=random(SALT_SIZE)))


def open_first_model(
    sealed: Buffer | Stored, model_key: bytes, job: str, *, max_bytes: int, spool: Spool | None = None
) -> SealedMemory | Spooled:
    """Open what `seal_first_model` made for this job, chunk by chunk into memory, or into the spool if it is too large.

    Raises SealedDataRefused, SpoolFailed.
    """
    key = _key_of_job(model_key, job)
    return _open_one(sealed, key, FIRST_MODEL, where=f"first model of {job}", max_bytes=max_bytes, spool=spool)


def seal_file_of_job(data: Long, sha256: str, model_key: bytes, job: str, *, random: Callable[[int], bytes]) -> Stored:
    """A large file of `job` with this digest, sealed under the model key for this job alone."""
    entries, key = {sha256: data}, _key_of_job(model_key, job, _FILE_PURPOSE)
    return SealedMemory.of_pieces(sealed_size(sizes_of(entries)), seal(entries, key, salt=random(SALT_SIZE)))


def sealed_file_size(sha256: str, size: int) -> int:
    """How many bytes `seal_file_of_job` makes of a file of `size` bytes."""
    return sealed_size({sha256: size})


def open_file_of_job(
    sealed: Stored, sha256: str, size: int, model_key: bytes, job: str, *, spool: Spool | None = None
) -> SealedMemory | Spooled:
    """Open what `seal_file_of_job` made. Raises SealedDataRefused unless it is the file of this size and digest."""
    key, where = _key_of_job(model_key, job, _FILE_PURPOSE), f"file {sha256} of {job}"
    found = _open_one(sealed, key, sha256, where=where, max_bytes=size, spool=spool)
    if found.size != size or found.digest != sha256:
        found.close()
        raise SealedDataRefused("it is not the file that the bundle names", where=where)
    return found


def _open_one(
    sealed: Buffer | Stored, key: bytes, entry: str, *, where: str, max_bytes: int, spool: Spool | None
) -> SealedMemory | Spooled:
    """The one entry, of this name, of a sealed file. Raises SealedDataRefused, SpoolFailed."""
    parts = sealed.pieces(0, PIECE) if isinstance(sealed, Stored) else iter([memoryview(sealed)])
    file_size = sealed.size if isinstance(sealed, Stored) else len(sealed)
    total, chunks = opened(_Stream(parts), key, where=where, max_bytes=max_bytes + 4096, file_size=file_size)
    found: SealedMemory | Spooled | None = None
    for name, size, pieces in entries_of(total, chunks, where=where):
        if name != entry or not size or found is not None:
            raise SealedDataRefused(f"it holds something else than {entry}", where=where)
        found = written(size, pieces, spool)
    if found is None:
        raise SealedDataRefused("it holds nothing", where=where)
    return found


class _Stream:
    """Pieces, read one after the other."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        found = bytearray()
        while len(found) < size:
            if not self._rest:
                self._rest = next(self._pieces, memoryview(b""))
                if not self._rest:
                    break
            taken = self._rest[: size - len(found)]
            self._rest = self._rest[len(taken) :]
            found += taken
        return bytes(found)


@dataclass(frozen=True, slots=True)
class SealedResult:
    """A result: its files sealed once under a key of their own, and that key sealed to each recipient."""

    payload: Stored
    keys: Mapping[str, bytes]


def seal_result(
    files: Mapping[str, Buffer | Stored],
    recipients: Mapping[str, bytes],
    job: str,
    *,
    random: Callable[[int], bytes],
    spool: Spool | None = None,
) -> SealedResult:
    """Seal `files` of `job` to each recipient's raw hybrid public key. Raises SpoolFailed."""
    key = random(KEY_SIZE)
    keys = {name: seal_to_key(key, public, info=_result_info(job, name)) for name, public in recipients.items()}
    with ModelDraft(sealed_size(sizes_of(files)), spool) as draft:
        for piece in seal(files, key, salt=random(SALT_SIZE)):
            draft.append(piece)
        return SealedResult(draft.seal(), keys)


def open_result(
    payload: bytes, sealed_key: bytes, key: HybridPrivateKey, job: str, recipient: str, *, max_bytes: int
) -> dict[str, bytes]:
    """The files of a result sealed to `recipient`. Raises Refused if it was made for another key, job or recipient."""
    file_key = key.open(sealed_key, info=_result_info(job, recipient))
    return unseal(io.BytesIO(payload), file_key, where=f"result of {job}", max_bytes=max_bytes, file_size=len(payload))


def _result_info(job: str, recipient: str) -> bytes:
    return _RESULT_PURPOSE + job.encode() + b"\0" + recipient.encode()


def _key_of_job(model_key: bytes, job: str, purpose: bytes = _FIRST_MODEL_PURPOSE) -> bytes:
    if len(model_key) != KEY_SIZE:
        raise SealedDataRefused(f"a model key has {KEY_SIZE} bytes, this one {len(model_key)}", where="model key")
    return HKDF(algorithm=SHA256(), length=KEY_SIZE, salt=None, info=purpose + job.encode()).derive(model_key)
