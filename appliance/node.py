"""What runs in a guest: attest, take the keys that its role may have, start the role's service, keep the lease.

The one entry of every image. Its output is the guest's serial console: one JSON object a line, never a secret. It ends
with 0 when it was asked to stop, 1 when it was refused (before or during its work), 2 when it was started wrongly.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from appliance import user_data
from appliance.user_data_export import opened_export
from appliance.vault import Vault, opened_vault, vault_of
from attestation.attester.boot import Boot, read_boot
from attestation.canonical import canonical_bytes
from attestation.client import PAUSE_SECONDS, GuestSession
from attestation.errors import BrokerUnavailable, LeaseEnded
from attestation.identity import Identity
from policies.charter import Charter
from policies.errors import Refused, SealwrightError, Unusable
from policies.init_data import InitData

if TYPE_CHECKING:
    from appliance.data_volume import Header
    from fl.guard.sandbox import SiteData

KEY_SIZE: Final = 32
RETRY_SECONDS: Final = 1.0
"""Between two tries to reach a broker."""
FIRST_CONTACT_SECONDS: Final = 30.0
"""How long a starting guest looks for a broker before it gives up."""
STOP_SECONDS: Final = 30.0
"""How long a service may take to stop once the guest was refused; then all ends with it, open as it is."""

T = TypeVar("T")

_console = threading.Lock()


def say(event: str, **fields: Any) -> None:
    """Write one line to the console."""
    with _console:
        sys.stdout.write(json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def tell(line: str) -> None:
    """Write a service's line to the console."""
    say("log", line=line)


class Lease:
    """A guest's standing: its current identity, renewed by fresh attestation until it is refused.

    Unreachable brokers do not end it: what needs a lease then waits until they are back, PAUSE_SECONDS at most. Safe to
    use from many threads.
    """

    def __init__(self, session: GuestSession, stop: threading.Event) -> None:
        self._session = session
        self._stop = stop
        self.vault: Vault | None = None
        """The guest's vault, if its init-data ask for one; it is checked at each renewal."""
        self._identity = _patiently(session.attest)

    def identity(self) -> Identity:
        """The newest identity. Raises LeaseEnded once its EARs have ended unrenewed: without a lease, no work."""
        identity = self._identity
        if self.now() >= identity.lease_ends:
            raise LeaseEnded(identity.spiffe_id)
        return identity

    def charter(self) -> Charter:
        """The charter as enough brokers showed it last."""
        return self._session.charter

    def charter_store(self) -> tuple[Charter, Mapping[str, bytes]]:
        """That charter and its files."""
        return self._session.charter_store()

    def now(self) -> datetime:
        """The brokers' time."""
        return self._session.now()

    def release(self, resource: str) -> bytes:
        """Ask the brokers for a resource."""
        return self._waiting(lambda: self._session.release(resource))

    def record(self, kind: str, document: Mapping[str, Any]) -> str:
        """Write into a ledger; return the entry with its receipt as canonical JSON.

        If a broker falls silent before it has answered, the entry may stand there and again where it was tried next.
        """
        entry, receipt = self._waiting(lambda: self._session.recorded(kind, document))
        return canonical_bytes({"entry": entry, "receipt": receipt.to_json()}).decode()

    def keep(self, refused: Callable[[Refused], None]) -> None:
        """Renew until the guest stops. A refusal is told and ends the lease; so does a silence of PAUSE_SECONDS."""
        while not self._stop.wait(self._until_renewal()):
            try:
                self._identity = self._session.renew()
                if self.vault is not None:
                    self.vault.state.check()
                say("renewed", until=_rfc3339(self._identity.lease_ends))
            except (BrokerUnavailable, Unusable) as error:
                say("waiting", what=error.what, until=_rfc3339(self._identity.lease_ends))
                if self.now() - self._identity.lease_ends > timedelta(seconds=PAUSE_SECONDS):
                    refused(LeaseEnded(self._identity.spiffe_id))
                    return
            except Refused as error:
                refused(error)
                return

    def _waiting(self, ask: Callable[[], T]) -> T:
        """`ask`, and again while no broker can be reached or the lease is being renewed."""
        deadline = time.monotonic() + PAUSE_SECONDS
        while True:
            try:
                return ask()
            except (BrokerUnavailable, LeaseEnded) as error:
                if time.monotonic() >= deadline or self._stop.wait(RETRY_SECONDS):
                    raise
                say("waiting", what=error.what)

    def _until_renewal(self) -> float:
        """Seconds until the next renewal: half of what is left, at least RETRY_SECONDS."""
        return max(RETRY_SECONDS, (self._identity.lease_ends - self.now()).total_seconds() / 2)


