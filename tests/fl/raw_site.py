"""A hostile site: an attested guest whose software says whatever a test wants it to say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Annotated, Any

from federation_world import SERVER, FederationWorld, now
from pydantic import Field, TypeAdapter

from attestation.identity import Identity
from fl.errors import CallFailed
from fl.transport.channel import ServerConnection, connect
from fl.transport.chunks import serve_chunks
from fl.transport.frames import TO_ATTENDING_SITE, Deliver, Frame, Lease, Pull, Ready, Train, Verdict, pack, unpack

ANSWER = TypeAdapter[Pull | Verdict](Annotated[Pull | Verdict, Field(discriminator="kind")])


class RawSite:
    """Speaks the protocol frame by frame."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        self.outbox: SimpleQueue[bytes | None] = SimpleQueue()

    def attend(self, first: bytes) -> None:
        """Open the attendance with this first frame."""
        self.outbox.put(first)
        self.call = self.connection.call("Attend", iter(self.outbox.get, None), timeout=30)
        self.frames = iter(self.call)

    def say(self, frame: Frame | bytes) -> None:
        self.outbox.put(frame if isinstance(frame, bytes) else pack(frame))

    def hear(self, kind: type[Any]) -> Any:
        """The next frame of this kind; others are passed over. Raises CallFailed, StopIteration."""
        while True:
            frame, _ = unpack(TO_ATTENDING_SITE, next(self.frames), where="server")
            if isinstance(frame, kind):
                return frame

    def join(self) -> Train:
        """Take part in the next job until there is a task."""
        from fl.transport.frames import Prepare

        self.say(Ready(job=self.hear(Prepare).job))
        task: Train = self.hear(Train)
        return task

    def deliver(self, task: Train, data: bytes, chunks: list[bytes] | None = None, **changes: Any) -> Verdict:
        """Deliver `data` (or raw `chunks` of it); the server's verdict. Raises CallFailed."""
        fields: dict[str, Any] = {
            "job": task.job,
            "round": task.round,
            "params_type": "FULL",
            "weight": 1.0,
            "metrics": {},
            "size": len(data),
        }
        frames = [pack(Deliver(**{**fields, **changes})), *(chunks if chunks is not None else serve_chunks(data))]
        call = self.connection.call("Deliver", iter(frames), timeout=10)
        try:
            for raw in call:
                frame, _ = unpack(ANSWER, raw, where="server")
                if isinstance(frame, Verdict):
                    return frame
        finally:
            call.cancel()
        raise AssertionError("no verdict")

    def close(self) -> None:
        self.outbox.put(None)
        if hasattr(self, "call"):
            self.call.cancel()


@contextmanager
def raw_site(world: FederationWorld, address: str, identity: Identity, *, attend: bool = True) -> Iterator[RawSite]:
    """A connected raw site; with `attend` its attendance is open."""
    with connect(
        world.to(address),
        server=SERVER,
        tls_key=identity.tls_key_pem,
        certificate_pem=identity.certificate_pem,
        charter=world.charter,
        clock=now,
    ) as connection:
        site = RawSite(connection)
        try:
            if attend:
                site.attend(pack(Lease(ears=identity.ears)))
                site.hear(Lease)
            yield site
        finally:
            site.close()


def status_of(error: CallFailed) -> tuple[str, str]:
    """A failed call's status and details."""
    return error.status, error.details
