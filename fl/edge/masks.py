"""Masked sums of devices: what a task says of them, how devices vouch for their keys, and a device's part in a cohort.

The rounds are those of sites (`fl.aggregation.masking`: Bonawitz et al. 2017, Bell et al. 2020); a cohort of devices is
one round. Each device is a member of its own, known to the others by its token, under the charter that each of them
verifies: a gateway cannot make devices up. Pure: randomness and time are arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from attestation.canonical import canonical_bytes
from fl.aggregation.fixed_point import MAX_WEIGHT, FixedPoint, tail_of
from fl.aggregation.masking import Participant, Round, majority
from fl.edge.contract import Tensors
from fl.edge.credentials import read_credential
from fl.edge.mask_steps import STEPS, Step
from fl.errors import MaskingRefused
from fl.tensors import TensorSpec, encode
from policies.errors import Unusable

if TYPE_CHECKING:
    from datetime import datetime

    from policies.charter import Charter

PREFIX: Final = "secure_aggregation."
"""Begins the names by which a task's configuration, which the charter approves, says that its results are masked."""
CAPABILITY: Final = "masks"
"""What a device must be able to do for such a job."""
MAX_COHORT: Final = 64
COUNTED: Final = "counted"
"""What a device is told whose result is in a sum."""
VALUES, TAIL = "values", "weight"

_SIGNED: Final = b"sealwright-device-mask-v1\0"
_CONTEXT: Final = b"sealwright-device-cohort-v1\0"
_Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class DeviceMasking(BaseModel):
    """How a job's results are masked.

    - `cohort`: a sum is over so many devices, which are gathered for `seconds`; as long they have for each step.
    - `threshold`: over no fewer than so many; more than half of a cohort.
    - `limit`: no number of a difference is larger.
    - `clip_norm`: the L2 norm to which each device scales its difference down (None: as it is).
    - `max_weight`: what a device weighs at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    cohort: Annotated[int, Field(ge=3, le=MAX_COHORT)] = 16
    threshold: Annotated[int, Field(ge=2, le=MAX_COHORT)] = 9
    limit: Annotated[float, Field(gt=0, le=1e6, strict=False)] = 16.0
    seconds: Annotated[float, Field(gt=0, le=3600, strict=False)] = 60.0
    clip_norm: Annotated[float, Field(gt=0, le=1e6, strict=False)] | None = None
    max_weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT, strict=False)] = float(MAX_WEIGHT)

    @model_validator(mode="after")
    def _is_a_majority(self) -> DeviceMasking:
        if not majority(self.cohort) <= self.threshold <= self.cohort:
            raise ValueError(f"threshold is from {majority(self.cohort)} to {self.cohort} in a cohort of {self.cohort}")
        return self

    def config(self) -> dict[str, Any]:
        """What a task's configuration says of it."""
        return {PREFIX + name: value for name, value in self.model_dump(exclude_none=True).items()}

    def fixed_point(self, devices: int) -> FixedPoint:
        """How the numbers of so many devices are written: in 64 bits."""
        return FixedPoint(self.limit, devices, None)


def masking_of(config: Mapping[str, Any]) -> DeviceMasking | None:
    """How a task's results are masked; None if they are not. Raises Unusable."""
    said = {name.removeprefix(PREFIX): value for name, value in config.items() if name.startswith(PREFIX)}
    if not said:
        return None
    try:
        return DeviceMasking.model_validate(said)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise Unusable(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=f"{PREFIX}… of a task's configuration",
            do="Give cohort, threshold, limit, seconds, clip_norm, max_weight.",
        ) from error


def capabilities_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What a device must be able to do for a task of this configuration. Raises Unusable."""
    return {} if masking_of(config) is None else {CAPABILITY: "1"}


def context_of(charter: str, job: str, version: int, task: str) -> bytes:
    """What keys and masks are bound to: nothing of one version of a job means anything in another."""
    said = {"charter": charter, "job": job, "task": task, "version": version}
    return sha256(_CONTEXT + canonical_bytes(said)).digest()


class Introduction(BaseModel):
    """A device's public keys for one cohort, signed by the key that its token names."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    token: Annotated[str, StringConstraints(max_length=4096)]
    cipher: _Hex32
    mask: _Hex32
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


def sign(key: EllipticCurvePrivateKey, said: Mapping[str, Any]) -> str:
    """A device's signature over `said`, in hex."""
    r, s = decode_dss_signature(key.sign(_SIGNED + canonical_bytes(dict(said)), ECDSA(hashes.SHA256())))
    return (r.to_bytes(32, "big") + s.to_bytes(32, "big")).hex()


