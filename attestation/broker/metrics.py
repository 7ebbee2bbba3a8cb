"""Counters for operators, in Prometheus's text format."""

from __future__ import annotations

from collections import Counter, defaultdict


class Metrics:
    """Requests by route and status, decisions by kind, and the time that requests took."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.decisions: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self.requests[route, status] += 1
        self.seconds[route] += seconds

    def decision(self, kind: str) -> None:
        """Count one decision: affirmed, released, refused, …"""
        self.decisions[kind] += 1

    def text(self, gauges: dict[str, float]) -> str:
        """Everything in the text format; `gauges` are values of this moment by name."""
        lines = ["# TYPE seal_broker_requests_total counter"]
        lines += [
            f'seal_broker_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        lines.append("# TYPE seal_broker_request_seconds_total counter")
        lines += [f'seal_broker_request_seconds_total{{route="{r}"}} {s:.6f}' for r, s in sorted(self.seconds.items())]
        lines.append("# TYPE seal_broker_decisions_total counter")
        lines += [f'seal_broker_decisions_total{{decision="{kind}"}} {n}' for kind, n in sorted(self.decisions.items())]
        for name, value in sorted(gauges.items()):
            lines += [f"# TYPE seal_broker_{name} gauge", f"seal_broker_{name} {value:g}"]
        return "\n".join(lines) + "\n"
