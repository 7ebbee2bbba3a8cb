"""What one step may read and write of the broker's database: ledger, blobs, sessions, resources. SQLAlchemy Core.

What a step writes of ledger, blobs and sessions is kept beside the database until the batch is flushed, and is seen by
its own reads: a step that fails is forgotten without a word to the database, and a batch of many steps is a handful of
statements. Statements are built once. Resources, which change rarely, are written at once, in a savepoint of the step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from attestation.broker.schema import BLOBS, ENTRIES, META, NODES, RESOURCES, SESSIONS
from attestation.broker.sessions import Session
from attestation.ledger.entry import Entry
from attestation.ledger.receipt import Receipt
from attestation.ledger.tree import appended_nodes, consistency_proof, inclusion_proof, leaf_hash
from policies.errors import Unusable

NODES_KEPT: Final = 16_384
"""Tree nodes of the database that are kept in memory: the edge of a ledger, over and over."""
SESSIONS_KEPT: Final = 1024
"""Sessions that are kept in memory: a guest's three calls follow one another."""
K = TypeVar("K")
V = TypeVar("V")


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


class Recent(Generic[K, V]):
    """What was committed last, by its key, in memory: at most `bound` of it. Read from any thread, kept from any."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._kept: dict[K, V] = {}
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """What is kept under a key, if it still is."""
        return self._kept.get(key)

    def keep(self, values: Mapping[K, V]) -> None:
        """Keep what is committed; what was kept first is let go."""
        with self._lock:
            for key in values:
                self._kept.pop(key, None)
            self._kept.update(values)
            while len(self._kept) > self._bound:
                del self._kept[next(iter(self._kept))]


@dataclass(frozen=True, slots=True)
class Memory:
    """What one process remembers of its database: tree nodes, which never change, and, unless other processes write to
    the database too (`sole`), the sessions that it wrote last."""

    sole: bool = False
    nodes: Recent[tuple[int, int], bytes] = field(default_factory=lambda: Recent(NODES_KEPT))
    sessions: Recent[str, Session] = field(default_factory=lambda: Recent(SESSIONS_KEPT))

    def keep(self, written: Written) -> None:
        """Remember what is committed."""
        self.nodes.keep(written.nodes)
        if self.sole:
            self.sessions.keep({name: session for name, (session, _) in written.sessions.items()})


@dataclass(slots=True)
class Written:
    """What was written and is not in the database yet."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    nodes: dict[tuple[int, int], bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    sessions: dict[str, tuple[Session, str]] = field(default_factory=dict)
    """Each as it is and as it is kept: what cannot be written is found out in the step that wants it."""
    meta: dict[str, str | None] = field(default_factory=dict)

    def take(self, later: Written) -> None:
        """Put what was written later on top."""
        self.entries += later.entries
        self.nodes.update(later.nodes)
        self.blobs.update(later.blobs)
        self.sessions.update(later.sessions)
        self.meta.update(later.meta)


def _upsert(table: sa.Table, keys: tuple[str, ...], *, replace: bool) -> dict[str, Any]:
    """INSERT … ON CONFLICT, for each kind of database."""
    made: dict[str, Any] = {}
    for name, insert in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert)):
        statement: Any = insert(table).values({column.name: sa.bindparam(column.name) for column in table.columns})
        if replace:
            others = {
                column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys
            }
            made[name] = statement.on_conflict_do_update(index_elements=list(keys), set_=others)
        else:
            made[name] = statement.on_conflict_do_nothing(index_elements=list(keys))
    return made


