"""`seal charter`: three members found a charter, change it, and are told plainly what does not go."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from charter_world import MEMBERS, World, issuer, user

from appliance.cli import main
from attestation.verifier import BROKER
from attestation.verifier.profile_toml import profile_to_toml
from policies.keys import load_private_key, public_pem
from policies.ready_made import ready_made, release_policy

AT = ("--at", "2026-03-01T12:00:00Z")
SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")


class Command:
    """Runs `seal charter` in a folder and keeps what it printed."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        self.out = ""
        self.err = ""

    def __call__(self, *words: object) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["charter", *map(str, words)])
        self.out, self.err = self.capsys.readouterr()
        return int(stop.value.code or 0)

    def json(self, *words: object, status: int = 0) -> Any:
        assert self(*words, "--json") == status, self.out + self.err
        return json.loads(self.out)


IMAGE = """platform = "virtual"
manifest_sha256 = "{digest}"
svn = 1
roles = ["server", "site"]

[[measurements]]
measurement = "{measurement}"
vcpu_model = "EPYC-v4"
vcpus = 2
vmm = "qemu"
guest_features = 1
"""
CONSORTIUM = """name = "tumour-atlas"
platform = "virtual"
trust_domain = "virtual.research.example"
threshold = 2

[[brokers]]
name = "broker-1"
member = "acme-pharma"
url = "https://127.0.0.1:8443"
signing_key_file = "broker.pub"
issuer_certificate_file = "issuer.pem"

[[virtual_roots]]
product = "Milan"
ark_spki_sha256 = "{root}"
"""


@pytest.fixture
def seal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["seal", "charter"])
    command = Command(tmp_path, capsys)
    for name in (*MEMBERS, "broker"):
        assert command("key", f"{name}.key", "--public", f"{name}.pub") == 0
    Path("issuer.pem").write_text(issuer("broker-1"))
    members = "".join(f'\n[[members]]\nname = "{name}"\npublic_key_file = "{name}.pub"\n' for name in MEMBERS)
    Path("consortium.toml").write_text(CONSORTIUM.format(root="aa" * 32) + members)
    Path("demo.toml").write_text(IMAGE.format(digest="cd" * 32, measurement="ab" * 48))
    Path("borealis.toml").write_text(
        f'member = "borealis-hospital"\nimage = "demo"\ninit_data_sha256 = "{"ef" * 32}"\n'
    )
    Path("key.data.rego").write_bytes(release_policy(roles=["site"], names=["borealis"]))
    return command


PUT = (
    "--put", "images/demo.json=demo.toml",
    "--put", "enrolments/site/borealis.json=borealis.toml",
    "--put", "members/borealis-hospital/release/key.data.rego=key.data.rego",
)  # fmt: skip


def founded(seal: Command) -> None:
    assert seal("init", "consortium.toml", *PUT, "--out", "founding.json", *AT) == 0
    for name in MEMBERS[:2]:
        assert seal("sign", "founding.json", "--key", f"{name}.key", "--yes", *AT) == 0
    assert seal("publish", "founding.json", "--to", "charter", "--broker-key", "broker.key", *AT) == 0
    shutil.copy("charter/metadata/1.root.json", "root.json")


def changed(seal: Command, *words: object, by: tuple[str, ...] = MEMBERS[:2], broker: str = "broker.key") -> None:
    assert seal(*words, "--out", "change.json", *AT) == 0, seal.err
    for name in by:
        assert seal("sign", "change.json", "--key", f"{name}.key", "--trust", "root.json", "--yes", *AT) == 0, seal.err
    assert seal("publish", "change.json", "--to", "charter", "--broker-key", broker, *AT) == 0, seal.err


