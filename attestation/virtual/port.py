"""The platform's end of the port: it answers its own guest, one request at a time, and nobody else."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.attester.virtual_port import HEADER, MAX_FRAME, short_path
from policies.errors import SealwrightError

REQUEST_SECONDS = 5.0
"""How long a request that has begun may take to arrive, and its answer to be taken."""

MAX_CONNECTIONS = 8

_PEER = struct.Struct("3i")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    report_data: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    vmpl: Annotated[int, Field(ge=0, le=3)]


class Port:
    """Serves report requests of one guest: of the processes in its session, and of no other.

    `report(report_data, vmpl)` returns the signed report; `certificates` is the table that goes with it.
    """

    def __init__(self, report: Callable[[bytes, int], bytes], certificates: bytes) -> None:
        self._report = report
        self._certificates = certificates
        self._turn = asyncio.Lock()
        self._started = asyncio.Event()
        self._guest = 0
        self._open = 0

    def admit(self, guest: int) -> None:
        """Answer from now on the session that the process `guest` leads; until then, everybody waits."""
        self._guest = guest
        self._started.set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other, until it ends.

        A connection may stay open and idle (a virtual machine's port is one for its whole life), but a request that
        has begun must arrive within REQUEST_SECONDS, and there are at most MAX_CONNECTIONS.
        """
        self._open += 1
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._started.wait()
                if not self._is_guest(writer.get_extra_info("socket")):
                    await self._answer(writer, {"error": "this port belongs to the guest"})
                    return
                if self._open > MAX_CONNECTIONS:
                    await self._answer(writer, {"error": f"there are {MAX_CONNECTIONS} connections already"})
                    return
            while head := await reader.read(1):
                async with self._turn, asyncio.timeout(REQUEST_SECONDS):
                    answer, usable = await self._respond(head, reader)
                    await self._answer(writer, answer)
                if not usable:
                    return
        except (ConnectionError, TimeoutError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            self._open -= 1
            writer.close()

    async def _respond(self, head: bytes, reader: asyncio.StreamReader) -> tuple[dict[str, str], bool]:
        """Return the answer to a request whose first byte is `head`, and whether the next can be found behind it."""
        (size,) = HEADER.unpack(head + await reader.readexactly(HEADER.size - 1))
        if size > MAX_FRAME:
            return {"error": f"a request of {size} bytes is larger than {MAX_FRAME}"}, False
        try:
            request = _Request.model_validate_json(await reader.readexactly(size))
        except ValidationError:
            return {"error": "the request is not a JSON object of report_data (128 hex digits) and vmpl (0 to 3)"}, True
        try:
            report = self._report(bytes.fromhex(request.report_data), request.vmpl)
        except SealwrightError as error:
            return {"error": error.what}, True
        return {
            "report": base64.b64encode(report).decode("ascii"),
            "certificates": base64.b64encode(self._certificates).decode("ascii"),
        }, True

    async def _answer(self, writer: asyncio.StreamWriter, answer: dict[str, str]) -> None:
        body = json.dumps(answer).encode()
        writer.write(HEADER.pack(len(body)) + body)
        await writer.drain()

    def _is_guest(self, connection: socket.socket) -> bool:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        process, user, _ = _PEER.unpack(raw)
        try:
            return bool(user == os.getuid() and os.getsid(process) == self._guest)
        except ProcessLookupError:
            return False


def bind_port(path: Path) -> socket.socket:
    """Return a listening UNIX socket at `path`, open to its owner alone."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(listening.fileno(), 0o600)  # what Linux binds has this mode; a umask would be every thread's
        with short_path(path) as name:
            listening.bind(name)
        listening.listen(16)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening
