"""Keys in a PKCS#11 token: the key that decides for a member, or signs an image, need not be a file.

A key is named by a PKCS#11 URI (RFC 7512), `pkcs11:token=acme;object=member?module-path=/usr/lib/libsofthsm2.so`.
The PIN stands in a file of mode 0600, never on a command line. The extra `hsm` brings python-pkcs11; SoftHSM 2.6 is
what the tests use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from policies.errors import UnusableKey
from policies.keys import public_pem, read_secret

_ED25519_PARAMETERS: Final = bytes.fromhex("06032b6570")
"""The object identifier 1.3.101.112 (RFC 8410), DER: CKA_EC_PARAMS."""
_P384_PARAMETERS: Final = bytes.fromhex("06052b81040022")
"""The object identifier 1.3.132.0.34 (secp384r1), DER."""
_P384_POINT: Final = 97
_PATH_ATTRIBUTES: Final = {"token", "object"}
_QUERY_ATTRIBUTES: Final = {"module-path"}


@dataclass(frozen=True, slots=True)
class TokenAddress:
    """Which key in which token, through which library."""

    token: str
    key: str
    module: str


def parse_token_uri(uri: str) -> TokenAddress:
    """Return what a PKCS#11 URI names. Raises UnusableKey unless it gives token, object and module-path alone."""
    do = "Write pkcs11:token=TOKEN;object=KEY?module-path=/path/to/library.so"
    path, _, query = uri.removeprefix("pkcs11:").partition("?")
    parts: dict[str, str] = {}
    for text, allowed, separator in ((path, _PATH_ATTRIBUTES, ";"), (query, _QUERY_ATTRIBUTES, "&")):
        for item in filter(None, text.split(separator)):
            name, equals, value = item.partition("=")
            if not equals or name not in allowed or name in parts:
                raise UnusableKey(f"the PKCS#11 URI has {name!r}, twice or unknown", where=uri, do=do)
            parts[name] = unquote(value)
    if not uri.startswith("pkcs11:") or not all(parts.get(name) for name in _PATH_ATTRIBUTES | _QUERY_ATTRIBUTES):
        raise UnusableKey("the PKCS#11 URI lacks token, object or module-path", where=uri, do=do)
    return TokenAddress(parts["token"], parts["object"], parts["module-path"])


def token_uri(address: TokenAddress) -> str:
    """Return the PKCS#11 URI of a key."""
    return f"pkcs11:token={quote(address.token)};object={quote(address.key)}?module-path={quote(address.module)}"


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A private key in a token; a `SigningKey` for proposals. Each signature opens a session of its own."""

    address: TokenAddress
    public: Ed25519PublicKey
    pin_file: Path

    def public_pem(self) -> str:
        """Return the public half in PEM."""
        return public_pem(self.public)

    def sign(self, data: bytes) -> bytes:
        """Return the signature over `data`. Raises UnusableKey if the token does not give a valid one."""
        import pkcs11

        with _session(self.address, self.pin_file) as session:
            private = _only(session, self.address, pkcs11.ObjectClass.PRIVATE_KEY)
            signature: bytes = private.sign(data, mechanism=pkcs11.Mechanism.EDDSA)
        try:
            self.public.verify(signature, data)
        except InvalidSignature as error:
            raise _unfit(self.address) from error
        return signature

    def public_key(self) -> Ed25519PublicKey:
        """Return the public half."""
        return self.public


@dataclass(frozen=True, slots=True)
class TokenP384:
    """A P-384 private key in a token, used like an `EllipticCurvePrivateKey`."""

    address: TokenAddress
    public: ec.EllipticCurvePublicKey
    pin_file: Path

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Return the public half."""
        return self.public

    def sign(self, data: bytes, signature_algorithm: ec.ECDSA) -> bytes:
        """Return the ECDSA signature over `data` in DER, with the token's own nonce: no two are the same.

        Raises UnusableKey if the token does not give a valid one.
        """
        import pkcs11

        digest = hashes.Hash(signature_algorithm.algorithm)  # type: ignore[arg-type]  # never a prehashed one
        digest.update(data)
        with _session(self.address, self.pin_file) as session:
            private = _only(session, self.address, pkcs11.ObjectClass.PRIVATE_KEY, _p384_type())
            raw: bytes = private.sign(digest.finalize(), mechanism=pkcs11.Mechanism.ECDSA)
        half = len(raw) // 2
        signature = encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
        try:
            self.public.verify(signature, data, signature_algorithm)
        except InvalidSignature as error:
            raise _unfit(self.address) from error
        return signature


def open_token_p384(uri: str, pin_file: Path | None) -> TokenP384:
    """Return the P-384 key that `uri` names. Raises UnusableKey as `open_token_key` does."""
    import pkcs11

    address, pin = parse_token_uri(uri), _pin_file(uri, pin_file)
    with _session(address, pin) as session:
        public = _only(session, address, pkcs11.ObjectClass.PUBLIC_KEY, _p384_type())
        return TokenP384(address, _p384(public, address), pin)