def test_three_members_found_a_charter(seal: Command) -> None:
    told = seal.json("init", "consortium.toml", *PUT, "--out", "founding.json", *AT)
    assert told["version"] == 1
    assert told["changes"][0]["sentence"].startswith("Found the virtual charter tumour-atlas")
    assert seal("sign", "founding.json", "--key", "cygnus-bio.key", "--yes", *AT) == 0
    assert "Others must sign as well" in seal.err
    assert seal("publish", "founding.json", "--to", "charter", *AT) == 1
    assert "role root needs 2 signatures, has 1 (by cygnus-bio)" in seal.err
    assert "role member-borealis-hospital needs 1 signatures, has 0 (by nobody)" in seal.err
    assert not Path("charter").exists()
    assert seal("sign", "founding.json", "--key", "borealis-hospital.key", "--yes", *AT) == 0
    assert "It can be published" in seal.err
    assert seal("publish", "founding.json", "--to", "charter", *AT) == 0
    shutil.copy("charter/metadata/1.root.json", "root.json")
    assert seal("verify", "charter", "--trust", "root.json", *AT) == 1
    assert "metadata/timestamp.json: missing" in seal.err
    assert seal("timestamp", "charter", "--broker-key", "broker.key", *AT) == 0
    body = seal.json("verify", "charter", "--trust", "root.json", *AT)
    assert body["version"] == 1
    assert body["platform"] == "virtual"
    assert body["expires"] == "2026-03-02T12:00:00Z"


def test_show_says_it_in_words_and_in_json(seal: Command) -> None:
    founded(seal)
    assert seal("show", "charter") == 0
    assert "any 2 of 3 members decide together" in seal.out
    assert "place of site borealis for borealis-hospital" in seal.out
    body = seal.json("show", "charter", "--trust", "root.json")
    assert set(body["policies"]) == {
        "members/borealis-hospital/release/key.data.rego",
        "policies/admission.rego",
        "policies/appraisal.rego",
        "policies/export.rego",
        "policies/floor.rego",
        "policies/peers.rego",
    }
    assert body["documents"]["images/demo.json"]["svn"] == 1


def test_a_signer_reads_before_signing(seal: Command) -> None:
    founded(seal)
    Path("two.toml").write_text(IMAGE.format(digest="00" * 32, measurement="00" * 48))
    put = ("--put", "images/two.json=two.toml", "--remove", "images/demo.json")
    assert seal("propose", "charter", *put, "--note", "as agreed", "--out", "change.json", *AT) == 0
    assert "Add image two (virtual, security version 1)" in seal.out
    assert "Withdraw image demo" in seal.out
    assert "its image demo is not approved" in seal.out
    assert "Its author says: as agreed" in seal.out
    assert seal("sign", "change.json", "--key", "acme-pharma.key", *AT) == 2
    assert "nobody is there to ask" in seal.err
    assert seal("read", "change.json", "--trust", "root.json", *AT) == 0
    assert "0 of 2 signatures" in seal.out
    assert seal("sign", "change.json", "--key", "acme-pharma.key", "--charter", "charter", "--yes", *AT) == 0
    assert seal("read", "change.json", *AT) == 0
    assert "acme-pharma signed" in seal.out


def test_a_signer_with_another_charter_is_warned(seal: Command, tmp_path: Path) -> None:
    founded(seal)
    shutil.copytree("charter", "old")
    changed(seal, "propose", "charter", "--remove", "images/demo.json")
    assert seal("propose", "old", "--renew", "images", "--out", "late.json", *AT) == 0
    sign = ("sign", "late.json", "--key", "acme-pharma.key", "--yes", *AT)
    assert seal(*sign, "--charter", "charter") == 1
    assert "builds on another charter than yours" in seal.err
    World().found()
    Path("other.json").write_bytes(World().found().root)
    assert seal(*sign, "--trust", "other.json") == 1


def test_diff_and_known(seal: Command) -> None:
    founded(seal)
    shutil.copytree("charter", "old")
    changed(seal, "withdraw", "charter", "demo")
    assert seal("diff", "old", "old") == 0
    assert seal("diff", "old", "charter") == 1
    assert "Withdraw image demo" in seal.out
    assert "Withdraw the place of site borealis" in seal.out
    assert seal("verify", "charter", "--trust", "root.json", "--known", "old", *AT) == 0
    assert seal("verify", "old", "--trust", "root.json", "--known", "charter", *AT) == 1
    assert "snapshot: version 1 is offered, version 2 is known" in seal.err
    assert seal.json("diff", "old", "charter", status=1)["same"] is False


