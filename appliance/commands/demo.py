"""`seal demo`: one attested federated job and its attacks, end to end, on this machine."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.output import print_json

if TYPE_CHECKING:
    from rich.table import Table

    from appliance.demo.story import Report

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Where everything goes; what an earlier run left is replaced.")
    ] = Path("build/demo"),
    vm: Annotated[
        Path | None,
        typer.Option("--vm", metavar="IMAGE", help="Boot the guests as machines from this image (`make image`)."),
    ] = None,
    edge: Annotated[
        bool, typer.Option("--edge", help="A job of devices: a server, an inner node, a gateway, and devices.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> int:
    """Run one attested federated job and its attacks, end to end.

    Everything runs on this machine: brokers, a server and two sites as processes of their own, on virtual chips. A
    charter is founded, and everything started from signed kits, by the verbs of `seal`: OUT/commands.sh lists them.

    With --vm they are machines that QEMU emulates, which takes minutes; the attacks are then left out. With --edge the
    guests are a server, an inner node and a gateway, through which devices train; a gateway on a bare host is refused.

    Example: seal demo --out build/demo
    """
    from appliance.demo.display import Display
    from appliance.demo.story import run_demo

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    image = None if vm is None else vm.absolute()
    if edge:
        return _edge(out, image, as_json=as_json)
    report = run_demo(out.absolute(), Display(), image)
    if as_json:
        print_json(report.to_json())
    else:
        _print(report, out)
    return 0


def _edge(out: Path, image: Path | None, *, as_json: bool) -> int:
    from appliance.demo.display import Display
    from appliance.demo.edge_story import run_edge_demo

    report = run_edge_demo(out.absolute(), Display(), image)
    if as_json:
        print_json(report.to_json())
        return 0
    sys.stdout.write(
        f"\nCharter {report.charter[:16]}… on the {report.platform} platform: no hardware was involved.\n"
        f"{report.devices} devices gave {report.updates} updates; accuracy {report.accuracy:.3f}. "
        + "".join(f"Refused: {one.attack}: {'; '.join(one.reasons)}. " for one in report.attacks)
        + f"\nEverything: {out}/report.json\n"
    )
    return 0


def _print(report: Report, out: Path) -> None:
    """The end of the story as tables that a person reads."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(
        f"\nCharter {report.charter[:16]}… on the [bold]{report.platform}[/] platform: no hardware was involved.\n"
    )
    console.print(_decisions(report))
    console.print()
    if report.booted:
        console.print("The guests were booted machines; no attack was played (they are part of `seal demo`).")
    else:
        console.print(_attacks(report))
    console.print(
        f"\nAccuracy {report.accuracy:.4f} on the owner's test set; {report.pooled_accuracy:.4f} if all data had been "
        f"pooled. Everything: {out}/report.json\nCheck the story yourself, offline: "
        f"seal audit verify {out}/audit --trust {out}/root.json",
        soft_wrap=True,
    )


def _decisions(report: Report) -> Table:
    from rich.table import Table

    from appliance.demo.display import brief

    table = Table("broker", "entry", "who", "image", "measurement", "TCB", "decision", box=None, pad_edge=False)
    for row in report.decisions:
        refused = row["kind"] == "denial"
        words = f"{row['what']} {row['outcome']}" if row["what"] else row["outcome"]
        table.add_row(
            row["broker"],
            str(row["entry"]),
            row["who"],
            row["image"] or "",
            f"{row['measurement'][:12]}…" if row["measurement"] else "",
            tcb_words(row["tcb"]),
            f"[{'red' if refused else 'green'}]{brief(words)}[/]",
        )
    return table


def _attacks(report: Report) -> Table:
    from rich.table import Table

    from appliance.demo.display import brief

    table = Table("attack", "refused by", "because", box=None, pad_edge=False)
    for attack in report.attacks:
        table.add_row(attack.attack, attack.refused_by, "; ".join(brief(reason) for reason in attack.reasons))
    return table


def tcb_words(tcb: dict[str, int | None] | None) -> str:
    """A TCB in AMD's order: [FMC,] boot loader, TEE, SNP, microcode."""
    levels = [] if tcb is None else [tcb.get(part) for part in ("fmc", "bootloader", "tee", "snp", "microcode")]
    return ".".join(str(level) for level in levels if level is not None)