def generate_token_p384(uri: str, pin_file: Path | None) -> TokenP384:
    """Make a P-384 key in the token, which it cannot leave. Raises UnusableKey if there is one of that name."""
    import pkcs11

    address, pin = parse_token_uri(uri), _pin_file(uri, pin_file)
    with _session(address, pin) as session:
        _must_be_new(session, address)
        parameters = session.create_domain_parameters(
            pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS: _P384_PARAMETERS}, local=True
        )
        public, _ = parameters.generate_keypair(store=True, label=address.key)
        return TokenP384(address, _p384(public, address), pin)


def open_token_key(uri: str, pin_file: Path | None) -> TokenKey:
    """Return the key that `uri` names. Raises UnusableKey if library, token, PIN or key are not what they must be."""
    import pkcs11

    address, pin = parse_token_uri(uri), _pin_file(uri, pin_file)
    with _session(address, pin) as session:
        public = _only(session, address, pkcs11.ObjectClass.PUBLIC_KEY)
        return TokenKey(address, _ed25519(public, address), pin)


def generate_token_key(uri: str, pin_file: Path | None) -> TokenKey:
    """Make an Ed25519 key in the token, which it cannot leave. Raises UnusableKey if there is one of that name."""
    import pkcs11

    address, pin = parse_token_uri(uri), _pin_file(uri, pin_file)
    with _session(address, pin) as session:
        _must_be_new(session, address)
        parameters = session.create_domain_parameters(
            pkcs11.KeyType.EC_EDWARDS, {pkcs11.Attribute.EC_PARAMS: _ED25519_PARAMETERS}, local=True
        )
        public, _ = parameters.generate_keypair(
            mechanism=pkcs11.Mechanism.EC_EDWARDS_KEY_PAIR_GEN, store=True, label=address.key
        )
        return TokenKey(address, _ed25519(public, address), pin)


def _must_be_new(session: Any, address: TokenAddress) -> None:
    import pkcs11

    if any(True for _ in session.get_objects({pkcs11.Attribute.LABEL: address.key})):
        raise UnusableKey("the token has a key of this name already", where=address.key, do="Choose another name.")


def _unfit(address: TokenAddress) -> UnusableKey:
    return UnusableKey("the token's signature does not fit its public key", where=address.key, do="Check the token.")


def _p384_type() -> Any:
    import pkcs11

    return pkcs11.KeyType.EC


def _pin_file(uri: str, pin_file: Path | None) -> Path:
    if pin_file is None:
        raise UnusableKey("the token's PIN is missing", where=uri, do="Name a file of mode 0600 by --pin-file.")
    return pin_file


@contextmanager
def _session(address: TokenAddress, pin_file: Path) -> Iterator[Any]:
    try:
        import pkcs11
    except ImportError as error:
        raise UnusableKey(
            "PKCS#11 is not installed", where=address.token, do="Install the extra: pip install 'sealwright[hsm]'."
        ) from error
    pin = read_secret(pin_file, 256).decode("utf-8").strip()
    try:
        token = pkcs11.lib(address.module).get_token(token_label=address.token)
        with token.open(rw=True, user_pin=pin) as session:
            yield session
    except (pkcs11.PKCS11Error, RuntimeError, OSError) as error:
        words = re.sub(r"(?<!^)([A-Z])", r" \1", type(error).__name__).lower()
        raise UnusableKey(
            f"the token {address.token} cannot be used: {str(error) or words}",
            where=address.module,
            do="Check the library's path, the token's name and the PIN.",
        ) from error


def _only(session: Any, address: TokenAddress, kind: Any, key_type: Any = None) -> Any:
    """The one object of that kind and name; `key_type` None means Ed25519."""
    import pkcs11

    found = list(
        session.get_objects(
            {
                pkcs11.Attribute.CLASS: kind,
                pkcs11.Attribute.LABEL: address.key,
                pkcs11.Attribute.KEY_TYPE: key_type or pkcs11.KeyType.EC_EDWARDS,
            }
        )
    )
    if len(found) != 1:
        raise UnusableKey(
            f"the token has {len(found)} {'P-384' if key_type else 'Ed25519'} keys of this name, must have one",
            where=address.key,
            do="Name the key, or make one with `seal charter key`.",
        )
    return found[0]


def _ed25519(public: Any, address: TokenAddress) -> Ed25519PublicKey:
    """The public key: CKA_EC_POINT is a DER octet string, or in some tokens the bare 32 bytes."""
    import pkcs11

    point: bytes = bytes(public[pkcs11.Attribute.EC_POINT])
    raw = point[2:] if len(point) == 34 and point[:2] == b"\x04\x20" else point
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise UnusableKey("this key is not Ed25519", where=address.key, do="Name an Ed25519 key.") from error


def _p384(public: Any, address: TokenAddress) -> ec.EllipticCurvePublicKey:
    """The public key: CKA_EC_POINT is a DER octet string, or in some tokens the bare 97 bytes."""
    import pkcs11

    point: bytes = bytes(public[pkcs11.Attribute.EC_POINT])
    raw = point[2:] if len(point) == _P384_POINT + 2 and point[:2] == bytes([4, _P384_POINT]) else point
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), raw)
    except ValueError as error:
        raise UnusableKey("this key is not on P-384", where=address.key, do="Name a P-384 key.") from error