def test_the_prompt_is_answered(seal: Command) -> None:
    founded(seal)
    assert seal("propose", "charter", "--renew", "images", "--out", "change.json", *AT) == 0
    before = Path("change.json").read_bytes()
    script = (
        "import pty, os, sys\n"
        "pid, fd = pty.fork()\n"
        "if pid == 0:\n"
        "    command = [sys.executable, '-c', 'from appliance.cli import main; main()', *sys.argv[2:]]\n"
        "    os.execv(sys.executable, command)\n"
        "os.write(fd, sys.argv[1].encode())\n"
        "try:\n"
        "    while os.read(fd, 4096):\n"
        "        pass\n"
        "except OSError:\n"
        "    pass\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    words = ["charter", "sign", "change.json", "--key", "acme-pharma.key", *AT]
    for answer, status in (("n\n", 1), ("y\n", 0)):
        done = subprocess.run([sys.executable, "-c", script, answer, *words], timeout=60, check=False)
        assert done.returncode == status
        assert (Path("change.json").read_bytes() == before) == (status == 1)


# --- runbooks ---------------------------------------------------------------------------------------------------------


def test_a_key_is_lost(seal: Command) -> None:
    founded(seal)
    assert seal("key", "new.key", "--public", "new.pub") == 0
    rotate = ("rotate", "charter", "--member", "borealis-hospital", "--new-key", "new.pub", "--out", "change.json", *AT)
    assert seal(*rotate) == 0
    assert "Member borealis-hospital gets another key" in seal.out
    for name in ("acme-pharma.key", "cygnus-bio.key"):
        assert seal("sign", "change.json", "--key", name, "--trust", "root.json", "--yes", *AT) == 0
    assert seal("publish", "change.json", "--to", "charter", *AT) == 1
    assert "role member-borealis-hospital needs 1 signatures, has 0" in seal.err
    assert seal("sign", "change.json", "--key", "new.key", "--trust", "root.json", "--yes", *AT) == 0
    assert seal("publish", "change.json", "--to", "charter", "--broker-key", "broker.key", *AT) == 0
    assert seal("verify", "charter", "--trust", "root.json", *AT) == 0
    assert seal("propose", "charter", "--renew", "images", "--out", "next.json", *AT) == 0
    assert seal("sign", "next.json", "--key", "borealis-hospital.key", "--yes", *AT) == 1
    assert "belongs to no member" in seal.err
    assert seal("sign", "next.json", "--key", "new.key", "--yes", *AT) == 0


def test_a_member_leaves(seal: Command) -> None:
    founded(seal)
    changed(seal, "leave", "charter", "borealis-hospital", by=("acme-pharma", "cygnus-bio"))
    body = seal.json("show", "charter")
    assert [member["name"] for member in body["consortium"]["members"]] == ["acme-pharma", "cygnus-bio"]
    assert not [path for path in (*body["documents"], *body["policies"]) if "borealis" in path]
    assert seal("verify", "charter", "--trust", "root.json", *AT) == 0
    assert seal("leave", "charter", "cygnus-bio", "--out", "x.json", *AT) == 1
    assert "2 of 1 members can never sign" in seal.err
    assert seal("leave", "charter", "acme-pharma", "--out", "x.json", *AT) == 1
    assert "brokers: " in seal.err
    assert seal("leave", "charter", "delta-bank", "--out", "x.json", *AT) == 1
    assert "is not a member" in seal.err


def test_a_broker_is_replaced(seal: Command) -> None:
    founded(seal)
    assert seal("key", "broker-2.key", "--public", "broker-2.pub") == 0
    Path("issuer-2.pem").write_text(issuer("broker-1"))
    changed(
        seal, "rotate", "charter", "--broker", "broker-1", "--new-key", "broker-2.pub", "--issuer", "issuer-2.pem",
        "--url", "https://broker.acme-pharma.example:8443", broker="broker-2.key",
    )  # fmt: skip
    assert seal("verify", "charter", "--trust", "root.json", *AT) == 0
    assert seal("timestamp", "charter", "--broker-key", "broker.key", *AT) == 1
    assert "no broker's" in seal.err


def test_a_firmware_version_is_refused_from_now_on(seal: Command) -> None:
    founded(seal)
    assert seal("propose", "charter", "--put", "policies/appraisal.toml=demo.toml", "--out", "p.json", *AT) == 2
    Path("appraisal.toml").write_text(
        profile_to_toml(BROKER).replace("[tcb.Milan]\n", "[tcb.Milan]\nreported = { snp = 27, microcode = 219 }\n")
    )
    changed(seal, "propose", "charter", "--put", "policies/appraisal.toml=appraisal.toml", "--note", "TCB recovery")
    assert "snp = 27" in seal.json("show", "charter")["policies"]["policies/appraisal.toml"]


# --- policies ---------------------------------------------------------------------------------------------------------


REQUEST = {
    "counters": {"releases": 0},
    "ear": {
        "subject": {"role": "site", "name": "borealis", "member": "borealis-hospital", "image": "demo"},
        "submods": {
            "cpu0": {
                "ear.status": "affirming",
                "ear.trustworthiness-vector": {
                    "configuration": 2,
                    "executables": 2,
                    "hardware": 2,
                    "instance-identity": 2,
                },
                "ear.veraison.annotated-evidence": {"policy": {"debug": False}},
            }
        },
    },
    "enrolment": {"role": "site", "name": "borealis", "member": "borealis-hospital", "image": "demo"},
    "session": {"age_seconds": 3},
}


def test_policies_are_asked_now_and_after_a_proposal(seal: Command) -> None:
    founded(seal)
    Path("request.json").write_text(json.dumps(REQUEST))
    ask = ("test-policy", "charter", "--resource", "borealis-hospital/key/data", "--input", "request.json")
    body = seal.json(*ask)
    assert body["now"]["allowed"] is True
    Path("strict.rego").write_bytes(release_policy(roles=["server"]))
    put = ("--put", "members/borealis-hospital/release/key.data.rego=strict.rego")
    assert seal("propose", "charter", *put, "--out", "change.json", *AT) == 0
    assert seal(*ask, "--proposal", "change.json", *AT) == 1
    assert "now: allowed" in seal.out
    assert "after the proposal: denied" in seal.out
    assert "the guest does not have the role that may have it" in seal.out
    assert seal.json(
        "test-policy", "charter", "--resource", "acme-pharma/key/model", "--input", "request.json", status=1
    )
    assert seal("test-policy", "charter", "--about", "gossip", "--input", "request.json") == 2
    assert seal("test-policy", "charter", "--input", "request.json") == 2
    assert seal("test-policy", "charter", "--about", "admission", "--input", "request.json") == 1


def test_peers_exports_and_rights_are_asked_now_and_after_a_proposal(seal: Command) -> None:
    """The charter itself fills in where the named places stand, before and after the change."""
    founded(seal)
    peer = {"role": "server", "name": "server", "age_seconds": 3, "submods": {"cpu0": {"ear.status": "affirming"}}}
    job = {"server": "server", "roster": ["borealis"], "recipients": []}
    update = {"kind": "update", "size": 100, "to": {"role": "server", "name": "server"}, "job": job}
    Path("peer.json").write_text(json.dumps({"peer": peer}))
    Path("update.json").write_text(json.dumps(update))
    for name in ("peers", "export"):
        rules = ready_made(name).replace("jurisdictions := set()", 'jurisdictions := {"DE"}')
        Path(f"{name}.rego").write_text(rules)
        put = ("--put", f"policies/{name}.rego={name}.rego")
        assert seal("propose", "charter", *put, "--out", f"{name}.json", *AT) == 0
    here = ("--here", "site/borealis")
    for about, file in (("peers", "peer.json"), ("export", "update.json")):
        ask = ("test-policy", "charter", "--about", about, *here, "--input", file)
        assert seal(*ask) == 0
        assert seal(*ask, "--proposal", f"{about}.json", *AT) == 1
        assert "now: allowed" in seal.out
        assert "after the proposal: denied" in seal.out
        assert "jurisdictions" in seal.out
    Path("command.json").write_text(json.dumps({"user": "acme-pharma/ada", "command": "approve"}))
    assert seal("test-policy", "charter", "--about", "command", "--input", "command.json") == 1
    assert "the rights of acme-pharma/ada: denies" in seal.out
    assert seal("test-policy", "charter", "--about", "peers", *here, "--input", "command.json") == 2
    assert seal("test-policy", "charter", "--about", "peers", "--here", "moon", "--input", "peer.json") == 2


def test_rules_that_decide_nothing_are_refused_before_anybody_signs(seal: Command) -> None:
    founded(seal)
    put = "members/borealis-hospital/release/key.data.rego=bad.rego"
    for text, word in (
        ("package sealwright.release\nallow if {", "fail"),
        ("package sealwright.release\nallow := true\n", "do not define both"),
        ("package sealwright.floor\nallow := true\n", "must be of sealwright.release"),
        ("allow := true\n", "does not begin with its `package`"),
    ):
        Path("bad.rego").write_text(text)
        assert seal("propose", "charter", "--put", put, "--out", "p.json", *AT) == 2
        assert word in seal.err


def test_release_policies_are_written(seal: Command) -> None:
    assert (
        seal("release-policy", "--role", "site", "--name", "borealis", "--approve", f"site/borealis={'ef' * 32}") == 0
    )
    assert 'names := {"borealis"}' in seal.out
    assert seal("release-policy", "--role", "king") == 2


# --- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("verify", "nowhere", "--trust", "root.json"), 2, "there is no charter here"),
        (("verify", "charter", "--trust", "nowhere"), 2, "cannot be read"),
        (("verify", "charter", "--trust", "acme-pharma.pub", *AT), 1, "not readable as TUF metadata"),
        (("verify", "charter", "--trust", "root.json", "--at", "yesterday"), 2, "is no time"),
        (("verify", "charter", "--trust", "root.json", "--at", "2026-13-01T12:00:00Z"), 2, "is no time"),
        (("verify", "charter", "--trust", "root.json", "--at", "2027-03-01T12:00:00Z"), 1, "expired on"),
        (("sign", "consortium.toml", "--key", "acme-pharma.key", "--yes"), 2, "not a proposal"),
        (("sign", "founding.json", "--key", "acme-pharma.pub", "--yes", *AT), 2, "others may read this key"),
        (("sign", "founding.json", "--key", "nowhere", "--yes", *AT), 2, "cannot be opened"),
        (("sign", "founding.json", "--key", "broker.key", "--yes", *AT), 1, "has no say in this proposal"),
        (("propose", "charter", "--put", "x", "--out", "p.json", *AT), 2, "is not PATH=FILE"),
        (("propose", "charter", "--put", "evil/x=demo.toml", "--out", "p.json", *AT), 2, "no file of a charter"),
        (("propose", "charter", "--put", "images/x.json=root.json", "--out", "p.json", *AT), 2, "not a valid Image"),
        (("propose", "charter", "--put", "images/x.json=acme-pharma.pub", "--out", "p.json"), 2, "not valid JSON"),
        (("propose", "charter", "--put", "images/x.json=demo.toml", "--out", "p.json", *AT), 1, "same measurement"),
        (("propose", "charter", "--remove", "images/x.json", "--out", "p.json", *AT), 1, "is not in the charter"),
        (("propose", "charter", "--out", "p.json", *AT), 1, "changes nothing"),
        (("propose", "charter", "--renew", "images", "--out", "no/p.json", *AT), 2, "cannot be written"),
        (("withdraw", "charter", "two", "--out", "p.json", *AT), 1, "there is no image two"),
        (("rotate", "charter", "--out", "p.json", *AT), 2, "either a member or a broker"),
        (("rotate", "charter", "--member", "acme-pharma", "--out", "p.json", *AT), 2, "the new key is missing"),
        (("rotate", "charter", "--broker", "b", "--url", "https://b:1", "--out", "p", *AT), 1, "there is no broker b"),
        (("init", "demo.toml", "--out", "p.json", *AT), 2, "not a valid Consortium"),
        (("init", "root.json", "--out", "p.json", *AT), 2, "not valid TOML"),
        (("key", "acme-pharma.key"), 2, "there is a file already"),
        (("publish", "founding.json", "--to", "charter", *AT), 1, "moved on"),
    ],
)
def test_what_does_not_go_is_said_in_one_sentence(
    seal: Command, words: tuple[str, ...], status: int, sentence: str
) -> None:
    founded(seal)
    assert seal(*words) == status, seal.err
    assert sentence in seal.err
    assert "Traceback" not in seal.err


