"""A key-encryption key in the transit engine of Vault or OpenBao: `transit/encrypt` and `transit/decrypt`, over TLS.

The vault's certificate must be under the CA that the settings name; system roots, proxies and redirects are not used.
Its token stands in a file of mode 0600, read at each call, so that an agent may renew it. The ciphertext says which
version of the key made it (`vault:v3:…`): when the vault's own rotation makes another, the next probe notices, and the
broker puts its resources under it.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from attestation.broker.keks import Wrapped, changed
from attestation.errors import BrokerUnavailable
from policies.errors import SealwrightError, UnusableKey
from policies.keys import read_secret

if TYPE_CHECKING:
    import hvac

SECONDS: Final = 3
"""How long it may take to connect, and then to answer."""
_CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]{20,2048}={0,2}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOUNT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")


class TransitKek:
    """A key of a vault's transit engine."""

    def __init__(
        self, url: str, key: str, *, token_file: Path, ca: Path, mount: str = "transit", namespace: str | None = None
    ) -> None:
        """Raises UnusableKey for an address or a name that cannot be one, or if hvac is not installed."""
        if urlsplit(url).scheme != "https" or not urlsplit(url).hostname or urlsplit(url).username:
            raise UnusableKey("a vault is reached by https", where=url, do="Write https://HOST:PORT.")
        if not _NAME.fullmatch(key) or not _MOUNT.fullmatch(mount):
            raise UnusableKey("this names no key of a transit engine", where=f"{mount}/{key}", do="Use its plain name.")
        if not ca.is_file():
            do = "Put the certificate of the CA that the vault's is under there (PEM)."
            raise UnusableKey("the vault's CA certificate is missing", where=str(ca), do=do)
        self._url, self._key, self._mount = url, key, mount
        self._token_file, self._ca, self._namespace = token_file, ca, namespace
        self._version = 0
        self._client: hvac.Client | None = None
        try:
            import hvac  # noqa: F401  # the extra `vault`
        except ImportError as error:
            do = "Install the extra: pip install 'sealwright[vault]'."
            raise UnusableKey("hvac is not installed", where=url, do=do) from error

    @property
    def key_id(self) -> str:
        """`transit:` with mount, name and the newest version that was seen (0: none yet)."""
        return f"{self._prefix}{self._version}"

    def opens(self, key_id: str) -> bool:
        """Any version of it; whether the vault still allows it, the vault says."""
        return key_id.startswith(self._prefix)

    def wrap(self, key: bytes, bound: bytes) -> Wrapped:
        """Have the vault encrypt, `bound` as associated data."""
        answer = self._ask("encrypt_data", plaintext=_b64(key), associated_data=_b64(bound))
        text = answer.get("ciphertext")
        match = _CIPHERTEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None or not isinstance(text, str):
            raise self._gone("gave no ciphertext of the transit engine's form")
        self._version = int(match[1])
        return Wrapped(self.key_id, text.encode("ascii"))

    def unwrap(self, wrapped: Wrapped, bound: bytes) -> bytes:
        """Have the vault decrypt."""
        text = wrapped.value.decode("ascii", "replace")
        if not _CIPHERTEXT.fullmatch(text):
            raise changed(f"the vault's key {self._key}")
        answer = self._ask("decrypt_data", ciphertext=text, associated_data=_b64(bound))
        try:
            return base64.b64decode(str(answer["plaintext"]), validate=True)
        except (KeyError, ValueError) as error:
            raise self._gone("gave no plaintext") from error

    def close(self) -> None:
        """Close its connections."""
        client, self._client = self._client, None
        if client is not None:
            client.adapter.close()

    @property
    def _prefix(self) -> str:
        return f"transit:{self._mount}/{self._key}:v"

    def _ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """One call of the transit engine. Raises BrokerUnavailable."""
        import requests
        from hvac import exceptions

        try:
            client = self._connected()
            client.token = read_secret(self._token_file, 4096).decode("ascii").strip()
            engine = client.secrets.transit
            answer = getattr(engine, call)(name=self._key, mount_point=self._mount, **arguments)
            data = answer["data"]
        except exceptions.InvalidRequest as error:  # 400: the vault understood, and does not open it
            if call == "decrypt_data":
                raise changed(f"the vault's key {self._key} ({_first(error)})") from error
            raise self._gone(f"refuses: {_first(error)}") from error
        except exceptions.VaultError as error:
            raise self._gone(f"refuses: {_first(error)}") from error
        except requests.exceptions.RequestException as error:
            raise self._gone(f"cannot be reached ({type(error).__name__})") from error
        except (SealwrightError, UnicodeDecodeError) as error:
            raise self._gone(f"cannot be asked: {getattr(error, 'what', 'its token is no text')}") from error
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise self._gone(f"answers in no form of its own ({type(error).__name__})") from error
        return data if isinstance(data, dict) else {}

    def _connected(self) -> hvac.Client:
        import hvac
        import requests

        if self._client is None:
            session = requests.Session()
            session.trust_env = False  # no proxies, no .netrc, no other CAs
            session.verify = str(self._ca)
            self._client = hvac.Client(
                url=self._url,
                verify=str(self._ca),
                timeout=SECONDS,
                allow_redirects=False,
                session=session,
                namespace=self._namespace,
            )
        return self._client

    def _gone(self, what: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"the vault at {urlsplit(self._url).netloc} {what}", where="key-encryption key")


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _first(error: Exception) -> str:
    """The vault's first reason, in one short line."""
    reasons = getattr(error, "errors", None) or [str(error) or type(error).__name__]
    return str(reasons[0]).splitlines()[0][:200]
