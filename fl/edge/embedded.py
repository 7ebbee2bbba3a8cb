"""A whole tree in one process: what the shell does, without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fl.edge.branch import TreeBranch
from fl.edge.contract import EdgeJob, ModelVersion
from fl.edge.exchange import Gateway, InnerNode, Report, root_reply
from fl.edge.fedbuff import FedBuff, Step
from fl.tensors import Schema


@dataclass(slots=True)
class _Node:
    inner: InnerNode
    children: list[_Node | Gateway]
    reports: list[tuple[_Node | Gateway, Report]] = field(default_factory=list)
    """What the children have said and were not answered yet."""


class EmbeddedTree:
    """`depth` levels below the root, each node with `width` children; the lowest are gateways. For one thread."""

    def __init__(
        self,
        buff: FedBuff,
        job: EdgeJob,
        schema: Schema,
        *,
        depth: int,
        width: int,
        clock: Callable[[], float],
        task_digest: str = "",
        held_bytes: int = 64 << 20,
        task_seconds: float = 600.0,
        strategy: str = "balanced",
        seed: int = 0,
    ) -> None:
        self._buff = buff
        self._task_digest = task_digest
        self._generator = np.random.default_rng(seed)
        self._strategy = strategy
        self._new_branch: Callable[[str], TreeBranch] = lambda origin: TreeBranch(
            job, schema, origin, clock, held_bytes=held_bytes, task_seconds=task_seconds
        )
        self.gateways: list[Gateway] = []
        """The leaves, at which devices report."""
        self._versions: dict[int, ModelVersion] = {}
        self._show()
        self._roots = [self._grown(depth - 1, width) for _ in range(width)]

    def _grown(self, levels: int, width: int) -> _Node | Gateway:
        branch = self._branch()
        if not levels:
            made = Gateway(branch)
            self.gateways.append(made)
            return made
        inner = InnerNode(branch, self._strategy, self._generator)
        return _Node(inner, [self._grown(levels - 1, width) for _ in range(width)])

    def exchange(self) -> list[Step]:
        """One moment: every node exchanges with its parent once, from the leaves up; the steps that the root makes."""
        for node in self._roots:
            self._exchange_below(node)
            report = _of(node).report()
            reply = root_reply(self._buff, report)
            _of(node).hear(reply, self._versions)
            self._spread(node, reply.duplicates)
        steps = []
        while (step := self._buff.step()) is not None:
            steps.append(step)
        if steps:
            self._show()
            every: list[Gateway | InnerNode] = [*self.gateways, *(node.inner for node in self._nodes())]
            for one in every:
                one.branch.advance(self._alive())
                one.branch.over = self._buff.over
        return steps

    def _branch(self) -> TreeBranch:
        made = self._new_branch(self._generator.bytes(16).hex())
        made.advance(self._alive())
        return made

    def _alive(self) -> list[ModelVersion]:
        return [self._versions[version] for version in sorted(self._versions)]

    def _spread(self, node: _Node | Gateway, duplicates: Mapping[str, frozenset[bytes]]) -> None:
        """Hand the answer to a node's claims down to where they came from."""
        if isinstance(node, Gateway):
            return
        for child, report in node.reports:
            reply = node.inner.reply_to(report, duplicates)
            _of(child).hear(reply, self._versions)
            self._spread(child, reply.duplicates)

    def kill(self, number: int) -> str:
        """Kill a gateway, whose place another takes; the origin of the one that was killed."""
        gateway = self.gateways[number]
        killed = gateway.branch.origin
        gateway.branch = self._branch()
        parent = next((node.inner for node in self._nodes() if gateway in node.children), None)
        (self._buff if parent is None else parent).drop(killed)
        return killed

    def _nodes(self) -> list[_Node]:
        found = [node for node in self._roots if isinstance(node, _Node)]
        for node in found:  # it grows as it goes
            found += [child for child in node.children if isinstance(child, _Node)]
        return found

    def _exchange_below(self, node: _Node | Gateway) -> None:
        if isinstance(node, Gateway):
            return
        node.reports = []
        for child in node.children:
            self._exchange_below(child)
            report = _of(child).report()
            node.inner.take(report)
            node.reports.append((child, report))

    def _show(self) -> None:
        for version, model in self._buff.models.items():
            if version not in self._versions:
                raw = bytes(model.view)
                digest = hashlib.sha256(raw).hexdigest()
                self._versions[version] = ModelVersion(version, digest, raw, self._task_digest)
        self._versions = {version: self._versions[version] for version in self._buff.models}


def _of(node: _Node | Gateway) -> InnerNode | Gateway:
    return node if isinstance(node, Gateway) else node.inner
