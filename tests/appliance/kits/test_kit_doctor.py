"""What a kit's doctor looks at on a host: clock, ports, names, SNP firmware; and what a broker's start keeps."""

from __future__ import annotations

import shutil
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from planning import member_key, plan_of, publish, store_of

from appliance.demo.founding import found_consortium
from appliance.demo.setting import BROKER, OWNER, Setting, new_setting, now
from appliance.kits.diagnosis import clock_finding, name_finding, port_finding
from appliance.kits.firmware import host_product, parse_status, product_of
from appliance.kits.making import make_kits, write_kit
from appliance.kits.starting import broker_settings
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb
from policies.charter import Changes, read_store, write_store
from policies.errors import KitRefused, Unusable


@pytest.mark.parametrize(("seconds", "ok"), [(0, True), (-30, True), (31, False), (-3600, False)])
def test_a_clock_may_be_half_a_minute_off_the_broker_s(seconds: int, ok: bool) -> None:
    signed = now()
    found = clock_finding(signed + timedelta(seconds=seconds), signed)
    assert found.ok is ok
    assert f"{abs(seconds)} s" in found.seen


def test_a_port_that_is_taken_and_an_address_that_is_not_here_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        assert not port_finding(listen).ok
        assert "ss -ltnp" in port_finding(listen).do
    assert port_finding(listen).ok
    assert port_finding("192.0.2.1:8443").seen == "this host has no such address"


def test_a_name_must_resolve_to_the_planned_address() -> None:
    assert name_finding("localhost", "127.0.0.1").ok
    assert name_finding("localhost", None).ok
    wrong = name_finding("localhost", "192.0.2.10")
    assert not wrong.ok
    assert wrong.do == "Add the line `192.0.2.10 localhost` to /etc/hosts."
    assert not name_finding("nowhere.invalid", None).ok


def test_the_firmware_s_status_is_read_from_the_kernel_s_layout() -> None:
    reported = bytes([4, 0, 0, 0, 0, 0, 24, 219])
    raw = struct.pack("<BBBBIII8s8s", 1, 55, 1, 1, 40, 0, 3, bytes(8), reported)
    status = parse_status(raw)
    assert (status.api, status.running, status.rmp) == ((1, 55, 40), True, True)
    assert status.tcb(Product.MILAN) == Tcb(bootloader=4, tee=0, snp=24, microcode=219)
    assert not parse_status(raw[:2] + b"\0\0" + raw[4:]).running
    with pytest.raises(ValueError, match="32 bytes"):
        parse_status(raw + b"\0")


def test_the_product_line_follows_from_the_processor() -> None:
    assert (product_of(0x19, 0x01), product_of(0x19, 0x11), product_of(0x19, 0xA0)) == (
        Product.MILAN,
        Product.GENOA,
        Product.GENOA,
    )
    assert product_of(0x1A, 0x02) is Product.TURIN
    assert product_of(0x17, 0x31) is None
    assert host_product("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n") is Product.GENOA
    assert host_product("vendor_id\t: GenuineIntel\n") is None


@dataclass(frozen=True)
class Delivered:
    """A broker's kit on its host, with the broker's folder as its `local`."""

    setting: Setting
    kit: Path


@pytest.fixture
def delivered(tmp_path: Path) -> Delivered:
    (tmp_path / "made").mkdir()
    setting = new_setting(tmp_path / "made")
    found_consortium(setting)
    plan = plan_of(setting).model_copy(update={"guests": (), "users": ()})
    made = make_kits(plan, store_of(setting), setting.first_root, member_key(setting), now())
    write_kit(next(kit for kit in made if kit.name == f"broker-{BROKER}"), tmp_path / "kit")
    shutil.copytree(setting.home(OWNER) / BROKER, tmp_path / "kit/local")
    return Delivered(setting, tmp_path / "kit")


def test_a_broker_takes_the_kit_s_charter_and_never_an_older_one(delivered: Delivered) -> None:
    setting, local = delivered.setting, delivered.kit / "local"
    assert broker_settings(delivered.kit) == local / "broker.toml"
    assert read_store(local / "charter") == store_of(setting)
    publish(setting, Changes(renew=frozenset({"images"})))
    write_store(local / "charter", store_of(setting))
    broker_settings(delivered.kit)
    assert read_store(local / "charter") == store_of(setting)


def test_a_broker_s_folder_of_another_charter_or_with_other_keys_is_not_started(delivered: Delivered) -> None:
    local = delivered.kit / "local"
    root = local / "root.json"
    root.write_bytes(b"{}")
    with pytest.raises(KitRefused, match="not for the one whose root you trust"):
        broker_settings(delivered.kit)
    root.unlink()
    (local / "keys/signing.pem").chmod(0o644)
    with pytest.raises(Unusable, match="others may read this key"):
        broker_settings(delivered.kit)
    (local / "keys/signing.pem").unlink()
    with pytest.raises(Unusable, match="cannot be opened"):
        broker_settings(delivered.kit)
    assert BROKER in (local / "broker.toml").read_text()
