"""The vaults of a charter's places: how their keys are named, and the document by which members let one be recovered.

Each enrolled guest may have one vault, a sealed volume. Its key is a resource of the guest's member,
`MEMBER/vault-ROLE/NAME`, over which the owner's release policy decides as over any other. No owner deposits it:
the guest makes it (attestation.vaults).
"""

from __future__ import annotations

from typing import Final, get_args

from pydantic import Field

from policies.documents import Role
from policies.forms import Document, Name, Resource

TYPE: Final = "vault-"
"""What the type of a vault's key begins with; the guest's role follows."""
_ROLES: Final[dict[str, Role]] = {f"{TYPE}{role}": role for role in get_args(Role)}


class VaultRecovery(Document):
    """That a vault may go on from a state that its brokers would refuse: target `enrolments/vault-ROLE/NAME.json`.

    `role` and `name` are the vault's place and `member` is its owner. The store of `generation` is accepted from then
    on, whatever was committed after it (0: none is; the vault begins anew, with a new key), from the guest that is
    enrolled as `to_role`, `to_name`. `number` grows with each recovery of this vault: each counts once.
    """

    role: Role
    name: Name
    member: Name
    number: int = Field(ge=1, lt=2**31)
    generation: int = Field(ge=0, lt=2**53)
    to_role: Role
    to_name: Name

    @property
    def vault(self) -> str:
        """The vault's name."""
        return vault_name(self.member, self.role, self.name)


def vault_name(member: str, role: str, name: str) -> str:
    """The name of the vault of a place: that of the resource which is its key."""
    return f"{member}/{TYPE}{role}/{name}"


def vault_place(resource: Resource) -> tuple[Role, str] | None:
    """Role and name of the place whose vault's key `resource` is, or None if it is no vault's."""
    _, kind, tag = (*resource.split("/"), "", "")[:3]
    role = _ROLES.get(kind)
    return None if role is None else (role, tag)
