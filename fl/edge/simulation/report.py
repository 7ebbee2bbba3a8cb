"""What came of a simulation, as a JSON document and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fl.edge.simulation.engine import Trace

WIDTH: Final = 640
HEIGHT: Final = 240
MARGIN: Final = 48
BARS: Final = 120

Points = Sequence[tuple[float, float]]


def document(trace: Trace, description: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The report as JSON values: what was asked for, what happened, version by version."""
    return {
        "description": dict(description),
        "ended": trace.ended,
        "virtual_seconds": trace.seconds,
        "devices": {"registered": trace.registered, "contributed": trace.contributed},
        "reports": dict(sorted(trace.outcomes.items())),
        "staleness": {str(tau): count for tau, count in sorted(trace.staleness.items())},
        "accuracy": {"first": trace.first_accuracy, "last": last_accuracy(trace)},
        **(more or {}),
        "versions": trace.versions,
    }


def last_accuracy(trace: Trace) -> float | None:
    """The accuracy that was measured last."""
    measured = [row["accuracy"] for row in trace.versions if row["accuracy"] is not None]
    return measured[-1] if measured else trace.first_accuracy


def page(report: Mapping[str, Any]) -> str:
    """The report as one page of HTML with its plots as SVG."""
    versions = report["versions"]
    accuracies = [(row["seconds"], row["accuracy"]) for row in versions if row["accuracy"] is not None]
    if report["accuracy"]["first"] is not None:
        accuracies.insert(0, (0.0, report["accuracy"]["first"]))
    plots = [
        _plot("Throughput", "updates in models a minute", _throughput(versions, report["virtual_seconds"])),
        _plot("Staleness", "versions behind, mean of each version", [(r["seconds"], r["staleness"]) for r in versions]),
        _plot("Accuracy", "part of the test examples", accuracies),
    ]
    rows = {
        "ended": report["ended"],
        "virtual time": f"{report['virtual_seconds']:.0f} s",
        "devices": f"{report['devices']['registered']} registered, {report['devices']['contributed']} contributed",
        "versions": str(len(versions)),
        **{f"reports {name}": str(count) for name, count in report["reports"].items()},
    }
    facts = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows.items())
    title = html.escape(f"Devices: {report['description'].get('name', '')}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>' + title + "</title><style>"
        "body{font:15px/1.4 sans-serif;margin:2em;max-width:50em}"
        "th{text-align:left;font-weight:normal;padding-right:1em}"
        "svg{display:block;margin:1em 0}text{font:12px sans-serif}</style></head><body>"
        f"<h1>{title}</h1><table>{facts}</table>{''.join(plots)}</body></html>\n"
    )


def _throughput(versions: Sequence[Mapping[str, Any]], seconds: float) -> list[tuple[float, float]]:
    """Updates a minute, in BARS stretches of the virtual time."""
    if not versions or seconds <= 0:
        return []
    width = seconds / BARS
    updates = [0.0] * BARS
    for row in versions:
        updates[min(BARS - 1, int(row["seconds"] / width))] += row["updates"]
    return [((at + 0.5) * width, count * 60 / width) for at, count in enumerate(updates)]


def _plot(title: str, unit: str, points: Points) -> str:
    """One line over virtual minutes."""
    if not points:
        return f"<h2>{html.escape(title)}</h2><p>Nothing was measured.</p>"
    end = max(x for x, _ in points) or 1.0
    low, high = min(0.0, *(y for _, y in points)), max(y for _, y in points)
    spread = (high - low) or 1.0
    across, up = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    line = " ".join(
        f"{MARGIN + x / end * across:.1f},{HEIGHT - MARGIN - (y - low) / spread * up:.1f}" for x, y in points
    )
    bottom = HEIGHT - MARGIN
    return (
        f"<h2>{html.escape(title)}</h2>"
        f'<svg role="img" aria-label="{html.escape(title)}" width="{WIDTH}" height="{HEIGHT}">'
        f'<path d="M{MARGIN} {MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="1.5"/>'
        f'<text x="{MARGIN}" y="{MARGIN - 12}">{html.escape(unit)}</text>'
        f'<text x="4" y="{MARGIN + 4}">{high:.3g}</text><text x="4" y="{bottom}">{low:.3g}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{bottom + 18}" text-anchor="end">{end / 60:.4g} min</text></svg>'
    )
