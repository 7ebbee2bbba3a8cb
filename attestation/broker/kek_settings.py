"""Which key-encryption keys a broker's settings name: files, keys in PKCS#11 tokens, keys of transit engines.

kek = "keys/kek"                                            a file; earlier ones are in keys/kek.old/
kek = { kind = "pkcs11", uri = "…", pin_file = "…" }        or pin_env
kek = { kind = "transit", url = "…", key = "…", token_file = "…", ca = "…" }
kek = { kind = "peers", init_data = "…", generation = 1 }   keys of an attested broker's vault, which its peers release
old_keks = [ … ]                                            those from which resources are to be taken
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from attestation.broker.keks import KekFile, KeyEncryption, load_kek, old_keks
from policies.errors import Unusable
from policies.init_data import INIT_DATA_LIMIT

if TYPE_CHECKING:
    from attestation.attester.world import World
    from attestation.broker.peer_kek import PeerKek


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TokenSettings(_Section):
    """A key in a PKCS#11 token."""

    kind: Literal["pkcs11"]
    uri: str
    pin_file: str | None = None
    pin_env: str | None = None

    @model_validator(mode="after")
    def _pin(self) -> TokenSettings:
        if (self.pin_file is None) == (self.pin_env is None):
            raise ValueError("name either pin_file or pin_env")
        return self


class TransitSettings(_Section):
    """A key of Vault's or OpenBao's transit engine."""

    kind: Literal["transit"]
    url: str
    key: str
    token_file: str
    ca: str
    mount: str = "transit"
    namespace: str | None = None


class PeersSettings(_Section):
    """Keys of the broker's own vault, which it has from its peers. `port`: the virtual platform's, on such a one.

    A higher `generation` than there is makes a new key.
    """

    kind: Literal["peers"]
    init_data: str
    port: str | None = None
    generation: Annotated[int, Field(ge=1, lt=1_000_000)] = 1


KekSettings = str | Annotated[TokenSettings | TransitSettings | PeersSettings, Field(discriminator="kind")]
"""A file's path, or one of the tables."""


def open_kek(folder: Path, settings: KekSettings) -> KeyEncryption:
    """The KEK that these settings of the broker in `folder` name. Raises UnusableKey."""
    if isinstance(settings, str):
        return load_kek(folder / settings)
    if isinstance(settings, TokenSettings):
        from attestation.broker.token_kek import token_kek

        pin_file = None if settings.pin_file is None else folder / settings.pin_file
        return token_kek(settings.uri, pin_file, settings.pin_env)
    if isinstance(settings, PeersSettings):
        kek = _peer_kek(folder, settings.init_data, settings.port)
        kek.wanted = settings.generation
        return kek
    from attestation.broker.transit_kek import TransitKek

    return TransitKek(
        settings.url,
        settings.key,
        token_file=folder / settings.token_file,
        ca=folder / settings.ca,
        mount=settings.mount,
        namespace=settings.namespace,
    )


@lru_cache(maxsize=4)
def _peer_kek(folder: Path, init_data: str, port: str | None) -> PeerKek:
    """One for as long as the process lives: what its peers have released once is not asked for again."""
    from attestation.attester.world import open_attester
    from attestation.broker.peer_kek import PeerKek

    try:
        with (folder / init_data).open("rb") as file:
            raw = file.read(INIT_DATA_LIMIT + 1)
    except OSError as error:
        do = "Put the init-data there with which the broker was launched."
        raise Unusable(f"it cannot be read: {error.strerror}", where=str(folder / init_data), do=do) from error
    world: World = "hardware" if port is None else "virtual"
    return PeerKek(folder / "state/kek", raw, lambda: open_attester(world, None if port is None else folder / port))


def earlier_files(folder: Path, settings: KekSettings) -> list[KekFile]:
    """The KEK files that were in use before the one that these settings name. Raises UnusableKey."""
    if not isinstance(settings, str):
        return []
    return [load_kek(path) for path in sorted(old_keks(folder / settings).glob("[0-9a-f]*"))]


def other_keks(folder: Path, current: KekSettings, old: Sequence[KekSettings]) -> list[KeyEncryption]:
    """All but the KEK in use. Raises UnusableKey."""
    named = [open_kek(folder, settings) for settings in old]
    return [*named, *(kek for settings in (current, *old) for kek in earlier_files(folder, settings))]
