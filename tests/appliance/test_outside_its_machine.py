"""Server, site and gateway with production settings, started where there is no secure processor: nothing begins."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from policies.documents import Role
from policies.init_data import BrokerAddress, InitData, ServerAddress, write_init_data

ROLES: tuple[Role, ...] = ("server", "site", "gateway")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def start(guest: Path, role: Role, port: int) -> tuple[int, list[dict[str, object]], str]:
    """The program of every image, in a folder as an image and its boot leave it; its status and what it said."""
    for folder in ("run", "etc/sealwright"):
        (guest / folder).mkdir(parents=True)
    (guest / "etc/sealwright/attester").write_text("hardware\n")
    init = InitData(
        version=1,
        algorithm="sha256",
        charter=sha256(b"root").hexdigest(),
        role=role,
        name=f"acme-{role}",
        brokers=(BrokerAddress(name="acme-broker", url=f"https://127.0.0.1:{free_port()}"),),
        listen=f"127.0.0.1:{port}",
        server=ServerAddress(name="acme-server", address="127.0.0.1:1") if role == "site" else None,
    )
    (guest / "run/init-data.toml").write_bytes(write_init_data(init))
    (guest / "run/data").write_bytes(b"sealed")
    boot = {
        "cmdline": "sealwright.entry=appliance.node",
        "init_data": "run/init-data.toml",
        "port": str(guest / "run/port"),
        "disks": {"data": str(guest / "run/data")},
    }
    (guest / "run/boot.json").write_text(json.dumps(boot))
    code = (
        f"import sys; from pathlib import Path; from appliance.node import main; sys.exit(main(Path({str(guest)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.skipif(Path("/dev/sev-guest").exists(), reason="this machine is an SEV-SNP guest")
@pytest.mark.parametrize("role", ROLES)
def test_outside_its_machine_a_service_does_not_begin(tmp_path: Path, role: Role) -> None:
    port = free_port()
    status, said, errors = start(tmp_path, role, port)
    assert status == 1, (said, errors)
    assert "Traceback" not in errors
    assert [one["event"] for one in said] == ["refused"]  # not even `attesting`
    assert said[0]["reasons"]
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
