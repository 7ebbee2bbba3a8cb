"""Canonical JSON, signed JSON and REPORT_DATA: one byte form, one purpose, nothing to swap."""

from __future__ import annotations

import base64
import json
from http import HTTPStatus

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jws
from joserfc.jwk import OKPKey

from attestation.binding import PURPOSES, kbs_report_data, report_data
from attestation.canonical import canonical_bytes, read_canonical, unb64, unb64url
from attestation.jws import read_jws, read_jws_header, sign_jws
from policies.errors import Refused, Unusable

KEY = Ed25519PrivateKey.generate()
KEYS = {"kem": b"k", "sign": b"s", "tls": b"t"}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), json_values, max_size=4))
@settings(max_examples=100)
def test_canonical_documents_and_tokens_read_back(value: dict[str, object]) -> None:
    assert read_canonical(canonical_bytes(value), where="t", limit=100_000) == value
    assert read_jws(sign_jws(value, KEY, kid="a", typ="t"), KEY.public_key(), typ="t") == value


@given(st.floats(allow_nan=False, allow_infinity=False) | st.floats(1e-7, 1e17))
def test_floats_are_written_as_the_library_writes_them(value: float) -> None:
    assert canonical_bytes([value, -value]) == rfc8785.dumps([value, -value])


numbers = st.integers(-(2**54), 2**54) | st.floats() | st.sampled_from([2**53, 2**53 - 1, -(2**53), -0.0, 1e21])
odd_names = st.sampled_from(["\uffff", "\U00010000", "\ud800", "\x7f", "\u2028", "é", "", "a"])


@given(
    st.recursive(
        st.none() | st.booleans() | numbers | st.text(max_size=6) | st.sampled_from([1, "a", HTTPStatus.OK]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(odd_names | st.text(max_size=3), inner, max_size=4)
            | st.dictionaries(st.integers(0, 3) | st.none() | st.booleans(), inner, max_size=2)
        ),
        max_leaves=12,
    )
)
@settings(max_examples=300)
def test_the_canonical_form_is_that_of_the_reference_whatever_the_value(value: object) -> None:
    try:
        expected = rfc8785.dumps(value)  # type: ignore[arg-type]
    except (rfc8785.CanonicalizationError, UnicodeError):
        with pytest.raises(Unusable):
            canonical_bytes(value)
    else:
        assert canonical_bytes(value) == expected


def test_another_library_reads_a_token_and_its_tokens_are_read() -> None:
    other, header = OKPKey.import_key(KEY), {"alg": "Ed25519", "kid": "b", "typ": "t"}
    read = jws.deserialize_compact(sign_jws({"a": [1, "é"]}, KEY, kid="b", typ="t"), other, algorithms=["Ed25519"])
    assert (read.headers(), read.payload) == (header, '{"a":[1,"é"]}'.encode())
    theirs = jws.serialize_compact(header, b'{"a":1}', other, algorithms=["Ed25519"])
    assert read_jws(theirs, KEY.public_key(), typ="t") == {"a": 1}


@pytest.mark.parametrize(
    "raw",
    [
        b'{"b":1,"a":2}',
        b'{"a": 1}',
        b'{"a":1,"a":1}',
        b'{"a":1.0}',
        b"[]",
        b"",
        b'{"a":NaN}',
        b'{"a":1}\n',
        b"[" * 9000,
    ],
)
def test_other_forms_are_refused(raw: bytes) -> None:
    with pytest.raises(Unusable):
        read_canonical(raw, where="t", limit=10_000)


def test_a_flipped_character_anywhere_in_a_token_is_noticed() -> None:
    token = sign_jws({"a": 1}, KEY, kid="broker", typ="eat+jwt")
    for position in range(len(token)):
        for other in ("A", "B", "-", "=", " ", "."):
            if token[position] != other:
                with pytest.raises((Unusable, Refused)):
                    read_jws(token[:position] + other + token[position + 1 :], KEY.public_key(), typ="eat+jwt")


def test_a_token_serves_one_purpose_one_algorithm_one_key() -> None:
    token = sign_jws({"a": 1}, KEY, kid="broker", typ="eat+jwt")
    assert read_jws_header(token, typ="eat+jwt") == "broker"
    with pytest.raises(Unusable):
        read_jws(token, KEY.public_key(), typ="other")
    with pytest.raises(Refused):
        read_jws(token, Ed25519PrivateKey.generate().public_key(), typ="eat+jwt")
    for header in (
        {"alg": "none", "kid": "b", "typ": "t"},
        {"alg": "HS256", "kid": "b", "typ": "t"},
        {"alg": "Ed25519", "jwk": {}},
    ):
        head = (
            base64.urlsafe_b64encode(json.dumps(header, separators=(",", ":"), sort_keys=True).encode())
            .rstrip(b"=")
            .decode()
        )
        with pytest.raises(Unusable):
            read_jws(f"{head}.e30.", KEY.public_key(), typ="t")


def test_base64_has_one_form() -> None:
    assert unb64("QQ==", where="t") == b"A"
    for text in ("QR==", "QQ", "QQ==\n", "Q-==", "QQ==QQ=="):
        with pytest.raises(Unusable):
            unb64(text, where="t")
    for text in ("QR", "QQ==", "Q+", "Q"):
        with pytest.raises(Unusable):
            unb64url(text, where="t")


def test_report_data_changes_with_everything_it_binds() -> None:
    nonce = bytes(32)
    first = report_data("one", "a" * 64, 1, nonce, KEYS)
    assert len(first) == 64
    others = [
        report_data("two", "a" * 64, 1, nonce, KEYS),
        report_data("one", "b" * 64, 1, nonce, KEYS),
        report_data("one", "a" * 64, 2, nonce, KEYS),
        report_data("one", "a" * 64, 1, b"\1" * 32, KEYS),
        *(report_data("one", "a" * 64, 1, nonce, {**KEYS, purpose: b"other"}) for purpose in PURPOSES),
        report_data("one", "a" * 64, 1, nonce, {"kem": b"s", "sign": b"k", "tls": b"t"}),
    ]
    assert len({first, *others}) == len(others) + 1


def test_a_missing_or_foreign_key_binds_nothing() -> None:
    for keys in ({"kem": b"k", "sign": b"s"}, {**KEYS, "more": b"m"}):
        with pytest.raises(Unusable):
            report_data("one", "a" * 64, 1, bytes(32), keys)
    with pytest.raises(Unusable):
        report_data("one", "a" * 64, 1, bytes(31), KEYS)


def test_kbs_binding_is_sha384_over_the_runtime_data_padded() -> None:
    bound = kbs_report_data("AAAA", {"kty": "EC", "crv": "P-256"}, "")
    assert len(bound) == 64
    assert bound[48:] == bytes(16)
    assert bound != kbs_report_data("AAAA", {"kty": "EC", "crv": "P-256"}, "{}")