_PUT_META: Final = _upsert(META, ("key",), replace=True)
_PUT_SESSION: Final = _upsert(SESSIONS, ("id",), replace=True)
_PUT_BLOB: Final = _upsert(BLOBS, ("sha256",), replace=False)
_ALL_META: Final = sa.select(META.c.key, META.c.value)
_DROP_META: Final = sa.delete(META).where(META.c.key == sa.bindparam("b_key"))
_NODE: Final = sa.select(NODES.c.hash).where(
    NODES.c.level == sa.bindparam("b_level"), NODES.c.position == sa.bindparam("b_position")
)
_SESSION: Final = sa.select(SESSIONS.c.state).where(SESSIONS.c.id == sa.bindparam("b_id"))
_RESOURCE: Final = sa.select(RESOURCES).where(RESOURCES.c.name == sa.bindparam("b_name"))
_ENTRY_RANGE: Final = (
    sa.select(ENTRIES.c.raw)
    .where(ENTRIES.c.number >= sa.bindparam("b_start"), ENTRIES.c.number < sa.bindparam("b_end"))
    .order_by(ENTRIES.c.number)
)
_LAST_ENTRY: Final = (
    sa.select(ENTRIES.c.raw).where(ENTRIES.c.kind == sa.bindparam("b_kind")).order_by(ENTRIES.c.number.desc()).limit(1)
)
_LAST_ABOUT: Final = _LAST_ENTRY.where(ENTRIES.c.resource == sa.bindparam("b_resource"))
_COUNT: Final = (
    sa.select(sa.func.count())
    .select_from(ENTRIES)
    .where(ENTRIES.c.kind == sa.bindparam("b_kind"), ENTRIES.c.resource == sa.bindparam("b_resource"))
)
_COUNT_GUEST: Final = _COUNT.where(ENTRIES.c.guest == sa.bindparam("b_guest"))
_COUNT_BOOT: Final = _COUNT.where(ENTRIES.c.boot == sa.bindparam("b_boot"))
_BLOB: Final = sa.select(BLOBS.c.content).where(BLOBS.c.sha256 == sa.bindparam("b_sha256"))
_INSERT_ENTRY: Final = sa.insert(ENTRIES)
_INSERT_NODE: Final = sa.insert(NODES)
_COUNT_SESSIONS: Final = sa.select(sa.func.count()).select_from(SESSIONS)
_DROP_SESSIONS: Final = sa.delete(SESSIONS).where(SESSIONS.c.expires <= sa.bindparam("b_at"))
_WIDTHS: Final = {"resource": 255, "guest": 255, "boot": 64}


