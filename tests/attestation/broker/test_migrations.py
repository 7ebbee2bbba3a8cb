"""A database of the first schema comes to today's with all that it held; until then it is refused, and in one step."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from postgres_server import PASSWORD

from appliance.cli import main
from attestation.broker import migrations
from attestation.broker.config import create_broker
from attestation.broker.database import Database, open_database, reading, writing
from attestation.broker.schema import METADATA, REVISION, VERSION, make_schema
from attestation.broker.storage import StoredResource, open_storage
from attestation.broker.transaction import Head, Transaction
from attestation.ledger.checkpoint import Checkpoint, sign_checkpoint
from attestation.ledger.entry import Entry
from attestation.ledger.tree import root_hash
from policies.errors import Unusable
from policies.keys import load_private_key

if TYPE_CHECKING:
    from postgres_server import PostgresServer

KEY = Ed25519PrivateKey.generate()
ORIGIN = "virtual.trial/broker/one/ledger"
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)
RESOURCE = StoredResource("a/b/c", 7, "file:0123456789abcdef", b"w", b"s")


def fill_first_schema(database: Database) -> None:
    """A broker's database as the first schema had it, with a ledger of five entries and a resource."""
    with writing(database) as connection:
        VERSION.create(connection)
        migrations.upgrade(connection, "0001")
        VERSION.drop(connection)
        connection.execute(sa.text("INSERT INTO meta VALUES ('schema', '1')"))
        step = Transaction(connection)
        step.set_origin(ORIGIN)
        for number in range(5):
            step.append(Entry("release", AT, {"n": number}), resource="a/b/c", guest="site/one", boot=f"0{number}")
        step.put_resource(RESOURCE)
        size = step.size()
        step.set_head(Head(size, sign_checkpoint(Checkpoint(ORIGIN, size, root_hash(size, step.node)), KEY)))
        step.flush()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Database]]:
    """An empty database of each kind, and its URL."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/state/broker.sqlite"
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        name = "".join(letter for letter in request.node.name if letter.isalnum())[-40:].lower()
        url = server.create(name)
    opened = open_database(url, password=PASSWORD)
    yield url, opened
    opened.dispose()


def test_the_first_schema_is_refused_then_migrated_with_all_that_it_holds(database: tuple[str, Database]) -> None:
    url, opened = database
    fill_first_schema(opened)
    with pytest.raises(Unusable, match="older schema 0001") as refused:
        open_storage(url, ORIGIN, KEY, password=PASSWORD)
    assert "seal broker migrate" in refused.value.do
    assert migrations.migrate(opened) == ("0001", REVISION)
    assert migrations.migrate(opened) == (REVISION, REVISION)
    storage = open_storage(url, ORIGIN, KEY, password=PASSWORD)
    assert storage.read(lambda step: step.resource("a/b/c")) == RESOURCE
    assert storage.read(lambda step: step.count("release", resource="a/b/c", boot="03")) == 1
    assert storage.transact_now(lambda step: step.append(Entry("job", AT, {})))[0] == 5
    storage.close()


def test_migrations_make_the_schema_of_the_code(database: tuple[str, Database]) -> None:
    _, opened = database
    with writing(opened) as connection:
        VERSION.create(connection)
        migrations.upgrade(connection)
    with reading(opened) as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), METADATA) == []
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_current_head() == REVISION


def test_a_migration_that_fails_leaves_everything_as_it_was(
    database: tuple[str, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, opened = database
    fill_first_schema(opened)

    def upgrade_and_die(connection: sa.Connection, revision: str = "head") -> None:
        real(connection, revision)
        raise Unusable("the disk is full, let us say", where="database", do="Make room.")

    real: Callable[..., None] = migrations.upgrade
    monkeypatch.setattr(migrations, "upgrade", upgrade_and_die)
    with pytest.raises(Unusable, match="disk is full"):
        migrations.migrate(opened)
    monkeypatch.undo()
    with reading(opened) as connection:
        assert not sa.inspect(connection).has_table(VERSION.name)
        assert {index["name"] for index in sa.inspect(connection).get_indexes("entries")} == {"entries_by_resource"}
        assert Transaction(connection).size() == 5
    assert migrations.migrate(opened) == ("0001", REVISION)


def test_a_newer_schema_and_a_foreign_database_are_refused(database: tuple[str, Database]) -> None:
    url, opened = database
    with pytest.raises(Unusable, match="no broker's database"):
        migrations.migrate(opened)
    with writing(opened) as connection:
        make_schema(connection)
        connection.execute(sa.update(VERSION).values(version_num="9999"))
    with pytest.raises(Unusable, match="newer schema 9999"):
        migrations.migrate(opened)
    with pytest.raises(Unusable, match="newer schema 9999"):
        open_storage(url, ORIGIN, KEY, password=PASSWORD)


def test_the_command_migrates_a_folder_and_an_older_copy_comes_back_migrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seal(*words: str | Path) -> tuple[int, Any]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out)

    folder = tmp_path / "one"
    create_broker(folder, name="one", member="m", url="https://127.0.0.1:1", listen="127.0.0.1:1", at=AT)
    monkeypatch.setattr(sys.modules[__name__], "KEY", load_private_key(folder / "keys/signing.pem"))

    file = folder / "state/broker.sqlite"
    old = open_database(f"sqlite:///{file}")
    fill_first_schema(old)
    old.dispose()
    assert seal("broker", "backup", folder, tmp_path / "copy")[1]["entries"] == 5
    assert seal("broker", "migrate", folder) == (0, {"from": "0001", "to": REVISION})
    assert seal("broker", "migrate", folder) == (0, {"from": REVISION, "to": REVISION})
    file.unlink()
    status, found = seal("broker", "restore", folder, tmp_path / "copy")
    assert (status, found["entries"], found["last"]) == (0, 5, "2026-01-31T12:00:00Z")
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(REVISION,)]
