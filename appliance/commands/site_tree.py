"""`seal site tree`: the guests of a tree of gateways, as the plan of a deployment has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from appliance.output import print_json
from policies.errors import Unusable

INNER_PORT: Final = 8444
GATEWAY_PORT: Final = 8445
"""Those that the FL image lets through for them (`cvm_image/recipes/fl.toml`)."""
MAX_NODES: Final = 2000


def tree(
    depth: Annotated[int, typer.Option("--depth", min=1, max=6, help="Levels below the server; the last: gateways.")],
    width: Annotated[int, typer.Option("--width", min=1, max=100, help="Children of each node.")],
    server: Annotated[str, typer.Option("--server", help="The server that is the root, a guest of the plan.")],
    member: Annotated[str, typer.Option("--member", help="The member on whose hosts the nodes run.")],
    image: Annotated[str, typer.Option("--image", help="The nodes' image in the plan.")],
    domain: Annotated[str, typer.Option("--domain", help="Nodes are reached at NAME.DOMAIN.")],
    group_key: Annotated[
        str, typer.Option("--group-key", metavar="RESOURCE", help="The gateways' group key, a resource of the member.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Append to this file (default: print it).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the [[deployment.guests]] of a tree: inner nodes and, below them, gateways. `seal charter enrol` goes on."""
    from pydantic import ValidationError

    from appliance.kits.plan import PlannedGuest

    count = sum(width**level for level in range(1, depth + 1))
    if count > MAX_NODES:
        raise Unusable(f"that are {count} nodes, more than {MAX_NODES}", where="--depth, --width", do="Grow less.")
    rows: list[dict[str, Any]] = []
    parents = [server]
    for level in range(1, depth + 1):
        last = level == depth
        names = []
        for parent in parents:
            for number in range(1, width + 1):
                stem = "" if parent == server else parent.removeprefix("inner-") + "-"
                name = f"{'gateway' if last else 'inner'}-{stem}{number}"
                port = GATEWAY_PORT if last else INNER_PORT
                row: dict[str, Any] = {
                    "role": "gateway" if last else "inner",
                    "name": name,
                    "member": member,
                    "image": image,
                    "listen": f"0.0.0.0:{port}",
                    "address": f"{name}.{domain}:{port}",
                    "server": parent,
                }
                if last:
                    row["resources"] = {"group": group_key}
                try:
                    PlannedGuest.model_validate(row)
                except ValidationError as error:
                    first = error.errors()[0]
                    place = ".".join(map(str, first["loc"])) or name
                    raise Unusable(f"{place}: {first['msg']}", where="command line", do="See --help.") from error
                rows.append(row)
                names.append(name)
        parents = names
    text = "".join(_table(row) for row in rows)
    if out is not None:
        before = out.read_text() if out.exists() else ""
        out.write_text(before + ("" if not before or before.endswith("\n") else "\n") + text)
    if as_json:
        print_json({"guests": rows, "file": None if out is None else str(out)})
    elif out is None:
        sys.stdout.write(text)
    else:
        gateways = sum(1 for row in rows if row["role"] == "gateway")
        sys.stderr.write(f"Wrote {len(rows) - gateways} inner nodes and {gateways} gateways to {out}.\n")


def _table(row: dict[str, Any]) -> str:
    lines = ["", "[[deployment.guests]]"]
    for key, value in row.items():
        lines.append(f'{key} = {{ group = "{value["group"]}" }}' if key == "resources" else f'{key} = "{value}"')
    return "\n".join(lines) + "\n"