def test_a_consortium_file_says_what_is_wrong(seal: Command) -> None:
    text = Path("consortium.toml").read_text()
    for old, new, sentence in (
        ("threshold = 2", "threshold = 4", "4 of 3 members can never sign"),
        ("threshold = 2", "threshold = 0", "threshold"),
        ("threshold = 2", "treshold = 2", "treshold"),
        ("virtual.research", "research", "trust_domain begins with"),
        ('"broker.pub"', '"acme-pharma.pub"', "one key is given to two parties"),
        ('"broker.pub"', '"broker.key"', "signing_key"),
        ('"broker.pub"', '"nowhere.pub"', "cannot be read"),
        ('member = "acme-pharma"', 'member = "delta-bank"', "not a member"),
        ("https://127.0.0.1:8443", "http://127.0.0.1:8443", "https URL"),
        ("signing_key_file", 'signing_key = "x"\nsigning_key_file', "both signing_key and signing_key_file"),
        ('"issuer.pem"', '"acme-pharma.pub"', "issuer_certificate"),
    ):
        assert old in text
        Path("consortium.toml").write_text(text.replace(old, new, 1))
        assert seal("init", "consortium.toml", "--out", "p.json", *AT) == 2
        assert sentence in seal.err


def test_key_files_of_loose_modes_are_refused(seal: Command) -> None:
    Path("acme-pharma.key").chmod(0o640)
    assert seal("init", "consortium.toml", "--out", "founding.json", *AT) == 0
    assert seal("sign", "founding.json", "--key", "acme-pharma.key", "--yes", *AT) == 2
    assert "chmod 600" in seal.err
    Path("acme-pharma.key").chmod(0o600)
    assert load_private_key(Path("acme-pharma.key"))
    ada = user("acme-pharma", "ada")
    Path("ada.json").write_text(ada.model_dump_json(indent=2))
    put = ("--put", "members/acme-pharma/users/ada.json=ada.json")
    assert seal("init", "consortium.toml", *put, "--out", "founding.json", *AT) == 0
    assert "user ada of acme-pharma, who may download and submit" in seal.out


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SOFTHSM.exists(), reason="SoftHSM is not installed (apt install softhsm2)")
def test_a_member_signs_with_a_token(seal: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pkcs11")
    Path("tokens").mkdir()
    Path("softhsm.conf").write_text(f"directories.tokendir = {Path('tokens').resolve()}\nlog.level = ERROR\n")
    Path("pin").touch(0o600)
    Path("pin").write_text("1234\n")
    # the library reads its configuration once, so the token lives in a process of its own
    monkeypatch.setenv("SOFTHSM2_CONF", str(Path("softhsm.conf").resolve()))
    init = ["softhsm2-util", "--init-token", "--free", "--label", "acme", "--pin", "1234", "--so-pin", "5678"]
    subprocess.run(init, check=True, capture_output=True, timeout=30)
    uri = f"pkcs11:token=acme;object=member?module-path={SOFTHSM}"

    def apart(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", "from appliance.cli import main; main()", "charter", *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)

    made = apart("key", uri, "--pin-file", "pin", "--public", "acme-pharma.pub")
    assert made.returncode == 0, made.stderr
    assert apart("key", uri, "--pin-file", "pin").returncode == 2
    assert seal("init", "consortium.toml", "--out", "founding.json", *AT) == 0
    signed = apart("sign", "founding.json", "--key", uri, "--pin-file", "pin", "--yes", *AT)
    assert signed.returncode == 0, signed.stderr
    assert seal("sign", "founding.json", "--key", "cygnus-bio.key", "--yes", *AT) == 0
    assert seal("publish", "founding.json", "--to", "charter", "--broker-key", "broker.key", *AT) == 0
    shutil.copy("charter/metadata/1.root.json", "root.json")
    assert seal("verify", "charter", "--trust", "root.json", *AT) == 0
    Path("pin").write_text("0000\n")
    wrong = apart("sign", "founding.json", "--key", uri, "--pin-file", "pin", "--yes", *AT)
    assert wrong.returncode == 2
    assert "cannot be used" in wrong.stderr
    for bad in ("pkcs11:token=acme", "pkcs11:token=a;token=b;object=c?module-path=/x", uri.replace("member", "other")):
        assert apart("sign", "founding.json", "--key", bad, "--pin-file", "pin", "--yes", *AT).returncode == 2


def test_public_halves_match(seal: Command) -> None:
    assert Path("acme-pharma.pub").read_text() == public_pem(load_private_key(Path("acme-pharma.key")))
