"""Secure aggregation between a site and its server: messages, signatures, and an update as a masked vector.

A masked vector holds the update's difference from the model and the declared metrics, times the weight, and the weight:
so the server learns weighted sums and the sum of weights. Messages are JSON; who says what is signed by the sites'
attested keys (`Notary`), since the server that passes it on is not trusted with it.

A site that is asked the same once more, after its connection was cut, answers the same; asked otherwise, it refuses.

A server that was killed takes its round up in another *run*: sites make fresh keys, and answer nothing of the run
before any more. What they give is the same update; and a site signs one set of survivors a round, in however many runs.
So two runs of a round have one sum, by the argument for which one run has no two (`majority`).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Protocol, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.canonical import b64, unb64
from fl.aggregation.fixed_point import PIECE, FixedPoint, Numbers, Vector, check_unit, read_tail, tail_of
from fl.aggregation.masking import Keys, Masks, Participant, Round, majority
from fl.aggregation.weighted_mean import as_dtype
from fl.errors import MaskingRefused, OutputRefused
from fl.jobs.settings import MASKED, MASKED_TAIL, JobSettings, SecureAggregation
from fl.tensors import NUMPY_DTYPE, Schema, TensorFile, layout
from fl.transport.memory import NamedDraft, OwnMemory, SealedMemory
from fl.transport.stored import Stored

MAX_PART: Final = 100_000
"""Characters of a message in one frame."""
MAX_BODY: Final = 8 << 20
"""Characters of a whole message: introductions of a thousand sites, with some brokers' EARs each."""
MAX_ANSWER: Final = MAX_PART
MADE_AHEAD: Final = 64 << 20
"""Bytes of masks that a site makes and keeps while its script trains; larger ones are made as they are added."""
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


class Introduced(Bag):
    """The introductions of a round, and its unit of weights."""

    unit: float | None = None


class Revealed(Bag):
    """The shares that a site reveals, and its introduction in the next round, if there is one."""

    following: Text = ""


class Named(_Message):
    """The survivors."""

    survivors: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=1000, strict=False)]


def read_bag(body: str) -> dict[str, str]:
    """The texts by site. Raises MaskingRefused."""
    return dict(_read(Bag, body).texts)


def read_revealed(body: str) -> Revealed:
    """A site's answer to `unmask`. Raises MaskingRefused."""
    found: Revealed = _read(Revealed, body)
    return found


def _read(kind: type[Any], body: str) -> Any:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise MaskingRefused("a message is malformed") from error


def parts(body: str) -> Iterator[tuple[str, bool]]:
    """A message in pieces that fit a frame, each with whether more come."""
    for start in range(0, max(1, len(body)), MAX_PART):
        yield body[start : start + MAX_PART], start + MAX_PART < len(body)


class Parts:
    """Joins a message's pieces, of which at most MAX_BODY characters are kept."""

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._size = 0

    def add(self, piece: str, *, more: bool) -> str | None:
        """The whole message, with its last piece. Raises MaskingRefused for one that is too long."""
        self._kept.append(piece)
        self._size += len(piece)
        if self._size > MAX_BODY:
            raise MaskingRefused(f"a message has more than {MAX_BODY} characters")
        if more:
            return None
        body = "".join(self._kept)
        self._kept.clear()
        self._size = 0
        return body


def context_of(notary: Notary, round_: int) -> bytes:
    """What a round's keys and masks are bound to."""
    return hashlib.sha256(notary.job + round_.to_bytes(8, "big")).digest()


def keys_in(notary: Notary, site: str, token: str, round_: int) -> tuple[bytes, bytes]:
    """The keys that a site introduces itself with in a round. Raises MaskingRefused, and what the notary raises."""
    return _introduction(notary, site, token, round_)[0]


def signed_before(notary: Notary, site: str, token: str, round_: int) -> frozenset[str] | None:
    """The survivors of the round that a site has signed in a run before, if it has. Raises as `keys_in`."""
    return _introduction(notary, site, token, round_)[1]