def _patiently(attest: Callable[[], Identity]) -> Identity:
    """Attest; while no broker answers, try again for FIRST_CONTACT_SECONDS."""
    deadline = time.monotonic() + FIRST_CONTACT_SECONDS
    while True:
        try:
            return attest()
        except BrokerUnavailable as error:
            if time.monotonic() >= deadline:
                raise
            say("waiting", what=error.what)
            time.sleep(RETRY_SECONDS)


def main(guest: Path) -> int:
    """Run the guest unpacked at `guest` in the role that its init-data gives it; return its exit status."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        return _run(read_boot(guest), stop)
    except Refused as error:
        _say_refused(error)
        return 1
    except SealwrightError as error:
        say("unusable", what=error.what, where=error.where, do=error.do)
        return 2


def _run(boot: Boot, stop: threading.Event) -> int:
    session = GuestSession(boot.attester(), boot.init_data, devices=boot.devices())
    service = SERVICES.get(session.init.role)
    if service is None:
        raise _incomplete(f"this image has no service for the role {session.init.role}")
    gpus = boot.gpu_session()
    if gpus is not None:
        gpus.begin()
    say("attesting", world=boot.world, role=session.init.role, name=session.init.name)
    lease = Lease(session, stop)
    identity = lease.identity()
    claims = session.ear.claims
    say(
        "attested",
        platform=session.ear.document.platform,
        identity=identity.spiffe_id,
        image=session.ear.subject.image,
        measurement=claims.get("measurement"),
        brokers=list(session.brokers),
        until=_rfc3339(identity.lease_ends),
    )
    refusals: list[Refused] = []

    def end(error: Refused) -> None:
        refusals.append(error)
        stop.set()
        impatient = threading.Timer(STOP_SECONDS, _end_now, (error,))
        impatient.daemon = True
        impatient.start()

    keeper = threading.Thread(target=lease.keep, args=(end,), name="lease", daemon=True)
    keeper.start()
    try:
        vault = vault_of(session.init)
        resources = {purpose: name for purpose, name in sorted(session.init.resources.items()) if name != vault}
        with ExitStack() as open_ones:
            if vault is not None:
                lease.vault = open_ones.enter_context(opened_vault(session, vault, boot.disks))
                say("opened vault", vault=vault, generation=lease.vault.state.generation)
            keys = {purpose: lease.release(resource) for purpose, resource in resources.items()}
            say("released", resources=sorted(resources.values()))
            for broker, why in session.false_shares.items():
                say("false share", broker=broker, what=why)
            if gpus is not None:
                gpus.allow_work()
                say("gpus work")
                open_ones.callback(gpus.end_work)
            service(session.init, boot, lease, keys, stop)
        if vault is not None:
            say("closed vault", vault=vault)
    except Refused:
        if refusals:  # what follows from a refusal does not hide it
            _say_refused(refusals[0])
        raise
    finally:
        stop.set()
        keeper.join(timeout=15)
        session.close()
    if refusals:
        _say_refused(refusals[0])
        return 1
    say("stopped")
    return 0


def _serve(init: InitData, boot: Boot, lease: Lease, keys: Mapping[str, bytes], stop: threading.Event) -> None:
    """The role `server`: aggregate."""
    from fl.server import serve

    if init.listen is None:
        raise _incomplete("a server needs `listen`")
    serve(
        identity=lease.identity,
        charter=lease.charter,
        clock=lease.now,
        listen=init.listen,
        listen_https=init.listen_https,
        connection_security=init.connection_security,
        model_key=_key(keys, "model"),
        record=lease.record,
        stop=stop,
        tell=tell,
        ready=lambda address: say("serving", address=address),
        state=None if lease.vault is None else lease.vault.folder / "jobs",
    )


def _train(init: InitData, boot: Boot, lease: Lease, keys: Mapping[str, bytes], stop: threading.Event) -> None:
    """The role `site`: open the site's data, and train on it."""
    from fl.site import run

    if init.server is None:
        raise _incomplete("a site needs `server`")
    with site_data(init, boot, lease, keys) as data:
        run(
            identity=lease.identity,
            charter=lease.charter,
            clock=lease.now,
            server=init.server,
            server_name=init.server.name,
            data=data,
            record=lease.record,
            stop=stop,
            tell=tell,
            connected=lambda: say("joined"),
        )


