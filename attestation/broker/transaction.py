"""What one step may read and write of the broker's database: ledger, blobs, sessions, resources. SQLAlchemy Core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256

import sqlalchemy as sa

from attestation.broker.schema import BLOBS, ENTRIES, META, NODES, RESOURCES, SESSIONS
from attestation.broker.sessions import Session
from attestation.ledger.entry import Entry
from attestation.ledger.receipt import Receipt
from attestation.ledger.tree import appended_nodes, consistency_proof, inclusion_proof, leaf_hash
from policies.errors import Unusable


@dataclass(frozen=True, slots=True)
class StoredResource:
    """A resource as it lies in the database: its value under a key of its own, that key under the KEK."""

    name: str
    serial: int
    key_id: str
    wrapped_key: bytes
    sealed: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """The ledger's head: how many entries, and the signed checkpoint over them."""

    size: int
    checkpoint: str


class Transaction:
    """What one step may read and write. Valid only inside `Storage.transact` or `Storage.read`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self.appended: list[int] = []

    # --- ledger -----------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """How many entries the ledger has, those of this batch included."""
        value = self._meta("size")
        return int(value) if value is not None else 0

    def node(self, level: int, position: int) -> bytes:
        """A stored tree node: the `Nodes` reader of attestation.ledger.tree."""
        found = self._connection.execute(
            sa.select(NODES.c.hash).where(NODES.c.level == level, NODES.c.position == position)
        ).scalar_one()
        return bytes(found)

    def append(
        self,
        entry: Entry,
        *,
        blobs: Mapping[str, bytes] | None = None,
        resource: str | None = None,
        guest: str | None = None,
        boot: str | None = None,
    ) -> int:
        """Append an entry and return its number.

        `resource`, `guest` and `boot` (hex REPORT_ID) are what counters count by; they repeat what the entry's body
        says. `blobs` are contents by their SHA-256.
        """
        raw, number = entry.to_bytes(), self.size()
        for digest, content in (blobs or {}).items():
            self._put_blob(digest, content)
        self._connection.execute(
            sa.insert(ENTRIES).values(
                number=number, kind=entry.kind, resource=resource, guest=guest, boot=boot, raw=raw
            )
        )
        for level, position, value in appended_nodes(number, leaf_hash(raw), self.node):
            self._connection.execute(sa.insert(NODES).values(level=level, position=position, hash=value))
        self._set_meta("size", str(number + 1))
        self.appended.append(number)
        return number

    def entry(self, number: int) -> bytes | None:
        """The bytes of an entry, or None."""
        raw = self._connection.execute(sa.select(ENTRIES.c.raw).where(ENTRIES.c.number == number)).scalar()
        return None if raw is None else bytes(raw)

    def entries(self, start: int, end: int) -> list[bytes]:
        """The bytes of the entries [start, end)."""
        rows = self._connection.execute(
            sa.select(ENTRIES.c.raw).where(ENTRIES.c.number >= start, ENTRIES.c.number < end).order_by(ENTRIES.c.number)
        )
        return [bytes(raw) for (raw,) in rows]

    def count(self, kind: str, *, resource: str, guest: str | None = None, boot: str | None = None) -> int:
        """How many entries of a kind the ledger has about a resource (to one guest, in one boot)."""
        query = (
            sa.select(sa.func.count())
            .select_from(ENTRIES)
            .where(ENTRIES.c.kind == kind, ENTRIES.c.resource == resource)
        )
        if guest is not None:
            query = query.where(ENTRIES.c.guest == guest)
        if boot is not None:
            query = query.where(ENTRIES.c.boot == boot)
        return int(self._connection.execute(query).scalar_one())

    def last_entry(self, kind: str) -> bytes | None:
        """The bytes of the newest entry of a kind, or None."""
        raw = self._connection.execute(
            sa.select(ENTRIES.c.raw).where(ENTRIES.c.kind == kind).order_by(ENTRIES.c.number.desc()).limit(1)
        ).scalar()
        return None if raw is None else bytes(raw)

    def last_about(self, kind: str, *, resource: str, boot: str | None = None) -> bytes | None:
        """The bytes of the newest entry of a kind about a resource (with this `boot`), or None."""
        query = sa.select(ENTRIES.c.raw).where(ENTRIES.c.kind == kind, ENTRIES.c.resource == resource)
        if boot is not None:
            query = query.where(ENTRIES.c.boot == boot)
        raw = self._connection.execute(query.order_by(ENTRIES.c.number.desc()).limit(1)).scalar()
        return None if raw is None else bytes(raw)

    def blob(self, digest: str) -> bytes | None:
        """A blob by its SHA-256, or None."""
        found = self._connection.execute(sa.select(BLOBS.c.content).where(BLOBS.c.sha256 == digest)).scalar()
        return None if found is None else bytes(found)

    def blob_digests(self) -> list[str]:
        """The SHA-256 of every blob."""
        return list(self._connection.execute(sa.select(BLOBS.c.sha256).order_by(BLOBS.c.sha256)).scalars())

    def head(self) -> Head:
        """The head of the last commit."""
        return Head(int(self._meta("head_size") or 0), self._meta("checkpoint") or "")

    def published(self) -> Head:
        """The head that others are shown: the newest that is cosigned, or the last commit's if none has to be."""
        size = self._meta("cosigned_size")
        return self.head() if size is None else Head(int(size), self._meta("cosigned") or "")

    def receipt(self, number: int, head: Head) -> Receipt:
        """The receipt of an entry under a head."""
        return Receipt(number, head.checkpoint, tuple(inclusion_proof(number, head.size, self.node)))

    def consistency(self, old: int, new: int) -> list[bytes]:
        """The proof that the first `new` entries extend the first `old`."""
        return consistency_proof(old, new, self.node)

    # --- sessions ---------------------------------------------------------------------------------------------------

    def session(self, identifier: str) -> Session | None:
        """A session, or None."""
        state = self._connection.execute(sa.select(SESSIONS.c.state).where(SESSIONS.c.id == identifier)).scalar()
        return None if state is None else Session.model_validate_json(state)

    def new_session(self, session: Session) -> None:
        """Keep a new session."""
        self._connection.execute(
            sa.insert(SESSIONS).values(id=session.id, expires=session.expires, state=session.model_dump_json())
        )

    def update_session(self, session: Session) -> None:
        """Keep a session's next form."""
        self._connection.execute(
            sa.update(SESSIONS)
            .where(SESSIONS.c.id == session.id)
            .values(expires=session.expires, state=session.model_dump_json())
        )

    def prune_sessions(self, at: datetime) -> int:
        """Forget the sessions that have ended; return how many are left."""
        self._connection.execute(sa.delete(SESSIONS).where(SESSIONS.c.expires <= int(at.timestamp())))
        return int(self._connection.execute(sa.select(sa.func.count()).select_from(SESSIONS)).scalar_one())

    # --- resources --------------------------------------------------------------------------------------------------

    def resource(self, name: str) -> StoredResource | None:
        """A resource, or None."""
        row = self._connection.execute(sa.select(RESOURCES).where(RESOURCES.c.name == name)).first()
        return None if row is None else _stored(row)

    def resources(self) -> list[tuple[str, int]]:
        """Name and serial of every resource."""
        rows = self._connection.execute(sa.select(RESOURCES.c.name, RESOURCES.c.serial).order_by(RESOURCES.c.name))
        return [(name, serial) for name, serial in rows]

    def put_resource(self, resource: StoredResource) -> None:
        """Keep a resource in place of an older one."""
        values = {
            "serial": resource.serial,
            "key_id": resource.key_id,
            "wrapped_key": resource.wrapped_key,
            "sealed": resource.sealed,
        }
        changed = self._connection.execute(
            sa.update(RESOURCES).where(RESOURCES.c.name == resource.name).values(**values)
        )
        if changed.rowcount == 0:
            self._connection.execute(sa.insert(RESOURCES).values(name=resource.name, **values))

    def resources_under_others(self, key_id: str, after: str, limit: int) -> list[StoredResource]:
        """The next resources by name, after one, whose keys are under another KEK than this."""
        rows = self._connection.execute(
            sa.select(RESOURCES)
            .where(RESOURCES.c.key_id != key_id, RESOURCES.c.name > after)
            .order_by(RESOURCES.c.name)
            .limit(limit)
        )
        return [_stored(row) for row in rows]

    def count_by_kek(self) -> dict[str, int]:
        """How many resources are under each KEK."""
        rows = self._connection.execute(
            sa.select(RESOURCES.c.key_id, sa.func.count()).group_by(RESOURCES.c.key_id).order_by(RESOURCES.c.key_id)
        )
        return {key_id: int(count) for key_id, count in rows}

    def replace_resource(self, old: StoredResource, new: StoredResource) -> int:
        """Keep `new` in place of exactly `old`; return 1, or 0 if that is not what there is any more."""
        changed = self._connection.execute(
            sa.update(RESOURCES)
            .where(
                RESOURCES.c.name == old.name,
                RESOURCES.c.serial == old.serial,
                RESOURCES.c.key_id == old.key_id,
                RESOURCES.c.wrapped_key == old.wrapped_key,
            )
            .values(key_id=new.key_id, wrapped_key=new.wrapped_key)
        )
        return int(changed.rowcount)

    def drop_resource(self, name: str) -> None:
        """Forget a resource, if it is there."""
        self._connection.execute(sa.delete(RESOURCES).where(RESOURCES.c.name == name))

    def generations(self, resource: str) -> list[int]:
        """Of which generations a share of this resource is here (attestation.split.kept_as)."""
        prefix = f"{resource}#"
        start = sa.func.substr(RESOURCES.c.name, 1, len(prefix))
        names = self._connection.execute(sa.select(RESOURCES.c.name).where(start == prefix)).scalars()
        return sorted(int(name.removeprefix(prefix)) for name in names)

    # --- within -----------------------------------------------------------------------------------------------------

    def set_head(self, head: Head) -> None:
        """Keep the head of this commit (the writer's)."""
        self._set_meta("head_size", str(head.size))
        self._set_meta("checkpoint", head.checkpoint)

    def publish(self, head: Head | None) -> None:
        """Keep a cosigned head, unless there is a newer one; None: heads are not cosigned any more."""
        if head is None:
            self._connection.execute(sa.delete(META).where(META.c.key.in_(("cosigned_size", "cosigned"))))
        elif head.size >= int(self._meta("cosigned_size") or 0):
            self._set_meta("cosigned_size", str(head.size))
            self._set_meta("cosigned", head.checkpoint)

    def _put_blob(self, digest: str, content: bytes) -> None:
        if sha256(content).hexdigest() != digest:
            raise Unusable("a blob is not what its digest says", where=digest, do="Name blobs by their SHA-256.")
        if self._connection.execute(sa.select(BLOBS.c.sha256).where(BLOBS.c.sha256 == digest)).first() is None:
            self._connection.execute(sa.insert(BLOBS).values(sha256=digest, content=content))

    def followed(self) -> str | None:
        """The charter that the ledger named last, as `follow` was told."""
        return self._meta("followed")

    def follow(self, charter: str) -> None:
        """Remember which charter the entry just appended names."""
        self._set_meta("followed", charter)

    def origin(self) -> str | None:
        """Whose ledger this is."""
        return self._meta("origin")

    def set_origin(self, origin: str) -> None:
        """Begin a ledger."""
        self._set_meta("origin", origin)

    def signing_key(self) -> str | None:
        """Which key signs the ledger's head (attestation.broker.storage.key_name); None: the broker's first."""
        return self._meta("signing_key")

    def set_signing_key(self, name: str) -> None:
        """Have another key sign the ledger's head, from this commit on."""
        self._set_meta("signing_key", name)

    def _meta(self, key: str) -> str | None:
        return self._connection.execute(sa.select(META.c.value).where(META.c.key == key)).scalar()

    def _set_meta(self, key: str, value: str) -> None:
        changed = self._connection.execute(sa.update(META).where(META.c.key == key).values(value=value))
        if changed.rowcount == 0:
            self._connection.execute(sa.insert(META).values(key=key, value=value))


def _stored(row: sa.Row[tuple[str, int, str, bytes, bytes]]) -> StoredResource:
    return StoredResource(row.name, row.serial, row.key_id, bytes(row.wrapped_key), bytes(row.sealed))