def _introduction(
    notary: Notary, site: str, token: str, round_: int
) -> tuple[tuple[bytes, bytes], frozenset[str] | None]:
    roster = notary.sites()
    if site not in roster:
        raise MaskingRefused(f"{site} is not on the job's roster")
    payload = dict(notary.introduced(site, token))
    without = payload.pop("without", None)
    cipher, mask = payload.get("cipher"), payload.get("mask")
    wanted = {"cipher": cipher, "context": context_of(notary, round_).hex(), "mask": mask, "site": site}
    if payload != wanted or not isinstance(cipher, str) or not isinstance(mask, str):
        raise MaskingRefused(f"the keys of {site} are not for this round")
    pair = unb64(cipher, where=site), unb64(mask, where=site)
    if any(len(one) != 32 for one in pair):
        raise MaskingRefused(f"the keys of {site} have another size")
    if without is None:
        return pair, None
    if not isinstance(without, list) or any(name not in roster or name == site for name in without):
        raise MaskingRefused(f"{site} says that it has signed what are no survivors")
    return pair, frozenset(roster.keys() - set(without))


def round_of(notary: Notary, keys: Keys, round_: int, secure: SecureAggregation, unit: float | None = None) -> Round:
    """The round that follows from the sites' keys. Raises MaskingRefused.

    The threshold counts the members of the whole roster, so that a server gains nothing by leaving some out.
    """
    check_unit(unit)
    if secure.bits == 64 and unit is not None:
        raise MaskingRefused("the job asks for numbers of 64 bits in every round")
    roster = notary.sites()
    threshold = secure.min_members or majority(len(set(roster.values())))
    return Round(context_of(notary, round_), keys, {site: roster[site] for site in keys}, threshold, unit)


def fixed_point(round_: Round, secure: SecureAggregation) -> FixedPoint:
    """How a round's numbers are written."""
    return FixedPoint(secure.limit, len(round_.keys), round_.unit)


@dataclass(frozen=True, slots=True)
class _Worn:
    """The masks that a round's update has, and what it was masked for."""

    run: str
    seeds: tuple[tuple[bytes, bool], ...]
    unit: float | None


