"""The broker's process: settings to sockets. TLS 1.3 only; one line on standard error says when it is ready."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Final

import uvloop

from attestation.broker.app import make_app
from attestation.broker.charters import CharterFolder, charter_from_ledger
from attestation.broker.clock import now
from attestation.broker.config import CONFIG_NAME, BrokerConfig, load_config
from attestation.broker.exchange import log
from attestation.broker.gpu_folder import GpuFolder
from attestation.broker.listening import ServerTls, listening
from attestation.broker.own_keys import KeyFolder
from attestation.broker.peer_kek import LOCKED
from attestation.broker.rewrapping import KekKeeper, rewrap_all
from attestation.broker.service import Broker
from attestation.broker.stamping import stamping_round
from attestation.broker.storage import open_storage
from attestation.broker.upkeep import head_keys, sole_broker
from attestation.endorsements.kds import KdsClient, https_fetch
from attestation.endorsements.kds_cache import KdsCache
from attestation.errors import BrokerUnavailable
from attestation.ledger.checkpoint import ledger_origin
from attestation.witness.http import WATCH, CharterWatch
from attestation.witness.service import Witness
from attestation.witness.store import open_store
from policies.charter import Charter, read_store
from policies.charter.signing import current_charter
from policies.documents import BrokerEntry, Consortium
from policies.errors import Refused, SealwrightError, Unusable
from policies.keys import load_private_key

OPEN_FILES: Final = 65_536
SWITCH_SECONDS: Final = 0.0005
"""How long a thread may keep others from running Python: decisions over one resource follow one another, beside the
event loop, and each would wait the usual 5 ms for it several times over."""
UPKEEP_SECONDS: Final = 30.0
LOCKED_SECONDS: Final = 3.0
"""How often a broker whose keys lie with its peers asks them while it has none."""
SOON_SECONDS: Final = 3.0
"""How often other brokers are asked while they have yet to sign a timestamp."""
WAIT_SECONDS: Final = 1.0
"""How often a broker that has no charter yet asks the others to sign its timestamp."""
KDS_SECONDS: Final = 20.0
"""How long a guest may wait for AMD's service, which is asked once for each chip and patch level."""


def open_broker(folder: Path, config: BrokerConfig, keeper: KekKeeper | None = None) -> Broker:
    """Open everything that the settings name. Raises Unusable or Refused, naming what does not fit."""
    keeper = keeper or KekKeeper(folder / CONFIG_NAME)
    root = _read(folder / config.root)
    files = KeyFolder(folder, config)
    store = read_store(folder / config.charter)
    consortium = current_charter(store, root).consortium
    entry = consortium.broker(config.name)
    if entry is None:
        do = "Put this broker's entry.json into the charter."
        raise Unusable(f"the charter has no broker {config.name}", where=str(folder / config.charter), do=do)
    own = files.find(entry)
    origin = ledger_origin(consortium.trust_domain, config.name)
    storage = open_storage(
        config.database_url(folder),
        origin,
        own.signing,
        others=files.signing(),
        password=config.password(folder),
        trusted=lambda step: head_keys(step, folder, config),
    )
    try:
        known = storage.read(lambda step: charter_from_ledger(step, root))
    except BaseException:
        storage.close()
        raise
    fetch = https_fetch() if config.kds and consortium.platform == "hardware" else None
    kds = KdsClient(KdsCache(folder / config.endorsements), fetch, patience_seconds=KDS_SECONDS)
    lifetime = timedelta(hours=config.timestamp_hours)
    broker = Broker(
        config.name,
        storage=storage,
        charters=CharterFolder(folder / config.charter, root, files.signing, lifetime, known=known),
        keys=own,
        find_keys=files.find,
        kek=keeper.ring,
        complete=kds.complete_evidence,
        gpu_endorsements=GpuFolder(folder / config.gpu_endorsements).read,
        session_seconds=config.limits.session_seconds,
        max_sessions=config.limits.sessions,
    )
    broker.following.rotated = files.promote
    try:
        files.promote(entry)
        broker.witness = _open_witness(folder, config, broker)
    except BaseException:
        storage.close()
        raise
    return broker


def _open_witness(folder: Path, config: BrokerConfig, broker: Broker) -> Witness | None:
    """The witness of the other members' ledgers, if this broker has a key for one. Raises Unusable."""
    path = folder / config.witness_key
    if not path.exists():
        return None
    key, state = load_private_key(path), open_store(folder / config.witness_state)

    def consortium() -> Consortium | None:
        return None if broker.following.newest is None else broker.following.newest.consortium

    return Witness(key, state, consortium, now)


@asynccontextmanager
async def serving(broker: Broker, config: BrokerConfig, keeper: KekKeeper | None = None) -> AsyncIterator[str]:
    """Serve `broker` until the block ends; gives `host:port` as it is bound."""
    following = broker.following
    tls = ServerTls(following.keys.issuer, broker.name, ["broker"] if broker.witness is None else ["broker", "witness"])
    tls.renew(now())
    promote = following.rotated

    def rotated(entry: BrokerEntry) -> None:
        promote(entry)
        tls.follow(following.keys.issuer, now())
        log("rotated", broker=broker.name, what="signing and issuer keys, as the charter names them")

    following.rotated = rotated
    try:
        await following.charter(broker.clock())
    except BrokerUnavailable as error:
        if not following.charters.lacking:
            raise
        log("waiting", what="other brokers have to sign the charter's timestamp", problem=error.what)
    app = make_app(broker, client_rate=config.limits.client_rate, client_burst=config.limits.client_burst)
    app[WATCH] = CharterWatch(lambda: look_at_charter(broker))
    async with listening(app, tls, config.listen) as address:
        upkeep = asyncio.create_task(_upkeep(broker, tls, keeper))
        try:
            yield address
        finally:
            upkeep.cancel()
            with suppress(asyncio.CancelledError):
                await upkeep


