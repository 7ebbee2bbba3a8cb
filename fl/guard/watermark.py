"""Watermarks: the model that a site is handed names that site, to the holder of the model key.

Spread spectrum (Cox et al. 1997, "Secure Spread Spectrum Watermarking for Multimedia"): every number of a tensor is
moved by `strength` times the tensor's root mean square, up or down by a secret sequence of signs of the site's own. To
trace a leaked model, its numbers, or their differences from a model that is known, are correlated with every site's.

Whoever has no part in a leak has signs that were drawn independently of it: then the correlation z of N numbers of
whatever size exceeds t with a probability of at most exp(-t**2 / 2) (Hoeffding 1963; no distribution of the numbers is
assumed). `trace` names those whose bound, times the number of sites, is at most the rate of false alarms.
"""

from __future__ import annotations

import hmac
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fl.aggregation.weighted_mean import as_dtype
from fl.guard.keystream import Keystream
from fl.tensors import BLOCK, FLOATS, TensorFile, layout
from fl.transport.memory import NamedDraft, SealedMemory
from fl.transport.stored import Stored
from policies.errors import Unusable

LEAST: Final = 256
"""Smaller tensors have none: they would say little, and statistics of normalisation are among them."""
FALSE_ALARMS: Final = 1e-6
CLIP: Final = 4.0
"""Numbers that are further from their tensor's root mean square count as if they were there."""
_PURPOSE: Final = b"sealwright-watermark-v1\0"


def watermark_key(model_key: bytes, job: str) -> bytes:
    """The key of one job's watermarks, which the model's owner has and the job's server in its attested memory."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=_PURPOSE + job.encode()).derive(model_key)


def marked(model: TensorFile, key: bytes, site: str, strength: float) -> SealedMemory:
    """The model as it is handed to `site`; the memory is the caller's to close."""
    header, offsets, size = layout(model.schema)
    with NamedDraft(size) as draft:
        draft.append(header)
        for name in sorted(model.schema, key=offsets.__getitem__):
            spec = model.schema[name]
            carries = spec.dtype in FLOATS and spec.elements >= LEAST
            step = strength * _root_mean_square(block for _, block in model.blocks(name)) if carries else 0.0
            stream = _stream(key, site, name, spec.elements)
            for _, block in model.blocks(name):
                if not carries:
                    draft.append(np.ascontiguousarray(block).view(np.uint8).data)
                    continue
                wide: npt.NDArray[np.floating[Any]] = block.astype(np.float64 if spec.dtype == "F64" else np.float32)
                wide += step * _signs(stream, block.size)
                draft.append(as_dtype(wide, spec.dtype).view(np.uint8).data)
        return draft.seal()


class Marker:
    """The models of one round of a job as its sites get them. Safe to use from several threads."""

    def __init__(self, key: bytes, strength: float) -> None:
        self._key = key
        self._strength = strength
        self._lock = threading.Lock()
        self._made: dict[str, tuple[str, SealedMemory]] = {}  # by site: of which model, and the marked one

    def of(self, site: str, model: Stored) -> SealedMemory:
        """The model as `site` gets it, this marker's to close."""
        with self._lock:
            made = self._made.get(site)
            if made is None or made[0] != model.digest:
                if made is not None:
                    made[1].close()
                made = self._made[site] = model.digest, marked(model.tensors(), self._key, site, self._strength)
            return made[1]

    def find(self, sha256: str) -> SealedMemory | None:
        """The marked model of this content address, if there is one."""
        with self._lock:
            return next((made for _, made in self._made.values() if made.digest == sha256), None)

    def close(self) -> None:
        """Give all back."""
        with self._lock:
            for _, made in self._made.values():
                made.close()
            self._made.clear()


@dataclass(frozen=True, slots=True)
class Suspicion:
    """How much a leaked model says of one site.

    `bound`: the probability, at most, that a site without a part in the leak looks like this.
    """

    site: str
    score: float
    bound: float
    named: bool


def trace(
    leaked: TensorFile,
    key: bytes,
    sites: Sequence[str],
    known: TensorFile | None = None,
    *,
    false_alarms: float = FALSE_ALARMS,
) -> tuple[Suspicion, ...]:
    """Every site's suspicion, the worst first. With `known`, a model of the same job without a watermark, small models
    and models that were trained further are traced as well. Raises Unusable if there is nothing to look at."""
    names = [
        name
        for name, spec in sorted(leaked.schema.items())
        if spec.dtype in FLOATS
        and spec.elements >= LEAST
        and (known is None or (name in known.schema and known.schema[name].elements == spec.elements))
    ]
    if not names or not sites:
        raise Unusable(
            f"no tensor of {LEAST} numbers or more can be compared", where="model", do="Is it of this job's model?"
        )
    scores, square = np.zeros(len(sites)), 0.0
    for name in names:
        numbers = _numbers(leaked, name) - (0.0 if known is None else _numbers(known, name))
        size = math.sqrt(float(np.dot(numbers, numbers)) / numbers.size)
        if not math.isfinite(size):
            raise Unusable(f"tensor {name!r} holds numbers that are not finite", where="model", do="Repair it.")
        if size == 0:
            continue
        numbers = np.clip(numbers / size, -CLIP, CLIP)
        square += float(np.dot(numbers, numbers))
        for at, site in enumerate(sites):
            stream = _stream(key, site, name, numbers.size)
            for start in range(0, numbers.size, BLOCK):
                part = numbers[start : start + BLOCK]
                scores[at] += float(np.dot(part, _signs(stream, part.size)))
    found = []
    for site, score in zip(sites, scores / math.sqrt(square) if square else scores, strict=True):
        bound = math.exp(-(max(0.0, float(score)) ** 2) / 2)
        found.append(Suspicion(site, float(score), bound, bound * len(sites) <= false_alarms))
    return tuple(sorted(found, key=lambda one: -one.score))


def _stream(key: bytes, site: str, name: str, elements: int) -> Keystream:
    """A tensor's signs do not depend on what other tensors there are: a leak may have lost some."""
    said = b"\0".join((site.encode(), name.encode(), str(elements).encode()))
    return Keystream(hmac.digest(key, said, sha256))


def _signs(stream: Keystream, count: int) -> npt.NDArray[np.float32]:
    """The next `count` signs, 1 or -1."""
    bits = np.unpackbits(stream.words(-(-count // 8), np.uint8), count=count)
    return 1 - 2 * bits.astype(np.float32)


def _numbers(file: TensorFile, name: str) -> npt.NDArray[np.float64]:
    return np.concatenate([block.astype(np.float64) for _, block in file.blocks(name)])


def _root_mean_square(blocks: Iterator[npt.NDArray[Any]]) -> float:
    squares, count = 0.0, 0
    for block in blocks:
        wide: npt.NDArray[np.floating[Any]] = block.astype(np.float64)
        squares += float(np.dot(wide, wide))
        count += block.size
    return math.sqrt(squares / count) if count else 0.0
