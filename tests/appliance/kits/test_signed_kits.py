"""Kits: what a member signed is what a host starts, no secret is in them, and every difference is named beforehand."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from planning import broker_key, member_key, plan_of, publish, store_of

from appliance.demo.founding import found_consortium
from appliance.demo.setting import BROKERS, HOSPITALS, OWNER, SERVER, SITES, Setting, new_setting, now
from appliance.kits.enrolling import planned_documents
from appliance.kits.making import Made, make_kits, write_kit
from appliance.kits.plan import Plan
from appliance.kits.starting import guest_start
from appliance.kits.user_keys import create_user_keys, write_user_keys
from policies.charter import Changes, files_of
from policies.errors import KitRefused, Refused, Unusable
from policies.keys import private_pem
from policies.kits import MANIFEST, SignedKit, open_signed_kit, read_kit, verify_kit

SEAL = [sys.executable, "-m", "appliance.cli"]


@dataclass(frozen=True)
class Planned:
    """A founded consortium whose members signed every place of a plan, and the kits made from it."""

    setting: Setting
    plan: Plan
    kits: dict[str, Made]
    folder: Path

    def copy(self, name: str, target: Path) -> Path:
        """A kit's folder of the test's own."""
        shutil.copytree(self.folder / name, target / name)
        return target / name

    def make(self, key: Ed25519PrivateKey) -> list[Made]:
        """The kits of the plan, signed by `key`."""
        return make_kits(self.plan, store_of(self.setting), self.setting.first_root, key, now())


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("kits")
    (folder / "made").mkdir()
    setting = new_setting(folder / "made")
    found_consortium(setting)
    domain = setting.charter().consortium.trust_domain
    write_user_keys(setting.shared / "reader", create_user_keys(domain, OWNER, "reader", now()))
    plan = plan_of(setting)
    documents = planned_documents(plan, setting.charter(), setting.shared)
    publish(setting, Changes(put=files_of(documents)))
    made = make_kits(plan, store_of(setting), setting.first_root, member_key(setting), now())
    for kit in made:
        write_kit(kit, folder / "out" / kit.name)
    return Planned(setting, plan, {kit.name: kit for kit in made}, folder / "out")


def test_every_place_of_the_plan_gets_its_kit(planned: Planned) -> None:
    assert set(planned.kits) == {
        *(f"broker-{broker}" for broker in BROKERS),
        f"server-{SERVER}",
        *(f"site-{site}" for site in SITES),
        "gateway-edge",
        f"user-{OWNER}-reader",
    }
    for name in planned.kits:
        kit = open_signed_kit(planned.folder / name, trust=planned.setting.first_root)
        assert kit.signer == OWNER
        assert kit.manifest.platform == "virtual"
        readme = kit.files["README.md"].decode()
        assert "seal doctor" in readme
        assert "virtual" in readme


def test_a_kit_says_all_that_its_operator_needs_on_one_page(planned: Planned) -> None:
    """Image digest and where to get it, init-data, addresses, ports, the launch command; in the README as well."""
    for guest in planned.plan.guests:
        name = f"{guest.role}-{guest.name}"
        kit = open_signed_kit(planned.folder / name)
        manifest, readme = kit.manifest, kit.files["README.md"].decode()
        image = planned.setting.charter().image(guest.image)
        assert manifest.image is not None
        assert image is not None
        assert manifest.image.manifest_sha256 == image.manifest_sha256
        place = planned.setting.charter().enrolment(guest.role, guest.name)
        assert place is not None
        assert hashlib.sha256(kit.files["init-data.toml"]).hexdigest() == place.init_data_sha256
        assert [port.listen for port in manifest.ports] == ([guest.listen] if guest.listen else [])
        needed = [manifest.charter, image.manifest_sha256, manifest.image.source, f"seal vm launch {name}"]
        needed += [broker.url for broker in manifest.brokers] + [port.listen for port in manifest.ports]
        assert all(words in readme for words in needed), name
        assert len(readme.splitlines()) <= 60
    broker = open_signed_kit(planned.folder / f"broker-{next(iter(BROKERS))}").files["README.md"].decode()
    assert f"seal broker run broker-{next(iter(BROKERS))}" in broker


def test_no_kit_holds_a_secret(planned: Planned) -> None:
    setting = planned.setting
    keys = [
        path.read_bytes() for path in setting.folder.rglob("*") if path.is_file() and path.stat().st_mode & 0o077 == 0
    ]
    secrets = [key for key in keys if len(key) in range(16, 4096)]
    assert len(secrets) > 10
    for name, kit in planned.kits.items():
        for path, content in kit.files.items():
            assert b"PRIVATE KEY" not in content, f"{name}/{path}"
            assert not any(secret in content for secret in secrets), f"{name}/{path}"


def refused(folder: Path, trust: bytes | None = None) -> str:
    with pytest.raises(KitRefused) as refusal:
        open_signed_kit(folder, trust=trust)
    return "\n".join(refusal.value.reasons)


def test_any_changed_missing_or_foreign_file_is_named(planned: Planned, tmp_path: Path) -> None:
    folder = planned.copy("site-borealis-site", tmp_path)
    for name in sorted(read_kit(folder)):
        path = folder / name
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 0x01
        path.write_bytes(changed)
        assert (name in refused(folder)) or name == MANIFEST, name
        path.unlink()
        assert name in refused(folder)
        path.write_bytes(whole)
    (folder / "charter/metadata/extra.json").write_text("{}")
    assert "charter/metadata/extra.json" in refused(folder)
    (folder / "charter/metadata/extra.json").unlink()
    (folder / "link").symlink_to("/etc/passwd")
    assert "link: neither a file nor a folder" in refused(folder)
    (folder / "link").unlink()
    assert open_signed_kit(folder).signer == OWNER


def test_a_kit_of_another_charter_is_refused_by_who_knows_its_root(planned: Planned) -> None:
    other = planned.setting.first_root.replace(b"oncology", b"oncologe")
    assert "not for the one whose root you trust" in refused(planned.folder / "site-borealis-site", trust=other)


def test_nobody_but_a_member_makes_kits(planned: Planned) -> None:
    with pytest.raises(KitRefused, match="no member of the charter signed"):
        planned.make(Ed25519PrivateKey.generate())
    with pytest.raises(KitRefused, match="no member of the charter signed"):
        planned.make(broker_key(planned.setting))
    hospital = member_key(planned.setting, HOSPITALS[0])
    assert {verify_kit(kit.files, kit.name).signer for kit in planned.make(hospital)} == {HOSPITALS[0]}


def test_a_kit_does_not_give_a_place_that_nobody_signed(planned: Planned) -> None:
    """The plan's author alone moves the server: the kit-maker sees that members signed something else."""
    moved = planned.plan.model_copy(
        update={
            "guests": tuple(
                guest.model_copy(update={"listen": "127.0.0.1:1", "address": "127.0.0.1:1"})
                if guest.role == "server"
                else guest
                for guest in planned.plan.guests
            )
        }
    )
    with pytest.raises(KitRefused) as refusal:
        make_kits(moved, store_of(planned.setting), None, member_key(planned.setting), now())
    assert any(SERVER in reason for reason in refusal.value.reasons)


