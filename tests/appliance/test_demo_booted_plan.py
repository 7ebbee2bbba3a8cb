"""The demonstration with booted guests, as far as it goes without an emulator: plan, charter, kits, init-data."""

from __future__ import annotations

from pathlib import Path

from appliance.demo.founding import admit, deliver, found_consortium
from appliance.demo.setting import (
    BOOTED_BROKER_PORT,
    BOOTED_SERVER_PORT,
    BROKERS,
    GUESTS,
    HOST_SEEN_BY_GUEST,
    PRODUCTS,
    SERVER,
    new_setting,
    vcpu_model,
)
from cvm_image.generate import LaunchGrid, generate_image
from cvm_image.signing import create_signing_keys
from policies.init_data import parse_init_data
from policies.kits import INIT_DATA, USER_FILE, open_signed_kit


def test_booted_guests_reach_brokers_and_server_by_their_host_s_own_address(tmp_path: Path) -> None:
    models = tuple(vcpu_model(product) for product in PRODUCTS.values())
    grid = LaunchGrid(vcpu_models=models, vcpus=(1,))
    generate_image(tmp_path / "image", name="fl", keys=create_signing_keys(tmp_path / "keys"), grid=grid)
    (tmp_path / "demo").mkdir()
    setting = new_setting(tmp_path / "demo", tmp_path / "image")
    found_consortium(setting)
    admit(setting, {"ab" * 32: ("trial", 1 << 40)})
    deliver(setting)
    for guest in GUESTS:
        kit = open_signed_kit(setting.guest_kit(guest), trust=setting.first_root)
        init = parse_init_data(kit.files[INIT_DATA])
        urls = {f"https://{HOST_SEEN_BY_GUEST}:{BOOTED_BROKER_PORT + number}" for number in range(len(BROKERS))}
        assert {broker.url for broker in init.brokers} == urls
        assert kit.manifest.image is not None
        assert (kit.manifest.image.vcpus, kit.manifest.image.memory_mib) == (1, 3072)
        if guest == SERVER:
            assert [port.listen for port in kit.manifest.ports] == [f"0.0.0.0:{BOOTED_SERVER_PORT}"]
        else:
            assert init.server is not None
            assert init.server.address == f"{HOST_SEEN_BY_GUEST}:{BOOTED_SERVER_PORT}"
    user = open_signed_kit(setting.kit, trust=setting.first_root)
    assert f"127.0.0.1:{BOOTED_SERVER_PORT}" in user.files[USER_FILE].decode()
    assert {broker.url for broker in user.manifest.brokers} == {
        f"https://127.0.0.1:{port}" for port in setting.broker_ports.values()
    }
