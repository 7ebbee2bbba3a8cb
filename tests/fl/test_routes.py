"""Ways to the server: both drivers through proxies of each kind, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import SITES, FederationWorld, found_federation, make_job
from proxies import connecting_proxy, ending_proxy, passing_proxy
from safetensors.numpy import load_file

from attestation.errors import PeerRefused
from fl.errors import PeerLost
from fl.jobs.bundle import Bundle
from fl.transport.memory import SealedMemory
from fl.transport.route import Route
from policies.errors import Unusable

ADA = "acme-pharma/ada"
MODEL = np.tile(np.random.default_rng(7).standard_normal(7, dtype=np.float32), 1000)
SECRET = MODEL[:7].tobytes()
"""Weights that anybody who sees them recognises."""

DRIVERS = ["grpc", "https"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    """A server that admits what comes by proxies."""
    with world.server(connection_security="clear") as address:
        yield address


@pytest.fixture(scope="module")
def job(world: FederationWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, SealedMemory]:
    folder = tmp_path_factory.mktemp("job")
    bundle, model = make_job(folder, num_rounds=1, min_clients=1, initial_model={"w": MODEL}, round_seconds=60)
    world.approve(bundle)
    return bundle, model


def runs(
    world: FederationWorld, address: str, job: tuple[Bundle, SealedMemory], folder: Path, **way: Any
) -> np.ndarray[Any, Any]:
    """A whole job over this way: submitted, trained, downloaded."""
    world.way = way
    try:
        with world.site(address, SITES[0], number=0.0), world.client(address) as client:
            mine = client.submit(*job, roster=[SITES[0]], recipients=[ADA])
            assert [event.text for event in client.watch(mine, timeout=60)][-1] == "finished"
            found = load_file(client.download(mine, folder / "result", ledgers=None) / "model.safetensors")
    finally:
        world.way = {}
    return found["w"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_job_through_an_http_proxy(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory], tmp_path: Path, driver: str
) -> None:
    with connecting_proxy() as proxy:
        found = runs(world, server, job, tmp_path, driver=driver, proxy=f"http://{proxy.address}")
    assert found.tobytes() == MODEL.tobytes()
    assert set(proxy.asked) == {f"CONNECT {server}"}
    assert SECRET not in proxy.seen


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_job_through_a_proxy_that_passes_tls_on(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory], tmp_path: Path, driver: str
) -> None:
    with passing_proxy(server) as proxy:
        found = runs(world, proxy.address, job, tmp_path, driver=driver)
    assert found.tobytes() == MODEL.tobytes()
    assert len(proxy.seen) > 2 * MODEL.nbytes
    assert SECRET not in proxy.seen


@pytest.mark.parametrize(
    ("driver", "last_in_clear"),
    [
        ("grpc", False),
        ("https", True),
        pytest.param("grpc", True, marks=pytest.mark.long),
        pytest.param("https", False, marks=pytest.mark.long),
    ],
)
def test_a_job_through_a_chain_of_proxies_that_end_tls(
    world: FederationWorld,
    server: str,
    job: tuple[Bundle, SealedMemory],
    tmp_path: Path,
    driver: str,
    last_in_clear: bool,
) -> None:
    """Both proxies see the WebSocket, and in it nothing that is not encrypted between the attested keys."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with ExitStack() as stack:
        two, _ = stack.enter_context(ending_proxy(tmp_path / "two", server, tls_to=not last_in_clear))
        one, authority = stack.enter_context(ending_proxy(tmp_path / "one", two.address, tls_to=True))
        way = {"driver": driver, "connection_security": "tls", "custom_ca_cert": authority}
        found = runs(world, one.address, job, tmp_path, **way)
    assert found.tobytes() == MODEL.tobytes()
    for proxy in (one, two):
        assert f"GET /v1/tunnel/{driver}".encode() in proxy.seen
        assert len(proxy.seen) > 2 * MODEL.nbytes
        assert SECRET not in proxy.seen


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_job_through_a_proxy_without_tls(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory], tmp_path: Path, driver: str
) -> None:
    with ending_proxy(tmp_path, server, tls_to=True, tls=False) as (proxy, _):
        found = runs(world, proxy.address, job, tmp_path, driver=driver, connection_security="clear")
    assert found.tobytes() == MODEL.tobytes()
    assert SECRET not in proxy.seen


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_proxy_that_changes_a_byte_ends_the_connection(
    world: FederationWorld, server: str, tmp_path: Path, driver: str
) -> None:
    world.way = {"driver": driver, "connection_security": "clear"}
    try:
        with ending_proxy(tmp_path, server, tls_to=True, tls=False) as (proxy, _):
            proxy.change = lambda piece: piece[:-1] + bytes([piece[-1] ^ 1])
            with pytest.raises(PeerLost), world.client(proxy.address) as client:
                client.reports()
    finally:
        world.way = {}