def is_signed(key: EllipticCurvePublicKey, said: Mapping[str, Any], signature: str) -> bool:
    """Whether the holder of `key` signed `said`."""
    if len(signature) != 128 or not set(signature) <= set("0123456789abcdef"):
        return False
    r, s = int(signature[:64], 16), int(signature[64:], 16)
    try:
        key.verify(encode_dss_signature(r, s), _SIGNED + canonical_bytes(dict(said)), ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def read_introduction(body: str) -> Introduction:
    """Raises MaskingRefused."""
    try:
        return Introduction.model_validate_json(body)
    except ValidationError as error:
        raise MaskingRefused("an introduction is malformed") from error


def introduced(
    said: Introduction, charter: Charter, at: datetime, *, job: str, context: bytes
) -> tuple[str, EllipticCurvePublicKey]:
    """Who introduces itself, and its key: a device of the charter, for the job of this name, in this context.

    Raises MaskingRefused for a signature that is not its own, Refused for its token.
    """
    device = read_credential(said.token, charter, at)
    if not device.may(job):
        raise MaskingRefused(f"{device.name} is not for the job {job}")
    if not is_signed(device.key, _keys(context, said.cipher, said.mask), said.signature):
        raise MaskingRefused(f"the keys of {device.name} are not its own, or are for another cohort")
    return device.name, device.key


def _keys(context: bytes, cipher: str, mask: str) -> dict[str, Any]:
    return {"cipher": cipher, "context": context.hex(), "mask": mask, "step": "keys"}


def confirmation(round_: Round, survivors: tuple[str, ...]) -> dict[str, Any]:
    """What survivors sign: the round with its keys and graph, and who is in the sum."""
    return {"round": round_.digest, "step": "survivors", "survivors": list(survivors)}


def round_of(context: bytes, keys: Mapping[str, Introduction], threshold: int) -> Round:
    """The round of a cohort. Raises MaskingRefused if it is too small."""
    pairs = {name: (bytes.fromhex(one.cipher), bytes.fromhex(one.mask)) for name, one in sorted(keys.items())}
    round_ = Round(context, pairs, {name: name for name in pairs}, threshold)
    round_.check()
    return round_


def read_texts(body: str, most: int = MAX_COHORT) -> dict[str, str]:
    """A body of one text for each of some devices. Raises MaskingRefused."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MaskingRefused("a message is malformed") from error
    if not isinstance(found, dict) or len(found) > most or not all(isinstance(one, str) for one in found.values()):
        raise MaskingRefused("a message is malformed")
    return found


def write_texts(texts: Mapping[str, str]) -> str:
    """Such a body."""
    return json.dumps(dict(texts), separators=(",", ":"))


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise MaskingRefused("a message is malformed") from error


def read_shares(body: str) -> dict[str, bytes]:
    """Shares by device. Raises MaskingRefused."""
    return {name: _bytes(text) for name, text in read_texts(body).items()}


def write_shares(shares: Mapping[str, bytes]) -> str:
    """Shares by device."""
    return write_texts({name: share.hex() for name, share in shares.items()})


class CohortDevice:
    """A device in one cohort: what it says next (`step`, `body`, `tensors`), and what it makes of an answer (`hear`).

    What it has said it says again until it is answered, and says nothing else in its place: whoever answers otherwise a
    second time is not heard.
    """

    def __init__(
        self,
        token: str,
        key: EllipticCurvePrivateKey,
        *,
        job: str,
        context: bytes,
        masking: DeviceMasking,
        difference: Tensors,
        weight: float,
        charter: Callable[[], Charter],
        clock: Callable[[], datetime],
        random: Callable[[int], bytes],
    ) -> None:
        """`job`: its name; `difference` and `weight`: what is summed. Raises Refused for a token that does not hold."""
        self._key = key
        self._job = job
        self._context = context
        self._masking = masking
        self._difference = difference
        self._weight = min(weight, masking.max_weight)
        self._charter = charter
        self._clock = clock
        self._name = read_credential(token, charter(), clock()).name
        self._participant = Participant(self._name, random)
        self._round: Round | None = None
        self._peers: dict[str, EllipticCurvePublicKey] = {}
        cipher, mask = (one.hex() for one in self._participant.public_keys)
        signature = sign(key, _keys(context, cipher, mask))
        self.step: Step = "keys"
        self.body = Introduction(token=token, cipher=cipher, mask=mask, signature=signature).model_dump_json()
        self.tensors = b""

    def hear(self, step: Step | None, body: str) -> None:
        """The gateway goes on to `step`, with this. Raises MaskingRefused, and Refused for tokens that do not hold."""
        at = STEPS.index(self.step) + 1
        if at == len(STEPS) or step != STEPS[at]:
            raise MaskingRefused(f"the gateway asks for {step} after {self.step}")
        if step == "shares":
            said = self._share(body)
        elif step == "vector":
            self._participant.receive(read_shares(body))
            said, self.tensors = "", self._masked()
        elif step == "survivors":
            named = tuple(read_texts(body))
            said = sign(self._key, confirmation(self._begun(), self._participant.confirm(named)))
            self._survivors = tuple(sorted(named))
        else:
            said = write_shares(self._participant.reveal(self._signers(body)))
        self.step, self.body = step, said
        if step != "vector":
            self.tensors = b""

    def _share(self, body: str) -> str:
        keys: dict[str, Introduction] = {}
        for name, text in read_texts(body).items():
            keys[name] = read_introduction(text)
            who, key = introduced(keys[name], self._charter(), self._clock(), job=self._job, context=self._context)
            if who != name:
                raise MaskingRefused(f"{name} is said to be who {who} is")
            self._peers[name] = key
        self._round = round_of(self._context, keys, self._masking.threshold)
        return write_shares(self._participant.share(self._round))

    def _masked(self) -> bytes:
        names = sorted(self._difference)
        values = np.concatenate([self._difference[name].reshape(-1).astype(np.float64) for name in names])
        most, norm = self._masking.clip_norm, float(np.linalg.norm(values))
        if most is not None and norm > most:
            values *= most / norm
        masks = self._participant.masks()
        tail, written = tail_of([], self._weight)
        whole = self._masking.fixed_point(len(self._begun().keys)).steps_of(values, written)
        masks.add_to(whole)
        masks.add_to(tail)
        return encode(
            {
                VALUES: (TensorSpec("U64", whole.shape), whole.astype("<u8", copy=False).tobytes()),
                TAIL: (TensorSpec("U64", tail.shape), tail.astype("<u8", copy=False).tobytes()),
            }
        )

    def _signers(self, body: str) -> list[str]:
        wanted = confirmation(self._begun(), self._survivors)
        return [
            name
            for name, signature in read_texts(body).items()
            if name in self._survivors and is_signed(self._peers[name], wanted, signature)
        ]

    def _begun(self) -> Round:
        if self._round is None:
            raise MaskingRefused("the cohort has no keys yet")
        return self._round
