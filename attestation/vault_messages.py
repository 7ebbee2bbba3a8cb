"""What a guest sends to a broker for its vault (docs/reference/broker-http.md, "Vaults")."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, Field

from attestation.canonical import canonical_bytes
from attestation.messages import Base64, Message
from attestation.vaults import Deal, Mark
from policies.documents import Resource
from policies.vaults import vault_place

MAX_VAULT_REQUEST: Final = 16 * 1024


def _vault(name: str) -> str:
    if vault_place(name) is None:
        raise ValueError("no vault's name: MEMBER/vault-ROLE/NAME")
    return name


VaultName = Annotated[Resource, AfterValidator(_vault)]
Epoch = Annotated[int, Field(ge=1, lt=2**53)]


class VaultLook(Message):
    """POST /v1/vaults/look: what the broker knows of a vault, and the key that a share is sealed to."""

    vault: VaultName


class VaultOpening(Message):
    """POST /v1/vaults/open: the vault's key, or this broker's share of it, for the boot that asks, in this epoch."""

    vault: VaultName
    epoch: Epoch


class VaultDeposit(Message):
    """POST /v1/vaults/deposit: a vault's key or a share of it, HPKE to the broker's `kem` key (`deposit_info`)."""

    vault: VaultName
    epoch: Epoch
    deal: Deal
    sealed: Base64


class VaultMark(Message):
    """POST /v1/vaults/prepare and /v1/vaults/commit: a store's generation and root."""

    vault: VaultName
    mark: Mark


def deposit_info(broker: str, vault: str, number: int) -> bytes:
    """The HPKE `info` of a deposited share: it opens as this broker's share of this deal and as nothing else."""
    return b"sealwright-vault-deposit-v1\0" + canonical_bytes({"broker": broker, "deal": number, "vault": vault})
