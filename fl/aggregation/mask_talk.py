"""Secure aggregation between a site and its server: messages, signatures, and an update as a masked vector.

A masked vector holds the update's difference from the model, then the declared metrics, all times the weight, then the
weight itself: so the server learns weighted sums and the sum of weights. Messages are JSON; who says what is signed by
the sites' attested keys (`Notary`), since the server that passes it on is not trusted with it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Final, Literal, Protocol, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.canonical import b64, unb64
from fl.aggregation.masking import Participant, Round, Vector, decoded, encode_into, majority
from fl.errors import MaskingRefused, OutputRefused
from fl.guard.disclosure import Disclosure, differences
from fl.jobs.settings import JobSettings, SecureAggregation
from fl.tensors import NUMPY_DTYPE, TensorFile, layout, narrow_bf16, parse
from fl.transport.memory import DraftMemory, SealedMemory

MASKED: Final = "masked"
"""The one tensor of a masked update."""
WEIGHT_STEPS: Final = 16
"""Steps of a weight to one."""
MAX_WEIGHT: Final = 1 << 16
METRIC_LIMIT: Final = float(1 << 15)
METRIC_BITS: Final = 31
MAX_BODY: Final = 240_000
"""Characters of a message."""

Text: TypeAlias = Annotated[str, Field(max_length=64_000)]
Bodies: TypeAlias = Annotated[dict[Annotated[str, Field(max_length=64)], Text], Field(max_length=1000)]
Step: TypeAlias = Literal["keys", "shares", "dealt", "survivors", "unmask"]


class Notary(Protocol):
    """Who the sites of a job are, and what they sign."""

    @property
    def job(self) -> bytes:
        """Names the job: nothing signed for one means anything in another."""

    def sites(self) -> Mapping[str, str]:
        """The job's roster as its record has it: each site with its member, by the charter as it is now."""

    def introduce(self, payload: Mapping[str, Any]) -> str:
        """Sign, with all that a stranger needs to know that it was this site."""

    def introduced(self, site: str, token: str) -> dict[str, Any]:
        """What a site introduced itself with. Raises a refusal unless it is attested and signed this."""

    def sign(self, payload: Mapping[str, Any]) -> str:
        """Sign, for those to whom this site is introduced."""

    def signed(self, site: str, token: str) -> dict[str, Any]:
        """What an introduced site has signed. Raises a refusal."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Bag(_Message):
    """One text for each of some sites: introductions, shares, confirmations, revealed shares."""

    texts: Bodies


class Named(_Message):
    """The survivors."""

    survivors: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=1000, strict=False)]


def read_bag(body: str) -> dict[str, str]:
    """The texts by site. Raises MaskingRefused."""
    return dict(_read(Bag, body).texts)


def _read(kind: type[Any], body: str) -> Any:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise MaskingRefused("a message is malformed") from error


def context_of(notary: Notary, round_: int) -> bytes:
    """What a round's keys and masks are bound to."""
    return hashlib.sha256(notary.job + round_.to_bytes(8, "big")).digest()


def round_of(notary: Notary, introductions: Mapping[str, str], round_: int, secure: SecureAggregation) -> Round:
    """The round that follows from the sites' introductions. Raises MaskingRefused, and what the notary raises.

    The threshold counts the members of the whole roster, so that a server gains nothing by leaving some out.
    """
    roster = notary.sites()
    context = context_of(notary, round_)
    keys: dict[str, tuple[bytes, bytes]] = {}
    for site, token in introductions.items():
        if site not in roster:
            raise MaskingRefused(f"{site} is not on the job's roster")
        payload = notary.introduced(site, token)
        cipher, mask = payload.get("cipher"), payload.get("mask")
        wanted = {"cipher": cipher, "context": context.hex(), "mask": mask, "site": site}
        if payload != wanted or not isinstance(cipher, str) or not isinstance(mask, str):
            raise MaskingRefused(f"the keys of {site} are not for this round")
        pair = unb64(cipher, where=site), unb64(mask, where=site)
        if any(len(one) != 32 for one in pair):
            raise MaskingRefused(f"the keys of {site} have another size")
        keys[site] = pair
    threshold = secure.min_members or majority(len(set(roster.values())))
    return Round(context, keys, {site: roster[site] for site in keys}, threshold)