@contextmanager
def site_data(init: InitData, boot: Boot, lease: Lease, keys: Mapping[str, bytes]) -> Iterator[SiteData]:
    """The site's sealed file, opened in memory, and its data volume, mounted: those that the init-data name keys of."""
    from fl.guard.sandbox import SiteData
    from fl.guard.sealed_data import open_file

    purposes = {"data": "data", user_data.PURPOSE: user_data.DISK}
    wanted = {purpose: disk for purpose, disk in purposes.items() if purpose in keys}
    if not wanted:
        raise _incomplete("a site needs a resource for the purpose `data` or `user_data`")
    if init.user_data is not None and user_data.PURPOSE not in wanted:
        raise _incomplete("a data volume on an export needs a resource for the purpose `user_data`")
    for purpose, disk in wanted.items():
        exported = purpose == user_data.PURPOSE and init.user_data is not None
        if disk not in boot.disks and not exported:
            raise _incomplete(f"a site needs a disk `{disk}`")
    data = SiteData()
    gpus = boot.gpu_session()
    if gpus is not None:  # attested, and allowed to work by now: the site's jobs may use them
        data.devices = gpus.work_nodes()
    if "data" in wanted:
        data.update(open_file(boot.disks["data"], _key(keys, "data")))
        say("opened", entries={name: len(content) for name, content in sorted(data.items())})
    with ExitStack() as opened:
        if user_data.PURPOSE in wanted:
            volume = opened_volume(init, boot, lease, _key(keys, user_data.PURPOSE))
            data.folder, header = opened.enter_context(volume)
            say("opened data volume", volume=header.volume, generation=header.generation, fills=len(header.layers))
        yield data


@contextmanager
def opened_volume(init: InitData, boot: Boot, lease: Lease, key: bytes) -> Iterator[tuple[Path, Header]]:
    """The folder that shows a data volume's files, and its header: on a disk, or the export that the init-data name."""
    with ExitStack() as opened:
        export = init.user_data
        device = boot.disks[user_data.DISK] if export is None else opened.enter_context(opened_export(export))
        folder, header = opened.enter_context(user_data.opened_user_data(device, key))
        if lease.vault is not None:
            lease.vault.never_older(header.volume, header.generation)
        yield folder, header


def _gateway(init: InitData, boot: Boot, lease: Lease, keys: Mapping[str, bytes], stop: threading.Event) -> None:
    """The role `gateway`: devices in front, the tree behind."""
    from fl.edge.gateway_start import serve_gateway
    from fl.party import Party
    from fl.transport.route import Route

    if init.listen is None or init.server is None:
        raise _incomplete("a gateway needs `listen` for devices and `server`, its parent")
    if "group" not in keys:
        raise _incomplete("the init-data must name the gateways' group key as the resource for the purpose `group`")
    serve_gateway(
        Party(lease.identity, lease.charter, lease.now, lease.record, tell),
        listen=init.listen,
        parent=Route.of(init.server),
        parent_name=init.server.name,
        group_key=lambda: lease.release(init.resources["group"]),
        store=lease.charter_store,
        stop=stop,
        ready=lambda address: say("serving", address=address),
        workers=len(os.sched_getaffinity(0)),
    )


def _inner(init: InitData, boot: Boot, lease: Lease, keys: Mapping[str, bytes], stop: threading.Event) -> None:
    """The role `inner`: sum what comes from the tree below, and hand it up."""
    from fl.edge.inner import serve_inner
    from fl.party import Party
    from fl.transport.route import Route

    if init.listen is None or init.server is None:
        raise _incomplete("an inner node needs `listen`, and `server`, its parent")
    serve_inner(
        Party(lease.identity, lease.charter, lease.now, lease.record, tell),
        listen=init.listen,
        parent=Route.of(init.server),
        parent_name=init.server.name,
        stop=stop,
        ready=lambda address: say("serving", address=address),
    )


SERVICES: Final[dict[str, Callable[[InitData, Boot, Lease, Mapping[str, bytes], threading.Event], None]]] = {
    "inner": _inner,
    "server": _serve,
    "site": _train,
    "gateway": _gateway,
}
"""What each role starts. A role that is not here has no service in this image."""


def _key(keys: Mapping[str, bytes], purpose: str) -> bytes:
    key = keys.get(purpose)
    if key is None or len(key) != KEY_SIZE:
        raise _incomplete(f"the init-data must name a resource of {KEY_SIZE} bytes for the purpose `{purpose}`")
    return key


def _incomplete(what: str) -> Unusable:
    return Unusable(what, where="init-data", do="Write the guest's init-data anew and enrol it.")


def _end_now(error: Refused) -> None:
    """The service has not stopped: say why, and end with all that is open. The guest powers off."""
    _say_refused(error)
    say("stopped", what=f"the service did not end within {STOP_SECONDS:.0f} s")
    os._exit(1)


def _say_refused(error: Refused) -> None:
    say("refused", what=error.what, where=error.where, do=error.do, reasons=list(error.reasons))


def _rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
