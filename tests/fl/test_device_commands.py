"""`seal site group-key` and `seal site device-token`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from edge_world import EdgeWorld, found_edge
from federation_world import now
from typer.testing import CliRunner

from appliance.commands.site import app
from fl.edge.credentials import read_credential
from fl.edge.sealing import GroupKeys
from fl.edge.tokens import read_token
from policies.charter import write_store
from policies.errors import Refused, SealwrightError, Unusable
from policies.keys import private_pem, write_secret


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EdgeWorld:
    return found_edge(tmp_path_factory.mktemp("commands"))


def asked(*words: str) -> str:
    """What the command prints. Raises what it refuses with."""
    result = CliRunner().invoke(app, list(words))
    if isinstance(result.exception, SealwrightError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_group_key_is_made_and_rotated(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    asked("group-key", str(first))
    assert json.loads(asked("group-key", str(second), "--after", str(first), "--json"))["keys"] == 2
    assert second.read_bytes()[96:] == first.read_bytes()
    assert GroupKeys.parse(second.read_bytes(), "0" * 64).id != GroupKeys.parse(first.read_bytes(), "0" * 64).id
    assert second.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Unusable, match="there is a file already"):
        asked("group-key", str(second))
    write_secret(tmp_path / "wrong", b"no key")
    with pytest.raises(Unusable, match="not 6 bytes"):
        asked("group-key", str(tmp_path / "third"), "--after", str(tmp_path / "wrong"))


def test_a_token_is_issued_as_its_issuer_may(world: EdgeWorld, tmp_path: Path) -> None:
    charter, key, public = tmp_path / "charter", tmp_path / "phones.pem", tmp_path / "device.pub"
    write_store(charter, world.federation.store)
    write_secret(key, private_pem(world.issuer_key))
    own = ec.generate_private_key(ec.SECP256R1())
    public.write_bytes(own.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    common = ("device-token", str(charter), str(public), "--issuer", "phones", "--key", str(key))
    said = json.loads(asked(*common, "--job", "heart-*", "--json"))
    device = read_token(said["token"], world.federation.charter(), now())
    assert (device.name, device.may("heart-rate"), device.may("sleep")) == (said["device"], True, False)
    assert device.key == own.public_key()
    assert asked(*common, "--device", "0" * 32).count(".") == 2
    with pytest.raises(Refused, match="longer than its issuer may"):
        asked(*common, "--days", "1000")
    with pytest.raises(Unusable, match="its id or a job's name is none"):
        asked(*common, "--device", "short")
    with pytest.raises(Unusable, match="issues no tokens"):
        asked(*common[:4], "others", *common[5:])
    said = json.loads(asked("device-certificate", *common[1:], "--job", "heart-*", "--device", "1" * 32, "--json"))
    device = read_credential(said["certificate"], world.federation.charter(), now())
    assert (device.name, device.key, device.jobs) == (f"phones/{'1' * 32}", own.public_key(), ("heart-*",))
    with pytest.raises(Refused, match="longer than its issuer may"):
        asked("device-certificate", *common[1:], "--days", "1000")
    other = tmp_path / "other.pem"
    write_secret(other, private_pem(world.federation.member_keys["acme-pharma"]))
    with pytest.raises(Refused, match="signature"):
        asked(*common[:6], str(other))