class MaskingSite:
    """A site's part in a job's secure aggregation, round after round.

    For two threads: one hears, the other has updates masked, and waits for the round's masks.
    """

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
        self._run = ""
        self._participant: Participant | None = None  # None, too, between a run of the round and the next
        self._following: tuple[int, str, Participant] | None = None  # has keys and has dealt nothing yet
        self._round: Round | None = None
        self._signed: tuple[str, ...] | None = None  # the round's survivors, in whichever run
        self._worn: _Worn | None = None
        self._answered: dict[Step, tuple[str, str]] = {}  # in this run of the round: what was asked, and the answer
        self._making = False  # masks, ahead
        self._room: tuple[list[Vector], Masks | None] = [], None  # for masks that are made ahead, and whose it was
        self._changed = threading.Condition()
        self._closed = False

    def hear(self, round_: int, step: Step, body: str, run: str = "") -> str:
        """Take one step; what is answered. Raises MaskingRefused, and what the notary raises."""
        with self._changed:
            answer = self._step(round_, step, body, run)
            self._changed.notify_all()
            return answer

    def prepare(self) -> None:
        """Make the round's masks while the script trains, where they are few enough to be kept until it has."""
        with self._changed:
            participant, round_ = self._participant, self._round
            if participant is None or round_ is None or not self._has_masks(self._number) or self._closed:
                return
            schema = self._settings.schema_of_masked(64 if round_.unit is None else 32)
            if sum(spec.size for spec in schema.values()) > MADE_AHEAD or (masks := participant.ahead()) is None:
                return
            self._making = True
        try:
            room, before = self._room
            if before is None or not before.are_used_up or not is_for(schema, room):
                room = arrays_of(schema)  # who is at work with other masks goes on with them
            self._room = room, masks
            masks.make(room)
        finally:
            with self._changed:
                self._making = False
                self._changed.notify_all()

    def close(self) -> None:
        """There will be no further masks."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _step(self, round_: int, step: Step, body: str, run: str) -> str:
        if step == "keys":
            return self._introduced(round_, run)
        if step == "shares" and self._following is not None and self._following[:2] == (round_, run):
            if round_ != self._number:
                self._signed, self._worn = None, None
            self._number, self._run, self._participant = self._following
            self._following, self._round, self._answered = None, None, {}
        if (round_, run) != (self._number, self._run) or self._participant is None:
            raise MaskingRefused(f"a step of round {round_} comes out of turn")
        if step in self._answered:
            asked, answer = self._answered[step]
            if asked != body:
                raise MaskingRefused(f"{step} of round {round_} were heard before, and were others")
            return answer
        answer = self._answer(self._participant, round_, step, body)
        if len(answer) > MAX_ANSWER:
            raise MaskingRefused(f"an answer about {step} has {len(answer)} characters")
        self._answered[step] = body, answer
        return answer

    def masked(
        self, round_: int, differences: Iterable[Numbers], metrics: Mapping[str, float], weight: float
    ) -> OwnMemory:
        """What is disclosed, under masks: the model's differences in the order of its tensors, each array once.

        Raises MaskingRefused, OutputRefused.
        """
        names = self._settings.outputs.metrics or ()
        if set(metrics) != set(names):
            raise OutputRefused(self._site, "it does not have exactly the declared metrics", tuple(metrics))
        masks, fixed = self._masks_of(round_)
        schema = self._settings.schema_of_masked(64 if fixed.unit is None else 32)
        header, offsets, size = layout(schema)
        memory = OwnMemory(size)
        memory.view[: len(header)] = header
        whole = np.frombuffer(memory.view, fixed.dtype, schema[MASKED].elements, offsets[MASKED])
        at = 0
        try:
            tail, written = tail_of([metrics[name] for name in names], weight)
            for values in differences:
                for start in range(0, values.size, PIECE):
                    part = values[start : start + PIECE]
                    masks.add_to(fixed.steps_of(part, written, whole[at : at + part.size]))  # while a cache has it
                    at += part.size
        except MaskingRefused as error:
            what = "a number is beyond the limit of secure aggregation"
            raise OutputRefused(self._site, what, (error.what,)) from error
        if at != whole.size:  # what was never written would be whatever this process had there
            raise MaskingRefused(f"{at} of {whole.size} numbers were masked")
        masks.add_to(tail)
        memory.view[offsets[MASKED_TAIL] : offsets[MASKED_TAIL] + tail.nbytes] = tail.view(np.uint8).data
        return memory

    def masked_again(self, round_: int, memory: Stored) -> OwnMemory:
        """The numbers that `masked` made `memory` of, under the masks of the server's present run.

        Raises MaskingRefused.
        """
        with self._changed:
            worn = self._worn
        if worn is None:
            raise MaskingRefused(f"nothing was masked in round {round_}")
        masks, fixed = self._masks_of(round_)
        undone = Masks((seed, not adds) for seed, adds in worn.seeds)
        header, offsets, size = layout(self._settings.schema_of_masked(64 if fixed.unit is None else 32))
        tensors = memory.tensors()
        following = OwnMemory(size)
        following.view[: len(header)] = header
        for name in (MASKED, MASKED_TAIL):
            numbers = tensors.array(name).copy()
            undone.add_to(numbers)
            masks.add_to(numbers)
            following.view[offsets[name] : offsets[name] + numbers.nbytes] = numbers.view(np.uint8).data
        return following

    @property
    def worn_in(self) -> str:
        """The server's run whose masks the round's update has."""
        return "" if self._worn is None else self._worn.run

    @property
    def is_outworn(self) -> bool:
        """Whether another run of the round has begun since its update was masked."""
        with self._changed:
            return self._worn is not None and (self._participant is None or self._run != self._worn.run)

    def _masks_of(self, round_: int) -> tuple[Masks, FixedPoint]:
        """The round's masks, as soon as the neighbours' shares are here."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_masks(round_), self._settings.round_seconds)
            if self._participant is None or self._round is None or not self._has_masks(round_):
                raise MaskingRefused(f"there are no masks for round {round_}")
            masks = self._participant.masks()
            self._worn = _Worn(self._run, masks.seeds, self._round.unit)
            return masks, fixed_point(self._round, self._secure)

    def _has_masks(self, round_: int) -> bool:
        here = self._number == round_ and self._participant is not None and "dealt" in self._answered
        return here and not self._making

    def _introduced(self, round_: int, run: str) -> str:
        """Keys for a round that has not begun in this run, made once, signed as often as they are asked for."""
        again = round_ == self._number and run != self._run
        if round_ <= self._number and not again:
            raise MaskingRefused(f"round {round_} has been before")
        if again:
            self._participant, self._answered = None, {}
        if self._following is None or self._following[:2] != (round_, run):
            self._following = round_, run, Participant(self._site, self._random)
        cipher, mask = self._following[2].public_keys
        context = context_of(self._notary, round_)
        payload: dict[str, Any] = {
            "cipher": b64(cipher),
            "context": context.hex(),
            "mask": b64(mask),
            "site": self._site,
        }
        if again and self._signed is not None:
            payload["without"] = sorted(self._notary.sites().keys() - set(self._signed))
        return self._notary.introduce(payload)

    def _answer(self, participant: Participant, round_: int, step: Step, body: str) -> str:
        if step == "shares":
            said: Introduced = _read(Introduced, body)
            keys = {
                site: participant.public_keys if site == self._site else keys_in(self._notary, site, token, round_)
                for site, token in said.texts.items()
            }
            self._round = round_of(self._notary, keys, round_, self._secure, said.unit)
            if self._worn is not None and said.unit != self._worn.unit:
                raise MaskingRefused(f"the update of round {round_} was written in other steps before")
            shares = participant.share(self._round)
            return bag({other: b64(share) for other, share in shares.items()})
        if step == "dealt":
            participant.receive({other: unb64(text, where="share") for other, text in read_bag(body).items()})
            return ""
        if self._round is None:
            raise MaskingRefused("the round has no keys yet")
        if step == "survivors":
            survivors = _read(Named, body).survivors
            if self._signed is not None and tuple(sorted(survivors)) != self._signed:
                raise MaskingRefused(f"the survivors of round {round_} were signed before, and were others")
            self._signed = participant.confirm(survivors)
            return self._notary.sign(confirmation(self._round, self._signed))
        signed = self._signed or ()
        wanted = confirmation(self._round, signed)
        signers: list[str] = []
        for site, token in read_bag(body).items():
            if participant.are_enough(signers):
                break
            if site in signed and (site == self._site or self._notary.signed(site, token) == wanted):
                signers.append(site)
        revealed = {other: b64(share) for other, share in participant.reveal(signers).items()}
        more = round_ + 1 < self._settings.num_rounds
        return Revealed(
            texts=revealed, following=self._introduced(round_ + 1, self._run) if more else ""
        ).model_dump_json()


