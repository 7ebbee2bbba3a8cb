"""The tree against pymerkle (an implementation of its own) and against every changed proof."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from attestation.ledger.tree import (
    EMPTY_ROOT,
    MemoryTree,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    verify_consistency,
    verify_inclusion,
)
from policies.errors import Unusable

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33)


def tree_of(count: int) -> MemoryTree:
    tree = MemoryTree()
    for number in range(count):
        assert tree.append(b"entry %d" % number) == number
    return tree


def test_the_empty_tree_has_the_hash_of_nothing() -> None:
    assert MemoryTree().root() == EMPTY_ROOT


def test_roots_and_paths_are_pymerkles() -> None:
    theirs = InmemoryTree(algorithm="sha256")
    ours = MemoryTree()
    for number in range(70):
        theirs.append_entry(b"entry %d" % number)
        ours.append(b"entry %d" % number)
        assert ours.root() == theirs.get_root()
    for size in SIZES:
        assert ours.root(size) == theirs.get_root(size)
        for index in range(size):
            path = theirs.prove_inclusion(index + 1, size).path
            assert [leaf_hash(b"entry %d" % index), *inclusion_proof(index, size, ours.read)] == list(path)


@given(st.integers(1, 200), st.data())
@settings(max_examples=60)
def test_every_proof_verifies_and_shows_nothing_else(size: int, data: st.DataObject) -> None:
    tree = tree_of(size)
    index = data.draw(st.integers(0, size - 1))
    leaf, proof, root = leaf_hash(b"entry %d" % index), inclusion_proof(index, size, tree.read), tree.root()
    assert verify_inclusion(index, size, leaf, proof, root)
    assert not verify_inclusion(index, size, leaf_hash(b"other"), proof, root)
    assert not verify_inclusion(index, size, leaf, [*proof, bytes(32)], root)
    assert not verify_inclusion(index, size, leaf, proof, bytes(32))
    if proof:
        assert not verify_inclusion(index, size, leaf, proof[:-1], root)
        place = data.draw(st.integers(0, len(proof) - 1))
        changed = [bytes(32) if at == place else step for at, step in enumerate(proof)]
        assert not verify_inclusion(index, size, leaf, changed, root)
    other = data.draw(st.integers(0, size - 1))
    if other != index:
        assert not verify_inclusion(other, size, leaf, proof, root)


@given(st.integers(1, 200), st.data())
@settings(max_examples=60)
def test_a_tree_shows_what_it_grew_from_and_nothing_else(new: int, data: st.DataObject) -> None:
    tree = tree_of(new)
    old = data.draw(st.integers(1, new))
    proof = consistency_proof(old, new, tree.read)
    assert verify_consistency(old, new, tree.root(old), tree.root(new), proof)
    forked = MemoryTree()
    for number in range(old):
        forked.append(b"fork" if number == data.draw(st.integers(0, old - 1)) else b"entry %d" % number)
    if forked.root() != tree.root(old):
        assert not verify_consistency(old, new, forked.root(), tree.root(new), proof)
    if old != new:
        assert not verify_consistency(old, new, tree.root(old), tree.root(new), proof[:-1])
        assert not verify_consistency(old, new, tree.root(old), tree.root(new), [*proof, bytes(32)])
        assert not verify_consistency(old, new, tree.root(old), bytes(32), proof)


def test_consistency_with_pymerkles_roots() -> None:
    theirs = InmemoryTree(algorithm="sha256")
    for number in range(40):
        theirs.append_entry(b"entry %d" % number)
    ours = tree_of(40)
    for old in range(1, 40):
        proof = consistency_proof(old, 40, ours.read)
        assert verify_consistency(old, 40, theirs.get_root(old), theirs.get_root(), proof)


def test_what_is_not_there_has_no_proof() -> None:
    tree = tree_of(3)
    for index, size in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(Unusable):
            inclusion_proof(index, size, tree.read)
        assert not verify_inclusion(index, size, bytes(32), [], bytes(32))
    for old, new in ((0, 3), (3, 2), (-1, 3)):
        with pytest.raises(Unusable):
            consistency_proof(old, new, tree.read)
        assert not verify_consistency(old, new, bytes(32), bytes(32), [])
