"""The role `gateway`: devices' service in front, the tree's link behind, for as long as the guest lives."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, Final, TypeVar

import uvloop

from fl.edge.child import Node, TreeLink
from fl.edge.gateway import Gateway, Pace
from fl.edge.gateway_service import CharterStore, GatewayService
from fl.edge.gateway_tree import GatewayTree
from fl.edge.gateway_workers import GatewayWorkers
from fl.edge.sealing import GroupKeys
from fl.party import Party
from fl.server.certificates import ServerCertificates, TlsContexts
from fl.transport.port import Port
from fl.transport.route import Route
from policies.errors import SealwrightError

ROTATION_SECONDS: Final = 3600.0
"""How often a gateway asks the brokers for the group key again, to hear that it was rotated."""
_PACE: Final = Pace()
_STOP_SECONDS: Final = 10.0
_T = TypeVar("_T")


def serve_gateway(
    party: Party,
    *,
    listen: str,
    parent: Route,
    parent_name: str,
    group_key: Callable[[], bytes],
    store: CharterStore,
    stop: threading.Event,
    ready: Callable[[str], None] = lambda _: None,
    pace: Pace = _PACE,
    patience: float = 300.0,
    workers: int = 1,
) -> None:
    """Be a gateway until `stop`: serve devices on `listen` (host:port), and stay connected to the parent.

    - `group_key`: asks the brokers for the value that all gateways share; called again every ROTATION_SECONDS.
    - `store`: the charter that the guest follows and its files, for devices.
    - `ready` gets the address that is listened on.
    - `workers`: with more than one, so many processes serve devices (`fl.edge.gateway_workers`); else this one does.

    Raises PeerLost if the address cannot be had, or a worker does not start; what `TreeLink.run` raises; Unusable for a
    group key that is none.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection of the port has six descriptors
    keys = _Keys(party, group_key)
    with ExitStack() as ends:
        if workers > 1:
            processes = ends.enter_context(GatewayWorkers(party, keys.raw, store, workers, pace))
            node: Node = processes
            port = Port(listen, {"https": processes.take}, tell=party.tell)
            ends.callback(port.close)
            address = port.address
        else:
            node, address = _served_here(party, keys, store, pace, listen, ends)
        party.tell(f"gateway {party.identity().name} listens on {address}")
        ends.enter_context(keys.renewed())
        ready(address)
        TreeLink(party, node, parent=parent, parent_name=parent_name).run(stop, patience=patience)


def _served_here(
    party: Party, keys: _Keys, store: CharterStore, pace: Pace, listen: str, ends: ExitStack
) -> tuple[Node, str]:
    """Serve devices in a thread of this process, until `ends`: the node of the tree, and the address."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gateway", daemon=True)
    thread.start()
    ends.callback(loop.close)
    ends.callback(thread.join, _STOP_SECONDS)
    ends.callback(loop.call_soon_threadsafe, loop.stop)

    def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(_STOP_SECONDS)

    def changed() -> None:
        loop.call_soon_threadsafe(service.news)

    tree = GatewayTree(changed)
    gateway = Gateway(keys.current, party.charter, party.identity, party.clock, tree.branches, pace)
    tls = TlsContexts(ServerCertificates(party), strangers=True).switching()
    service = GatewayService(gateway, store, tls, party.tell)
    run(service.start(listen))
    ends.callback(lambda: run(service.stop()))
    return tree, service.address


class _Keys:
    """The group's keys as they are now."""

    def __init__(self, party: Party, ask: Callable[[], bytes]) -> None:
        self._party = party
        self._ask = ask
        self._raw = ask()
        self._keys = GroupKeys.parse(self._raw, party.charter().id)
        self._over = threading.Event()

    def current(self) -> GroupKeys:
        return self._keys

    def raw(self) -> bytes:
        """The value as the brokers gave it."""
        return self._raw

    def renewed(self) -> ExitStack:
        """Ask for them again and again, until what is returned is closed."""
        thread = threading.Thread(target=self._renew, name="group key", daemon=True)
        thread.start()
        ends = ExitStack()
        ends.callback(thread.join, _STOP_SECONDS)
        ends.callback(self._over.set)
        return ends

    def _renew(self) -> None:
        while not self._over.wait(ROTATION_SECONDS):
            try:
                raw = self._ask()
                found = GroupKeys.parse(raw, self._party.charter().id)
            except SealwrightError as error:  # those that are here stay good; the lease decides over the guest
                self._party.tell(f"the group key was not renewed: {error.what}")
                continue
            if found.id != self._keys.id:
                self._party.tell("the group key was rotated")
            self._keys, self._raw = found, raw
