"""A key-encryption key in a PKCS#11 token: an AES-256 key that never leaves it (CKM_AES_GCM).

The key is named by a PKCS#11 URI (RFC 7512, as in policies.token); the PIN stands in a file of mode 0600 or in an
environment variable, never in the settings or an argument. All calls are made by one thread, since a session is for one
at a time; who waits does so for SECONDS. A token that comes back needs its library begun anew, which is done at the
next call.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from attestation.broker.keks import KEK_SIZE, NONCE_SIZE, Wrapped, changed
from attestation.errors import BrokerUnavailable
from policies.errors import UnusableKey
from policies.keys import read_secret
from policies.token import parse_token_uri

T = TypeVar("T")
SECONDS: Final = 5.0
"""How long a call may take, those before it included."""
_TAG_BITS: Final = 128


class _Token:
    """One token as this process has it: who logs in or out does it for all, so there is one session and one thread.

    Opened at its first use, closed with the last KEK in it.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name
        self._session: Any = None
        self._keys: dict[str, Any] = {}
        self._worker = ThreadPoolExecutor(1, "token")
        self._late: Future[Any] | None = None
        self.users = 0

    def ask(self, key: str, pin: Callable[[], str], work: Callable[[Any], T]) -> T:
        """Do `work` with a key, in a fresh session if the last does not work any more. Raises BrokerUnavailable."""
        if self._late is not None and not self._late.done():
            raise self._gone(f"has not answered for more than {SECONDS:g} s")
        waiting = self._worker.submit(self._work, key, pin, work)
        try:
            return waiting.result(timeout=SECONDS)
        except TimeoutError as error:
            if not waiting.cancel():
                self._late = waiting
            raise self._gone(f"did not answer in {SECONDS:g} s") from error

    def close(self) -> None:
        """End the session, within SECONDS: while it stands, nobody in this process can log in to the token anew."""
        ended = self._worker.submit(self._hang_up)
        self._worker.shutdown(wait=False)
        with suppress(TimeoutError):
            ended.result(timeout=SECONDS)

    # --- in the worker ------------------------------------------------------------------------------------------------

    def _work(self, key: str, pin: Callable[[], str], work: Callable[[Any], T]) -> T:
        import pkcs11

        failures = (pkcs11.PKCS11Error, RuntimeError, OSError)
        if self._session is not None:
            with suppress(*failures):
                return work(self._key(key))
            self._hang_up()
        try:
            self._session = self._open(pin())
            return work(self._key(key))
        except failures as error:
            self._hang_up()
            words = re.sub(r"(?<!^)([A-Z])", r" \1", type(error).__name__).lower()
            raise self._gone(f"cannot be used: {str(error) or words}") from error
        except UnusableKey as error:  # the PIN
            raise self._gone(f"cannot be used: {error.what}") from error

    def _open(self, pin: str) -> Any:
        import pkcs11

        library = pkcs11.lib(self._module)
        try:
            token = library.get_token(token_label=self._name)
        except pkcs11.PKCS11Error:
            library.reinitialize()  # what it found at its start is all that it knows
            token = library.get_token(token_label=self._name)
        return token.open(user_pin=pin)

    def _key(self, name: str) -> Any:
        if name not in self._keys:
            self._keys[name] = _only_key(self._session, name)
        return self._keys[name]

    def _hang_up(self) -> None:
        session, self._session, self._keys = self._session, None, {}
        if session is not None:
            with suppress(Exception):
                session.close()

    def _gone(self, what: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"the token {self._name} {what}", where="key-encryption key")


_TOKENS: Final[dict[tuple[str, str], _Token]] = {}
_REGISTER: Final = threading.Lock()