class MaskingSite:
    """A site's part in a job's secure aggregation, round after round. For one thread."""

    def __init__(
        self,
        site: str,
        settings: JobSettings,
        secure: SecureAggregation,
        notary: Notary,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._site = site
        self._settings = settings
        self._secure = secure
        self._notary = notary
        self._random = random
        self._number = -1
        self._participant: Participant | None = None
        self._round: Round | None = None
        self._survivors: tuple[str, ...] = ()

    def hear(self, round_: int, step: Step, body: str) -> str:
        """Take one step; what is answered. Raises MaskingRefused, and what the notary raises."""
        if step == "keys":
            return self._begin(round_)
        if round_ != self._number or self._participant is None:
            raise MaskingRefused(f"a step of round {round_} comes out of turn")
        if step == "shares":
            self._round = round_of(self._notary, read_bag(body), round_, self._secure)
            shares = self._participant.share(self._round)
            return bag({other: b64(share) for other, share in shares.items()})
        if step == "dealt":
            shares = {other: unb64(text, where="share") for other, text in read_bag(body).items()}
            self._participant.receive(shares)
            return "{}"
        if step == "survivors":
            self._survivors = self._participant.confirm(_read(Named, body).survivors)
            return self._notary.sign(self._confirmation())
        wanted = self._confirmation()
        signers = [
            site
            for site, token in read_bag(body).items()
            if site in self._survivors and self._notary.signed(site, token) == wanted
        ]
        return bag({other: b64(share) for other, share in self._participant.reveal(signers).items()})

    def masked(self, shown: Disclosure, model: SealedMemory) -> Disclosure:
        """What is disclosed, under masks; `shown` is closed. Raises MaskingRefused, OutputRefused."""
        if self._participant is None or self._round is None:
            raise MaskingRefused("there are no masks for this round")
        schema = self._settings.schema_of_update
        header, offsets, size = layout(schema)
        with DraftMemory(size) as draft:
            draft.view[: len(header)] = header
            vector = np.frombuffer(draft.view, np.uint64, schema[MASKED].elements, offsets[MASKED])
            try:
                with shown.memory:
                    encode_update(vector, shown, model, self._settings, self._secure, self._site)
                self._participant.mask(vector)
            finally:
                del vector
            return Disclosure(SealedMemory(*draft.seal()), 1.0, {})

    def _begin(self, round_: int) -> str:
        if round_ <= self._number:
            raise MaskingRefused(f"round {round_} has been before")
        self._number, self._round = round_, None
        self._participant = Participant(self._site, self._random)
        cipher, mask = self._participant.public_keys
        context = context_of(self._notary, round_)
        return self._notary.introduce(
            {"cipher": b64(cipher), "context": context.hex(), "mask": b64(mask), "site": self._site}
        )

    def _confirmation(self) -> dict[str, Any]:
        if self._round is None:
            raise MaskingRefused("the round has no keys yet")
        return confirmation(self._round, self._survivors)


def confirmation(round_: Round, survivors: Collection[str]) -> dict[str, Any]:
    """What survivors sign: the round with its keys and graph, and who is in the sum."""
    return {"round": round_.digest, "survivors": sorted(survivors)}


def bag(texts: Mapping[str, str]) -> str:
    """A message of one text for each of some sites. Raises MaskingRefused if it is too long to be sent."""
    text = json.dumps({"texts": dict(texts)}, separators=(",", ":"))
    if len(text) > MAX_BODY:
        raise MaskingRefused(f"{len(texts)} sites are too many for one message")
    return text


def named(survivors: Collection[str]) -> str:
    """The message that names the survivors."""
    return Named(survivors=tuple(sorted(survivors))).model_dump_json()


# --- an update as a vector --------------------------------------------------------------------------------------------


def encode_update(
    vector: Vector,
    shown: Disclosure,
    model: SealedMemory,
    settings: JobSettings,
    secure: SecureAggregation,
    site: str,
) -> None:
    """Write the update as the sum's vector. Raises OutputRefused for what does not fit the declared limits."""
    weight = round(shown.weight * WEIGHT_STEPS)
    if not 1 <= weight <= MAX_WEIGHT * WEIGHT_STEPS:
        raise OutputRefused(site, f"its weight is not between 1/{WEIGHT_STEPS} and {MAX_WEIGHT}", (str(shown.weight),))
    names = settings.outputs.metrics or ()
    if set(shown.metrics) != set(names):
        raise OutputRefused(site, "it does not have exactly the declared metrics", tuple(shown.metrics))
    values = np.array([shown.metrics[name] for name in names], dtype=np.float64)
    current = parse(model.view, max_size=model.size)
    update = parse(shown.memory.view, max_size=shown.memory.size)
    at = 0
    try:
        for name in settings.model:
            for _, difference, _ in differences(update, current, name, settings.params_type == "FULL"):
                encode_into(vector[at : at + difference.size], difference, secure.limit, secure.bits, weight)
                at += difference.size
        encode_into(vector[at:-1], values, METRIC_LIMIT, METRIC_BITS, weight)
        vector[-1] = weight
    except MaskingRefused as error:
        raise OutputRefused(site, "a number is beyond the limit of secure aggregation", (error.what,)) from error
    finally:
        current.raw.release()
        update.raw.release()


def decode_sum(
    total: Vector, model: TensorFile, settings: JobSettings, secure: SecureAggregation
) -> tuple[SealedMemory, dict[str, float]]:
    """The next model, which is the current one plus the weighted mean of differences, and the mean metrics.

    Raises MaskingRefused for a sum that cannot be one.
    """
    weight = int(total[-1])
    names = settings.outputs.metrics or ()
    if not 0 < weight <= MAX_WEIGHT * WEIGHT_STEPS * 10_000:
        raise MaskingRefused("the sum of weights is none: a site has sent what is no masked vector")
    schema = settings.schema_of_model
    header, offsets, size = layout(schema)
    at = 0
    with DraftMemory(size) as draft:
        draft.view[: len(header)] = header
        for name, spec in schema.items():
            target = np.frombuffer(draft.view, NUMPY_DTYPE[spec.dtype], spec.elements, offsets[name])
            for start, block in model.blocks(name):
                following = decoded(total[at : at + block.size], secure.limit, secure.bits, weight)
                following += block
                at += block.size
                part = target[start : start + block.size]
                part[:] = narrow_bf16(following.astype(np.float32)) if spec.dtype == "BF16" else following
                del part
            del target
        memory = SealedMemory(*draft.seal())
    metrics = decoded(total[at : at + len(names)], METRIC_LIMIT, METRIC_BITS, weight)
    return memory, dict(zip(names, map(float, metrics), strict=True))