class Transaction:
    """What one step may read and write. Valid only inside `Storage.transact` or `Storage.read`."""

    def __init__(self, connection: sa.Connection, memory: Memory | None = None) -> None:
        self._connection = connection
        self._memory = memory or Memory()
        self._stored: dict[str, str] | None = None
        self._batch = Written()
        self._step = Written()
        self._saved = False
        self.appended: list[int] = []

    # --- steps --------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """What is written from here on can be forgotten by `undo`."""
        self.appended = []

    def keep(self) -> None:
        """Keep what the step wrote."""
        self._batch.take(self._step)
        self._step = Written()
        if self._saved:
            self._connection.exec_driver_sql("RELEASE SAVEPOINT step")
            self._saved = False

    def undo(self) -> None:
        """Forget what the step wrote."""
        self._step = Written()
        self.appended = []
        if self._saved:
            self._connection.exec_driver_sql("ROLLBACK TO SAVEPOINT step")
            self._connection.exec_driver_sql("RELEASE SAVEPOINT step")
            self._saved = False

    def flush(self) -> Written:
        """Write everything to the database; return it, so that it may be remembered once it is committed."""
        self.keep()
        written, self._batch = self._batch, Written()
        run, kind = self._connection.execute, self._connection.dialect.name
        if written.blobs:
            rows = [{"sha256": digest, "content": content} for digest, content in sorted(written.blobs.items())]
            run(_PUT_BLOB[kind], rows)
        if written.entries:
            run(_INSERT_ENTRY, written.entries)
        if written.nodes:
            nodes = [
                {"level": level, "position": position, "hash": value}
                for (level, position), value in written.nodes.items()
            ]
            run(_INSERT_NODE, nodes)
        if written.sessions:
            sessions = [
                {"id": one.id, "expires": one.expires, "state": state} for one, state in written.sessions.values()
            ]
            run(_PUT_SESSION[kind], sessions)
        put = [{"key": key, "value": value} for key, value in written.meta.items() if value is not None]
        gone = [{"b_key": key} for key, value in written.meta.items() if value is None]
        if put:
            run(_PUT_META[kind], put)
        if gone:
            run(_DROP_META, gone)
        self._stored = None
        return written

    def _direct(self) -> sa.Connection:
        """The connection, for a write that the step does at once."""
        if not self._saved:
            self._connection.exec_driver_sql("SAVEPOINT step")
            self._saved = True
        return self._connection

    # --- ledger -----------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """How many entries the ledger has, those of this batch included."""
        value = self._meta("size")
        return int(value) if value is not None else 0

    def node(self, level: int, position: int) -> bytes:
        """A tree node: the `Nodes` reader of attestation.ledger.tree."""
        place = level, position
        found = self._step.nodes.get(place) or self._batch.nodes.get(place) or self._memory.nodes.get(place)
        if found is None:
            raw = self._connection.execute(_NODE, {"b_level": level, "b_position": position}).scalar_one()
            found = bytes(raw)
            self._memory.nodes.keep({place: found})
        return found

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
        says. `blobs` are contents by their SHA-256. Raises Unusable for texts that no database keeps.
        """
        raw, number = entry.to_bytes(), self.size()
        row = {"number": number, "kind": entry.kind, "resource": resource, "guest": guest, "boot": boot, "raw": raw}
        for name, width in _WIDTHS.items():
            _check_text(row[name], width, name)
        for digest, content in (blobs or {}).items():
            if sha256(content).hexdigest() != digest:
                raise Unusable("a blob is not what its digest says", where=digest, do="Name blobs by their SHA-256.")
            self._step.blobs[digest] = content
        self._step.entries.append(row)
        for level, position, value in appended_nodes(number, leaf_hash(raw), self.node):
            self._step.nodes[level, position] = value
        self._set_meta("size", str(number + 1))
        self.appended.append(number)
        return number

    def entry(self, number: int) -> bytes | None:
        """The bytes of an entry, or None."""
        found = self.entries(number, number + 1)
        return found[0] if found else None

    def entries(self, start: int, end: int) -> list[bytes]:
        """The bytes of the entries [start, end)."""
        rows = self._connection.execute(_ENTRY_RANGE, {"b_start": start, "b_end": end})
        return [bytes(raw) for (raw,) in rows] + [
            row["raw"] for row in self._new(lambda row: start <= row["number"] < end)
        ]

    def count(self, kind: str, *, resource: str, guest: str | None = None, boot: str | None = None) -> int:
        """How many entries of a kind the ledger has about a resource (to one guest, or in one boot)."""
        wanted = {"kind": kind, "resource": resource}
        statement = _COUNT
        if guest is not None:
            statement, wanted["guest"] = _COUNT_GUEST, guest
        if boot is not None:
            statement, wanted["boot"] = (statement if guest is not None else _COUNT_BOOT), boot
        if guest is not None and boot is not None:
            statement = statement.where(ENTRIES.c.boot == sa.bindparam("b_boot"))
        found = self._connection.execute(statement, {f"b_{name}": value for name, value in wanted.items()}).scalar_one()
        return int(found) + len(self._new(lambda row: all(row[name] == value for name, value in wanted.items())))

    def last_entry(self, kind: str) -> bytes | None:
        """The bytes of the newest entry of a kind, or None."""
        new = self._new(lambda row: row["kind"] == kind)
        raw = new[-1]["raw"] if new else self._connection.execute(_LAST_ENTRY, {"b_kind": kind}).scalar()
        return None if raw is None else bytes(raw)

    def last_about(self, kind: str, *, resource: str, boot: str | None = None) -> bytes | None:
        """The bytes of the newest entry of a kind about a resource (with this `boot`), or None."""
        wanted = {"kind": kind, "resource": resource, **({} if boot is None else {"boot": boot})}
        new = self._new(lambda row: all(row[name] == value for name, value in wanted.items()))
        if new:
            return bytes(new[-1]["raw"])
        statement = _LAST_ABOUT if boot is None else _LAST_ABOUT.where(ENTRIES.c.boot == sa.bindparam("b_boot"))
        raw = self._connection.execute(statement, {f"b_{name}": value for name, value in wanted.items()}).scalar()
        return None if raw is None else bytes(raw)

    def blob(self, digest: str) -> bytes | None:
        """A blob by its SHA-256, or None."""
        found = self._step.blobs.get(digest) or self._batch.blobs.get(digest)
        if found is None:
            found = self._connection.execute(_BLOB, {"b_sha256": digest}).scalar()
        return None if found is None else bytes(found)

    def blob_digests(self) -> list[str]:
        """The SHA-256 of every blob of the database."""
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
        found = self._step.sessions.get(identifier) or self._batch.sessions.get(identifier)
        if found is not None:
            return found[0]
        if (remembered := self._memory.sessions.get(identifier)) is not None:
            return remembered
        state = self._connection.execute(_SESSION, {"b_id": identifier}).scalar()
        return None if state is None else Session.model_validate_json(state)

    def new_session(self, session: Session) -> None:
        """Keep a new session."""
        self._step.sessions[session.id] = session, session.model_dump_json()

    def update_session(self, session: Session) -> None:
        """Keep a session's next form."""
        self._step.sessions[session.id] = session, session.model_dump_json()

    def prune_sessions(self, at: datetime) -> int:
        """Forget the sessions that have ended; return how many are left."""
        self._connection.execute(_DROP_SESSIONS, {"b_at": int(at.timestamp())})
        new = {**self._batch.sessions, **self._step.sessions}
        return int(self._connection.execute(_COUNT_SESSIONS).scalar_one()) + len(new)

    # --- resources --------------------------------------------------------------------------------------------------

    def resource(self, name: str) -> StoredResource | None:
        """A resource, or None."""
        row = self._connection.execute(_RESOURCE, {"b_name": name}).first()
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
        connection = self._direct()
        changed = connection.execute(sa.update(RESOURCES).where(RESOURCES.c.name == resource.name).values(**values))
        if changed.rowcount == 0:
            connection.execute(sa.insert(RESOURCES).values(name=resource.name, **values))

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
        changed = self._direct().execute(
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
        self._direct().execute(sa.delete(RESOURCES).where(RESOURCES.c.name == name))

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
            self._step.meta.update({"cosigned_size": None, "cosigned": None})
        elif head.size >= int(self._meta("cosigned_size") or 0):
            self._set_meta("cosigned_size", str(head.size))
            self._set_meta("cosigned", head.checkpoint)

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
        for written in (self._step.meta, self._batch.meta):
            if key in written:
                return written[key]
        if self._stored is None:
            self._stored = {row[0]: row[1] for row in self._connection.execute(_ALL_META)}
        return self._stored.get(key)

    def _set_meta(self, key: str, value: str) -> None:
        self._step.meta[key] = value

    def _new(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """The entries that are not in the database yet and are wanted, in their order."""
        return [row for written in (self._batch, self._step) for row in written.entries if wanted(row)]


def _check_text(value: Any, width: int, name: str) -> None:
    if value is None:
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        value = ""
    if len(value) > width or "\0" in value or not value:
        raise Unusable(f"an entry's {name} is no text of 1 to {width} letters", where="ledger entry", do="Name it so.")


def _stored(row: sa.Row[tuple[str, int, str, bytes, bytes]]) -> StoredResource:
    return StoredResource(row.name, row.serial, row.key_id, bytes(row.wrapped_key), bytes(row.sealed))
