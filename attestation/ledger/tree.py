"""The ledger's Merkle tree: RFC 9162 section 2.1, as functions over a reader of stored nodes.

Only the hashes of *complete* subtrees are stored: node (level, index) covers the 2^level leaves from index·2^level on.
They never change, so any root and any proof of any size is made from O(log n) of them, and appending writes few.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final

from policies.errors import Unusable

HASH_SIZE: Final = 32
EMPTY_ROOT: Final = sha256(b"").digest()

Nodes = Callable[[int, int], bytes]
"""Reads the stored hash of the complete subtree (level, index)."""


def leaf_hash(entry: bytes) -> bytes:
    """Hash of a leaf: SHA-256(0x00 || entry)."""
    return sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node: SHA-256(0x01 || left || right)."""
    return sha256(b"\x01" + left + right).digest()


def appended_nodes(size: int, leaf: bytes, nodes: Nodes) -> list[tuple[int, int, bytes]]:
    """The nodes (level, index, hash) to store when the leaf hash `leaf` is appended to a tree of `size` leaves."""
    level, index, value = 0, size, leaf
    added = [(level, index, value)]
    while index & 1:
        value = node_hash(nodes(level, index - 1), value)
        level, index = level + 1, index >> 1
        added.append((level, index, value))
    return added


def root_hash(size: int, nodes: Nodes) -> bytes:
    """Root of the tree of the first `size` leaves."""
    return _range_hash(0, size, nodes) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, nodes: Nodes) -> list[bytes]:
    """PATH(index, D[size]) of RFC 9162 section 2.1.3.1, nearest sibling first. Raises Unusable if index >= size."""
    if not 0 <= index < size:
        raise Unusable(
            f"there is no entry {index} in a tree of {size}", where="ledger", do="Ask for one below its size."
        )
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_range_hash(middle, end, nodes))
            end = middle
        else:
            path.append(_range_hash(start, middle, nodes))
            start = middle
    return path[::-1]


def consistency_proof(old: int, new: int, nodes: Nodes) -> list[bytes]:
    """PROOF(old, D[new]) of RFC 9162 section 2.1.4.1. Raises Unusable unless 0 < old <= new."""
    if not 0 < old <= new:
        raise Unusable(f"no tree of {old} precedes one of {new}", where="ledger", do="Ask with 0 < old <= new.")
    proof: list[bytes] = []
    start, end, complete = 0, new, True
    while old != end:
        middle = start + _split(end - start)
        if old <= middle:
            proof.append(_range_hash(middle, end, nodes))
            end = middle
        else:
            proof.append(_range_hash(start, middle, nodes))
            start, complete = middle, False
    if not complete:
        proof.append(_range_hash(start, end, nodes))
    return proof[::-1]


def verify_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` shows the leaf hash `leaf` at `index` of the tree of `size` with `root` (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size or any(len(step) != HASH_SIZE for step in proof):
        return False
    node, last, value = index, size - 1, leaf
    for step in proof:
        if last == 0:
            return False
        if node & 1 or node == last:
            value = node_hash(step, value)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            value = node_hash(value, step)
        node, last = node >> 1, last >> 1
    return last == 0 and hmac.compare_digest(value, root)


def verify_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether `proof` shows that the tree (new, new_root) extends the tree (old, old_root) (RFC 9162, 2.1.4.2)."""
    if not 0 < old <= new or any(len(step) != HASH_SIZE for step in proof):
        return False
    if old == new:
        return not proof and hmac.compare_digest(old_root, new_root)
    path = list(proof) if old & (old - 1) else [old_root, *proof]
    if not path:
        return False
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    first = second = path[0]
    for step in path[1:]:
        if last == 0:
            return False
        if node & 1 or node == last:
            first, second = node_hash(step, first), node_hash(step, second)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            second = node_hash(second, step)
        node, last = node >> 1, last >> 1
    return last == 0 and hmac.compare_digest(first, old_root) and hmac.compare_digest(second, new_root)


class MemoryTree:
    """A tree in memory, from its leaves: for checking a ledger that was handed over whole."""

    def __init__(self) -> None:
        self.size = 0
        self._nodes: dict[tuple[int, int], bytes] = {}

    def read(self, level: int, index: int) -> bytes:
        """The stored hash of a complete subtree: the `Nodes` reader of this tree."""
        return self._nodes[level, index]

    def append(self, entry: bytes) -> int:
        """Append an entry's bytes and return its index."""
        for level, index, value in appended_nodes(self.size, leaf_hash(entry), self.read):
            self._nodes[level, index] = value
        self.size += 1
        return self.size - 1

    def root(self, size: int | None = None) -> bytes:
        """Root of the first `size` leaves (default: all)."""
        return root_hash(self.size if size is None else size, self.read)


def _split(count: int) -> int:
    """The largest power of two smaller than `count`."""
    return 1 << (count - 1).bit_length() - 1


def _range_hash(start: int, end: int, nodes: Nodes) -> bytes:
    """Hash of the leaves [start, end), where start is a multiple of the next power of two of the count."""
    count = end - start
    if count & (count - 1) == 0:
        level = count.bit_length() - 1
        return nodes(level, start >> level)
    middle = start + _split(count)
    return node_hash(_range_hash(start, middle, nodes), _range_hash(middle, end, nodes))