async def _upkeep(broker: Broker, tls: ServerTls, keeper: KekKeeper | None) -> None:
    """Keep the timestamp, the certificate and the resources' keys fresh while nobody asks."""
    await look_at_keks(broker, keeper)
    asked = 0
    while True:
        await look_at_charter(broker)
        asked = await _rest(broker, asked)
        tls.renew(now())
        await look_at_keks(broker, keeper)
        try:
            await broker.forget_sessions()
        except SealwrightError as error:
            log("sessions", problem=error.what)
        if broker.storage.cosigner.problem:
            log("witnesses", problem=broker.storage.cosigner.problem)


async def _rest(broker: Broker, asked: int) -> int:
    """Wait until there may be something to do, and return how often others were asked for signatures in a row.

    While they have yet to sign a timestamp they are asked soon, and then less and less often.
    """
    rest = LOCKED_SECONDS if broker.keks.key_id == LOCKED else UPKEEP_SECONDS
    passed = 0.0
    while passed < rest:
        await asyncio.sleep(min(SOON_SECONDS, rest - passed))
        passed += SOON_SECONDS
        if broker.following.charters.lacking and passed >= SOON_SECONDS * 2 ** min(asked, 8):
            return asked + 1
    return asked + 1 if broker.following.charters.lacking else 0


async def look_at_keks(broker: Broker, keeper: KekKeeper | None) -> None:
    """Use the key-encryption key that the settings name now, put resources under it, and say what happened."""
    try:
        if keeper is not None and await asyncio.to_thread(keeper.look):
            log("key-encryption", in_use=broker.keks.key_id)
        if keeper is not None and await asyncio.to_thread(keeper.tend, broker.following.newest):
            log("key-encryption", in_use=broker.keks.key_id)
        found = await rewrap_all(broker.storage, broker.keks)
    except SealwrightError as error:
        log("key-encryption", problem="; ".join(error.reasons) if isinstance(error, Refused) else error.what)
        return
    if found.done:
        log("rewrapped", resources=found.done, under=found.key_id)
    if found.problems:
        log("key-encryption", problem="; ".join(found.problems[:5]))


async def look_at_charter(broker: Broker) -> None:
    """Follow the newest charter: of the folder, another process or another broker; say what stands in the way."""
    problem = await _follow_charter(broker)
    try:
        problems = await asyncio.to_thread(stamping_round, broker.name, broker.following.charters, broker.clock())
    except SealwrightError as error:
        problems = {broker.name: error.what}
    for name, words in sorted(problems.items()):
        log("timestamp", broker=name, problem=words)
    problem = await _follow_charter(broker)
    if problem:
        log("charter", problem=problem)


async def _follow_charter(broker: Broker) -> str | None:
    """Follow the newest charter that holds; return what stands in the way."""
    try:
        await broker.following.look_around()
        await broker.following.charter(broker.clock())
    except SealwrightError as error:
        return error.what
    return broker.following.charters.problem


async def _first_charter(broker: Broker, ended: asyncio.Event) -> Charter | None:
    """The charter that is followed first; None if the broker is to end before others have signed its timestamp."""
    while not ended.is_set():
        if broker.following.newest is not None and broker.following.newest.expires > broker.clock():
            return broker.following.newest
        await look_at_charter(broker)
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), WAIT_SECONDS)
    return None


async def _run(path: Path, config: BrokerConfig) -> None:
    loop = asyncio.get_running_loop()
    keeper = KekKeeper(path)
    broker = open_broker(path.parent, config, keeper)
    try:
        async with serving(broker, config, keeper) as address:
            ended = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, ended.set)
            tasks: set[asyncio.Task[None]] = set()

            def look() -> None:
                for work in (look_at_charter(broker), look_at_keks(broker, keeper)):
                    task = asyncio.ensure_future(work)
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

            loop.add_signal_handler(signal.SIGHUP, look)
            charter = await _first_charter(broker, ended)
            if charter is not None:
                log(
                    "ready",
                    broker=broker.name,
                    address=address,
                    charter=charter.id,
                    version=charter.version,
                    platform=charter.consortium.platform,
                )
            await ended.wait()
            log("ending", broker=broker.name)
    finally:
        broker.storage.close()
        broker.keks.close()
        if broker.witness is not None:
            broker.witness.close()


def run_broker(path: Path) -> None:
    """Run the broker whose settings are at `path` until SIGTERM or SIGINT. Raises Unusable or Refused."""
    config = load_config(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    os.umask(0o077)
    sys.setswitchinterval(SWITCH_SECONDS)
    with sole_broker(config.state(path.parent)):
        uvloop.run(_run(path, config))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(1024 * 1024 + 1)
    except OSError as error:
        do = "Put the charter's first root there, as you were given it."
        raise Unusable(f"the trusted root cannot be read: {error.strerror}", where=str(path), do=do) from error
    return raw
