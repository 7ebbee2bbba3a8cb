"""The frames that two tiers of the tree exchange over the one port: one call, `Tree`, for as long as both live.

Both begin with a `Lease`, and send a newer one whenever they have it. The child speaks, the parent answers: `Look` with
`Offered`; `Reported`, followed by `size` bytes in chunks, with `Replied`, followed likewise. Bundles and models are
fetched beside it, by the call `TreeFetch`, with the frame `Fetch`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal, TypeAlias

import xxhash
from pydantic import Field, TypeAdapter

from fl.edge.contract import MAX_VERSION
from fl.edge.partial_sum import MAX_VERSIONS
from fl.edge.wire import MAX_REPLY, Origin
from fl.errors import MalformedMessage
from fl.jobs.record import JobId
from fl.jobs.settings import Digest
from fl.transport.frames import CHUNK, Chunk, Frame, Lease, Size, Token, adapter_of, unpack

Total: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 48)]


class Look(Frame):
    """Child to parent: what jobs are there?"""

    kind: Literal["look"] = "look"


class Offer(Frame):
    """A job that runs. The bundle has the digest that the record names.

    `start`: a random name of this start of the job's root. With another the job goes on after the server was started
    anew, which knows of no claims, sums and permits from before: so a child begins it anew, too.
    """

    job: JobId
    record: Token
    bundle: Digest
    bundle_size: Size
    start: Origin = "0" * 32


class Offered(Frame):
    """Parent to child: the jobs that run."""

    kind: Literal["offered"] = "offered"
    jobs: Annotated[tuple[Offer, ...], Field(max_length=64, strict=False)]


class Reported(Frame):
    """Child to parent: a job's report (`fl.edge.exchange.Report`); claims and sum follow in chunks."""

    kind: Literal["reported"] = "reported"
    job: JobId
    origin: Origin
    returned: Total
    waiting: Total
    size: Size


class Alive(Frame):
    """A version that takes updates."""

    version: Annotated[int, Field(ge=0, lt=MAX_VERSION)]
    sha256: Digest
    size: Size


class Replied(Frame):
    """Parent to child: the reply (`fl.edge.exchange.Reply`); duplicates follow in chunks."""

    kind: Literal["replied"] = "replied"
    job: JobId
    granted: Total
    alive: Annotated[tuple[Alive, ...], Field(max_length=MAX_VERSIONS, strict=False)]
    over: bool
    size: Annotated[int, Field(ge=0, le=MAX_REPLY)]


FROM_CHILD: Final = TypeAdapter[Lease | Look | Reported](
    Annotated[Lease | Look | Reported, Field(discriminator="kind")]
)
FROM_PARENT: Final = TypeAdapter[Lease | Offered | Replied](
    Annotated[Lease | Offered | Replied, Field(discriminator="kind")]
)
_CHUNK: Final = adapter_of(Chunk)


def received(frames: Iterable[bytes], size: int, *, where: str) -> bytes:
    """The `size` bytes that follow in chunks; nothing is taken for none. The caller has bounded `size`.

    Raises MalformedMessage for a chunk out of place or damaged, or if they end before.
    """
    found = bytearray()
    if size == 0:
        return b""
    for raw in frames:
        head, piece = unpack(_CHUNK, raw, where=where)
        if head.offset != len(found) or len(piece) != min(CHUNK, size - len(found)):
            raise MalformedMessage(f"a chunk came at {head.offset}, not at {len(found)} of {size}", where=where)
        if xxhash.xxh3_64_intdigest(piece) != head.xxh3:
            raise MalformedMessage(f"the chunk at {head.offset} is damaged", where=where)
        found += piece
        if len(found) == size:
            return bytes(found)
    raise MalformedMessage(f"a transfer ended after {len(found)} of {size} bytes", where=where)
