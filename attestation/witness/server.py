"""A witness that stands alone: settings to sockets. TLS 1.3 only; one line on standard error says when it is ready.

It follows the charter in its folder, and asks the charter's brokers for a newer one from time to time. Whatever a
broker gives is verified from the root in the folder and may not be older than what is there.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import uvloop
from aiohttp import web

from attestation.broker.clock import now
from attestation.broker.exchange import REQUEST_ID, TooLarge, TooSlow, json_response, log
from attestation.broker.keys import load_issuer
from attestation.broker.listening import ServerTls, listening
from attestation.connection import Connection, read_charter_store
from attestation.ledger.witness import known_logs
from attestation.witness.config import WitnessConfig, load_config, read_witness_entry
from attestation.witness.http import WATCH, WITNESS, CharterWatch, routes
from attestation.witness.service import Witness
from attestation.witness.store import open_store
from policies.charter import Charter, load_charter, read_store, write_store
from policies.charter.signing import current_charter
from policies.documents import Consortium
from policies.errors import SealwrightError, Unusable
from policies.keys import load_private_key, public_pem

REQUEST_SECONDS: Final = 30.0
REFRESH_SECONDS: Final = 60.0
"""How often the brokers are asked for a newer charter."""
FETCH_SECONDS: Final = 10.0
_ROOT_LIMIT: Final = 1024 * 1024


class FollowedCharter:
    """The charter that a witness follows: the one in its folder, or a newer one that a broker of it has.

    A witness needs its keys alone, which no time takes back: a charter that has lapsed serves until there is a newer
    one. Its calls block; they may come from any thread.
    """

    def __init__(self, folder: Path, root: bytes) -> None:
        """Raises Refused or Unusable if the charter in `folder` cannot be verified from `root`."""
        self._folder = folder
        self._root = root
        self._lock = threading.Lock()
        self._charter: Charter = current_charter(read_store(folder), root)

    @property
    def consortium(self) -> Consortium:
        """Who witnesses and keeps ledgers."""
        return self._charter.consortium

    @property
    def version(self) -> int:
        """Version of the charter that is followed."""
        return self._charter.version

    def refresh(self, at: datetime) -> list[str]:
        """Look into the folder and at every broker for a newer charter; return what was wrong where."""
        problems = []
        with self._lock:
            try:
                self._take(current_charter(read_store(self._folder), self._root), None)
            except SealwrightError as error:
                problems.append(f"{self._folder}: {error.what}")
            for broker in self.consortium.brokers:
                connection = Connection(broker.name, broker.url, broker.issuer_certificate, timeout=FETCH_SECONDS)
                try:
                    store = read_charter_store(connection)
                    self._take(load_charter(store, self._root, at, known=self._charter), store)
                except SealwrightError as error:
                    problems.append(f"broker {broker.name}: {error.what}")
                finally:
                    connection.close()
        return problems

    def _take(self, found: Charter, store: dict[str, bytes] | None) -> None:
        if found.version > self._charter.version:
            self._charter = found
            if store is not None:
                write_store(self._folder, store)


async def _run(folder: Path, config: WitnessConfig) -> None:
    key = load_private_key(folder / config.witness_key)
    entry = read_witness_entry(folder / config.entry)
    if entry.name != config.name or entry.public_key != public_pem(key) or entry.issuer_certificate is None:
        do = "Put back the entry.json that was made together with this witness's keys."
        raise Unusable("this is not this witness's entry", where=str(folder / config.entry), do=do)
    followed = FollowedCharter(folder / config.charter, _read_root(folder / config.root))
    tls = ServerTls(load_issuer(folder / config.issuer_key, entry.issuer_certificate), config.name, ["witness"])
    tls.renew(now())
    witness = Witness(key, open_store(folder / config.state), lambda: followed.consortium, now)
    app = web.Application(middlewares=[_around], client_max_size=_ROOT_LIMIT)
    app[WITNESS] = witness
    app.add_routes(routes)

    async def look() -> None:
        for problem in await asyncio.to_thread(followed.refresh, now()):
            log("charter", problem=problem)

    app[WATCH] = CharterWatch(look)

    async def healthz(_request: web.Request) -> web.Response:
        named = known_logs(followed.consortium, entry.public_key)
        problems = [] if named else ["the charter does not name this witness"]
        state = {
            "alive": True,
            "ready": not problems,
            "problems": problems,
            "ledgers": sorted(named.keys if named else ()),
        }
        return json_response(state, status=503 if problems else 200)

    app.router.add_get("/healthz", healthz)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    try:
        async with listening(app, tls, config.listen) as address:
            upkeep = asyncio.create_task(_upkeep(look, tls))
            log("ready", witness=config.name, address=address, ledgers=len(followed.consortium.brokers))
            try:
                await ended.wait()
            finally:
                upkeep.cancel()
                with suppress(asyncio.CancelledError):
                    await upkeep
            log("ending", witness=config.name)
    finally:
        witness.close()


async def _upkeep(look: Callable[[], Awaitable[None]], tls: ServerTls) -> None:
    while True:
        tls.renew(now())
        await look()
        await asyncio.sleep(REFRESH_SECONDS)


@web.middleware
async def _around(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give the request an id, bound its time, turn errors into answers."""
    REQUEST_ID.set(secrets.token_hex(8))
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            return await handler(request)
    except SealwrightError as error:
        status = 413 if isinstance(error, TooLarge) else 408 if isinstance(error, TooSlow) else 400
        return web.Response(text=f"{error.what}\n", status=status)
    except TimeoutError:
        return web.Response(text=f"the request took more than {REQUEST_SECONDS:.0f} s\n", status=503)
    except web.HTTPException as error:
        return web.Response(text=f"{error.reason}\n", status=error.status)
    except Exception as error:  # a fault of ours: the caller hears that there is one, the log what it is
        log("fault", path=request.path, error=f"{type(error).__name__}: {error}")
        return web.Response(text="the witness has a fault; its log tells more\n", status=500)


def run_witness(path: Path) -> None:
    """Run the witness whose settings are at `path` until SIGTERM or SIGINT. Raises Unusable or Refused."""
    config = load_config(path)
    os.umask(0o077)
    uvloop.run(_run(path.parent, config))


def _read_root(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_ROOT_LIMIT + 1)
    except OSError as error:
        do = "Put the charter's first root there, as you were given it."
        raise Unusable(f"the trusted root cannot be read: {error.strerror}", where=str(path), do=do) from error