@pytest.mark.parametrize("driver", DRIVERS)
def test_without_the_inner_channel_a_proxy_that_ends_tls_is_refused(
    world: FederationWorld, server: str, tmp_path: Path, driver: str
) -> None:
    """The client sees at once that it is not the server: nothing was said to it."""
    world.way = {"driver": driver}
    try:
        with (
            ending_proxy(tmp_path, server, tls_to=True) as (proxy, _),
            pytest.raises((PeerRefused, PeerLost)) as refused,
            world.client(proxy.address),
        ):
            raise AssertionError
    finally:
        world.way = {}
    assert "not the server hub" in str(refused.value) or driver == "grpc"
    assert b"Appraise" not in proxy.seen


@pytest.mark.parametrize("security", ["tls", "clear"])
def test_a_server_that_is_not_set_up_for_proxies_has_no_tunnels(
    world: FederationWorld, tmp_path: Path, security: str
) -> None:
    with world.server() as address, ending_proxy(tmp_path, address, tls_to=True) as (proxy, authority):
        more = {"custom_ca_cert": authority} if security == "tls" else {}
        world.way = {"connection_security": security, **more}
        try:
            with pytest.raises(PeerLost, match="no tunnel"), world.client(proxy.address if more else address):
                raise AssertionError
        finally:
            world.way = {}


def test_a_proxys_certificate_is_checked(world: FederationWorld, server: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with (
        ending_proxy(tmp_path, server, tls_to=True) as (proxy, _),
        ending_proxy(tmp_path / "other", server, tls_to=True) as (_, stranger),
    ):
        for authority in (stranger, None):
            world.way = {"connection_security": "tls", "custom_ca_cert": authority}
            try:
                with pytest.raises(PeerLost, match="certificate"), world.client(proxy.address):
                    raise AssertionError
            finally:
                world.way = {}


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_next_address_is_tried(world: FederationWorld, server: str, driver: str) -> None:
    world.way = {"driver": driver, "more_addresses": (server,)}
    try:
        with world.client("127.0.0.1:1") as client:
            assert client.reports().sites == ()
        world.way = {"driver": driver, "more_addresses": ("127.0.0.1:2",)}
        with pytest.raises(PeerLost, match=r"127\.0\.0\.1:1 .*127\.0\.0\.1:2 "), world.client("127.0.0.1:1"):
            raise AssertionError
    finally:
        world.way = {}


def test_two_ports_if_that_is_wanted(world: FederationWorld) -> None:
    second: list[str] = []
    with world.server(listen_https="127.0.0.1:0", ready_https=second.append) as first:
        for address, driver, other in ((first, "grpc", "https"), (second[0], "https", "grpc")):
            try:
                world.way = {"driver": driver}
                with world.client(address) as client:
                    assert client.reports().sites == ()
                world.way = {"driver": other}
                with pytest.raises(PeerLost), world.client(address):
                    raise AssertionError
            finally:
                world.way = {}
    assert any(f"this port does not serve {driver}" in line for line in world.told for driver in DRIVERS)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ({"proxy": "https://127.0.0.1:1"}, "a proxy is written"),
        ({"proxy": "http://user:secret@127.0.0.1:1"}, "a proxy is written"),
        ({"proxy": "http://127.0.0.1:1", "security": "clear"}, "the address is the proxy"),
        ({"custom_ca_cert": "x"}, "custom_ca_cert is for"),
    ],
)
def test_a_way_that_is_none_is_refused(way: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        Route(("127.0.0.1:1",), **way)
