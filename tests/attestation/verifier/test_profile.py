"""Profiles: strict defaults, everything settable, nothing unknown, and the two worlds apart."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from attestation.endorsements.roots import AMD_ROOTS, RootPin
from attestation.errors import MalformedProfile
from attestation.evidence.report import Product
from attestation.verifier import BROKER, SHOW, Profile, load_profile, with_virtual_roots
from attestation.verifier.profile import SWITCHABLE, Checks
from attestation.verifier.profile_toml import profile_to_toml

VIRTUAL = RootPin(Product.MILAN, "ab" * 32, virtual=True)

ELABORATE = load_profile(
    f"""
name = "hospital"
required = ["measurement"]
[checks]
provisional-firmware = "warn"
[report]
versions = [5]
vmpls = [0, 1]
signing-keys = ["VLEK"]
products = ["Turin"]
[policy]
minimum-abi = "1.55"
smt = "clear"
[platform]
alias-check = "set"
[tcb.Turin]
reported = {{ fmc = 1, bootloader = 1, snp = 4 }}
committed-firmware = "1.55.61"
[mitigations]
launch = 0x8000000000000001
[chips]
allow = ["3b42092f69c656d3"]
deny = ["{"00" * 64}"]
[providers]
csp-ids = ['CN="quoted"\\slash']
[id-block]
id-keys = ["{"aa" * 48}"]
minimum-guest-svn = 0
[reference]
measurements = ["{"bb" * 48}"]
report-data = "{"cc" * 64}"
[revocation]
max-age-days = 7
"""
)


@pytest.mark.parametrize("profile", [SHOW, BROKER, ELABORATE, with_virtual_roots(BROKER, [VIRTUAL])])
def test_a_profile_survives_its_toml(profile: Profile) -> None:
    for comments in (True, False):
        assert load_profile(profile_to_toml(profile, comments=comments)) == profile


def test_the_printed_profile_has_every_setting_with_its_meaning() -> None:
    text = profile_to_toml(SHOW)
    document = tomllib.loads(text)
    assert set(document["checks"]) == set(SWITCHABLE)

    def settings_of(section: type[BaseModel]) -> set[str]:
        return {field.alias or name for name, field in section.model_fields.items()}

    for name, field in Profile.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel) and section is not Checks and name != "tcb":
            lines = [line for line in text.splitlines() if " = " in line and "  # " in line]
            for setting in settings_of(section):
                assert any(line.removeprefix("# ").startswith(f"{setting} = ") for line in lines), setting


def test_an_empty_document_is_the_strict_default() -> None:
    assert load_profile("") == SHOW == Profile()
    assert set(SHOW.severities.values()) == {"refuse"}
    assert SHOW.pins == AMD_ROOTS
    assert not SHOW.virtual


def test_a_brokers_profile_demands_every_judgement() -> None:
    assert set(BROKER.required) == {"measurement", "freshness", "init-data", "revocation"}
    assert BROKER.revocation.max_age_days > 0
    assert BROKER.report.signing_keys == ("VCEK",)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[policy]\ndebugg = 'any'", "policy.debugg"),
        ("[policy]\ndebug = true", "policy.debug"),
        ("unknown = 1", "unknown"),
        ("[checks]\nreport-signature = 'allow'", "report-signature"),
        ("[checks]\ntrusted-root = 'allow'", "trusted-root"),
        ("[checks]\nvmpl = 'ignore'", "checks.vmpl"),
        ("required = ['no-such-check']", "no-such-check"),
        ("roots = []", "without a root"),
        ("[report]\nversions = [6]", "2 to 5"),
        ("[report]\nversions = ['3']", "versions"),
        ("[tcb.Milan]\nreported = { fmc = 1 }", "only Turin"),
        ("[tcb.Milan]\nreported = { snp = 256 }", "snp"),
        ("[tcb.Rome]\n", "tcb.Rome"),
        ("[chips]\nallow = ['00']", "chips.allow"),
        ("[reference]\nmeasurements = ['AA']", "measurements"),
        ("[mitigations]\nlaunch = -1", "launch"),
        ("not toml", "no TOML"),
        ("[[roots]]\nproduct = 'Milan'\nspki-sha256 = 'zz'", "spki-sha256"),
        (
            "".join(
                f"[[roots]]\nproduct = '{product}'\nspki-sha256 = '{digest * 32}'\nvirtual = {virtual}\n"
                for product, digest, virtual in (("Milan", "ab", "true"), ("Genoa", "cd", "false"))
            ),
            "cannot be trusted together",
        ),
        (
            f"[[roots]]\nproduct = 'Milan'\nspki-sha256 = '{AMD_ROOTS[0].spki_sha256}'\nvirtual = true",
            "cannot be marked virtual",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, why: str) -> None:
    with pytest.raises(MalformedProfile, match=why):
        load_profile(text)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(MalformedProfile) as caught:
        load_profile("[policy]\nsmt = 1\ndebug = 2\n[platform]\necc = 3")
    assert all(name in caught.value.what for name in ("policy.smt", "policy.debug", "platform.ecc"))


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_profile_or_refused(text: str) -> None:
    try:
        load_profile(text)
    except MalformedProfile:
        return


def test_virtual_roots_replace_the_hardware_vendors() -> None:
    profile = with_virtual_roots(BROKER, [VIRTUAL])
    assert profile.virtual
    assert profile.pins == (VIRTUAL,)
    assert profile.required == BROKER.required


@pytest.mark.parametrize("pins", [[], [RootPin(Product.MILAN, "ab" * 32)]])
def test_only_virtual_roots_can_replace_them(pins: list[RootPin]) -> None:
    with pytest.raises(MalformedProfile):
        with_virtual_roots(BROKER, pins)