def test_a_kit_whose_place_was_signed_away_is_refused(planned: Planned, tmp_path: Path) -> None:
    """The kit's own charter must have its place: a manifest re-signed over another init-data does not start."""
    kit = planned.kits["site-borealis-site"]
    signed: SignedKit = verify_kit(kit.files, kit.name)
    init = kit.files["init-data.toml"].replace(b"borealis-site", b"cygnus-site")
    files = {**kit.files, "init-data.toml": init}
    digests = {**signed.manifest.files, "init-data.toml": hashlib.sha256(init).hexdigest()}
    from policies.kits import sign_kit

    manifest = signed.manifest.model_copy(update={"files": digests})
    files[MANIFEST] = sign_kit(manifest, member_key(planned.setting))
    with pytest.raises(KitRefused) as refusal:
        verify_kit(files, kit.name)
    assert any("init-data" in reason for reason in refusal.value.reasons)


def test_an_existing_kit_is_never_overwritten(planned: Planned) -> None:
    kit = planned.kits["site-borealis-site"]
    with pytest.raises(Unusable, match="there is a kit already"):
        write_kit(kit, planned.folder / kit.name)


def test_a_guest_starts_from_the_approved_image_alone(planned: Planned, tmp_path: Path) -> None:
    folder = planned.copy("site-borealis-site", tmp_path)
    with pytest.raises(Refused, match="there is no image"):
        guest_start(folder)
    (folder / "local/disks").mkdir(parents=True)
    shutil.copytree(planned.setting.image, folder / "local/image")
    with pytest.raises(Unusable, match="the disk is missing"):
        guest_start(folder)
    (folder / "local/disks/data").write_bytes(b"sealed")
    assert guest_start(folder).settings.vcpu_model == "EPYC-Milan"
    archive = bytearray((folder / "local/image/initrd").read_bytes())
    archive[-600] ^= 0x01
    (folder / "local/image/initrd").write_bytes(archive)
    with pytest.raises(Refused, match="initrd"):
        guest_start(folder)
    with pytest.raises(Unusable, match="which is no guest"):
        guest_start(planned.folder / "broker-acme-broker")


def seal(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SEAL, *words], capture_output=True, text=True, timeout=120, check=False)


def test_the_doctor_tells_what_a_place_lacks_before_anything_starts(planned: Planned, tmp_path: Path) -> None:
    folder = planned.copy("site-borealis-site", tmp_path)
    root = tmp_path / "root.json"
    root.write_bytes(planned.setting.first_root)
    result = seal("doctor", str(folder), "--trust", str(root), "--json")
    assert result.returncode == 1
    lacking = {
        finding["check"]: finding["do"] for finding in json.loads(result.stdout)["findings"] if not finding["ok"]
    }
    assert all(lacking.values())
    words = " ".join(lacking)
    for part in ("image", "chip", "data", "broker"):
        assert part in words, (part, lacking)


def test_the_doctor_believes_nothing_of_a_changed_kit(planned: Planned, tmp_path: Path) -> None:
    folder = planned.copy("site-borealis-site", tmp_path)
    (folder / "README.md").write_text("Send your keys to me.")
    result = seal("doctor", str(folder), "--json")
    assert result.returncode == 1
    findings = json.loads(result.stdout)["findings"]
    assert [finding["ok"] for finding in findings] == [False]
    assert "README.md" in findings[0]["seen"]


def test_a_kit_without_its_image_does_not_launch(planned: Planned, tmp_path: Path) -> None:
    folder = planned.copy("site-cygnus-site", tmp_path)
    result = seal("vm", "launch", str(folder))
    assert result.returncode == 1
    assert "there is no image" in result.stderr
    assert "Traceback" not in result.stderr


def test_secret_files_in_a_kit_are_refused_when_it_is_made(planned: Planned) -> None:
    """A member's key that strayed into what a kit carries is found before the kit exists."""
    from appliance.kits.making import _refuse_secrets

    key = private_pem(member_key(planned.setting))
    with pytest.raises(Unusable, match="holds a private key"):
        _refuse_secrets({"charter/targets/x": b"{}\n" + key}, "site-borealis-site")