class TokenKek:
    """An AES key in a token."""

    def __init__(self, uri: str, pin: Callable[[], str]) -> None:
        """`pin` reads the PIN. Raises UnusableKey for a URI that names no key."""
        self._address = parse_token_uri(uri)
        self._pin = pin
        self._place = self._address.module, self._address.token
        with _REGISTER:
            self._token: _Token | None = _TOKENS.setdefault(self._place, _Token(*self._place))
            self._token.users += 1

    @property
    def key_id(self) -> str:
        """`pkcs11:` with the names of token and key. A token must not get another key of the same name."""
        return f"pkcs11:{self._address.token}/{self._address.key}"[:255]

    def opens(self, key_id: str) -> bool:
        """Its own."""
        return key_id == self.key_id

    def wrap(self, key: bytes, bound: bytes) -> Wrapped:
        """AES-256-GCM in the token: nonce, ciphertext, tag."""
        nonce = os.urandom(NONCE_SIZE)
        return Wrapped(self.key_id, nonce + self._ask(lambda kek: _encrypt(kek, nonce, key, bound)))

    def unwrap(self, wrapped: Wrapped, bound: bytes) -> bytes:
        """Undo `wrap`. Tokens tell a changed ciphertext and a fault by the same error: a probe tells them apart."""
        nonce, sealed = wrapped.value[:NONCE_SIZE], wrapped.value[NONCE_SIZE:]
        if len(nonce) != NONCE_SIZE:
            raise changed(f"the token {self._address.token}")
        try:
            return self._ask(lambda kek: _decrypt(kek, nonce, sealed, bound))
        except BrokerUnavailable:
            key, probe = os.urandom(KEK_SIZE), os.urandom(NONCE_SIZE)
            if self._ask(lambda kek: _decrypt(kek, probe, _encrypt(kek, probe, key, bound), bound)) == key:
                raise changed(f"the token {self._address.token}") from None
            raise

    def close(self) -> None:
        """Let go of the token."""
        with _REGISTER:
            token, self._token = self._token, None
            if token is None:
                return
            token.users -= 1
            if token.users == 0:
                del _TOKENS[self._place]
                token.close()

    def _ask(self, work: Callable[[Any], bytes]) -> bytes:
        token = self._token
        if token is None:
            what = f"the token {self._address.token} is not used any more"
            raise BrokerUnavailable(what, where="key-encryption key")
        return token.ask(self._address.key, self._pin, work)


def token_kek(uri: str, pin_file: Path | None, pin_env: str | None) -> TokenKek:
    """The KEK that a PKCS#11 URI names. Raises UnusableKey if it names none, or PKCS#11 is not installed."""
    try:
        import pkcs11  # noqa: F401  # the extra `hsm`
    except ImportError as error:
        do = "Install the extra: pip install 'sealwright[hsm]'."
        raise UnusableKey("PKCS#11 is not installed", where=uri, do=do) from error

    def pin() -> str:
        if pin_file is not None:
            return read_secret(pin_file, 256).decode("utf-8").strip()
        value = os.environ.get(pin_env or "")
        if not value:
            do = "Name a file of mode 0600 by pin_file, or an environment variable by pin_env."
            raise UnusableKey("the token's PIN is missing", where=pin_env or uri, do=do)
        return value

    return TokenKek(uri, pin)


def create_token_kek(uri: str, pin: str) -> None:
    """Make an AES-256 key in the token, which it cannot leave. Raises UnusableKey if there is one of that name."""
    import pkcs11

    address = parse_token_uri(uri)
    token = pkcs11.lib(address.module).get_token(token_label=address.token)
    with token.open(rw=True, user_pin=pin) as session:
        if any(True for _ in session.get_objects({pkcs11.Attribute.LABEL: address.key})):
            raise UnusableKey("the token has a key of this name already", where=address.key, do="Choose another name.")
        session.generate_key(
            pkcs11.KeyType.AES,
            KEK_SIZE * 8,
            label=address.key,
            store=True,
            template={
                pkcs11.Attribute.EXTRACTABLE: False,
                pkcs11.Attribute.PRIVATE: True,
                pkcs11.Attribute.SENSITIVE: True,
            },
        )


def _encrypt(kek: Any, nonce: bytes, value: bytes, bound: bytes) -> bytes:
    import pkcs11

    parameters = pkcs11.GCMParams(nonce, bound, _TAG_BITS)
    return bytes(kek.encrypt(value, mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameters))


def _decrypt(kek: Any, nonce: bytes, sealed: bytes, bound: bytes) -> bytes:
    import pkcs11

    parameters = pkcs11.GCMParams(nonce, bound, _TAG_BITS)
    return bytes(kek.decrypt(sealed, mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameters))


def _only_key(session: Any, name: str) -> Any:
    """The key of this name: one AES key, which cannot be read out. Raises RuntimeError."""
    import pkcs11

    wanted = {
        pkcs11.Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY,
        pkcs11.Attribute.KEY_TYPE: pkcs11.KeyType.AES,
        pkcs11.Attribute.LABEL: name,
    }
    found = list(session.get_objects(wanted))
    if len(found) != 1:
        raise RuntimeError(f"it has {len(found)} AES keys named {name}, must have one")
    key = found[0]
    if key[pkcs11.Attribute.EXTRACTABLE] or not key[pkcs11.Attribute.SENSITIVE]:
        raise RuntimeError(f"its key {name} can be read out")
    return key