def arrays_of(schema: Schema) -> list[Vector]:
    """Arrays for what is masked, in the order in which masks are spread over it; zeros."""
    return [np.zeros(schema[name].elements, NUMPY_DTYPE[schema[name].dtype]) for name in (MASKED, MASKED_TAIL)]


def is_for(schema: Schema, arrays: Sequence[Vector]) -> bool:
    """Whether these are such arrays."""
    wanted = [(schema[name].elements, NUMPY_DTYPE[schema[name].dtype]) for name in (MASKED, MASKED_TAIL)]
    return [(one.size, one.dtype.str) for one in arrays] == wanted


def confirmation(round_: Round, survivors: Collection[str]) -> dict[str, Any]:
    """What survivors sign: the round with its keys and graph, and who is in the sum."""
    return {"round": round_.digest, "survivors": sorted(survivors)}


def bag(texts: Mapping[str, str]) -> str:
    """A message of one text for each of some sites."""
    return json.dumps({"texts": dict(texts)}, separators=(",", ":"))


def introduced(texts: Mapping[str, str], unit: float | None) -> str:
    """The message that begins a round."""
    return Introduced(texts=dict(texts), unit=unit).model_dump_json()


def named(survivors: Collection[str]) -> str:
    """The message that names the survivors."""
    return Named(survivors=tuple(sorted(survivors))).model_dump_json()


# --- the sum as a model -----------------------------------------------------------------------------------------------


def decode_sum(
    sums: tuple[Vector, ...], model: TensorFile, settings: JobSettings, fixed: FixedPoint
) -> tuple[SealedMemory, dict[str, float], float]:
    """The next model, which is the current one plus the weighted mean of differences; the mean metrics; the weights.

    Raises MaskingRefused for a sum that cannot be one.
    """
    total, tail = sums
    metrics, weight = read_tail(tail.view(np.uint64), fixed.sites)
    schema = settings.schema_of_model
    header, offsets, size = layout(schema)
    at = 0
    with NamedDraft(size) as draft:
        draft.append(header)
        places = {}
        for name, spec in schema.items():
            places[name] = at
            at += spec.elements
        for name in sorted(schema, key=offsets.__getitem__):
            spec = schema[name]
            dtype = np.float64 if spec.dtype == "F64" else np.float32
            for start, block in model.blocks(name):
                begin = places[name] + start
                following = fixed.read(total[begin : begin + block.size], weight, dtype)
                following += block
                draft.append(as_dtype(following, spec.dtype).view(np.uint8).data)
        memory = draft.seal()
    return memory, dict(zip(settings.outputs.metrics or (), metrics, strict=True)), weight
