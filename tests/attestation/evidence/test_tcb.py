"""TCB levels keep their product's layout and are compared part by part."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import MalformedEvidence
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb, decode_tcb, encode_tcb

level = st.integers(0, 255)
products = st.sampled_from(Product)


@given(products, level, level, level, level, level)
@settings(max_examples=100, deadline=None)
def test_levels_survive_the_bytes(product: Product, bl: int, tee: int, snp: int, microcode: int, fmc: int) -> None:
    tcb = Tcb(bl, tee, snp, microcode, fmc if product is Product.TURIN else None)
    raw = encode_tcb(tcb, product)
    assert decode_tcb(raw, product) == tcb


@given(products, st.binary(min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_bytes_are_refused_or_given_back(product: Product, raw: bytes) -> None:
    try:
        tcb = decode_tcb(raw, product)
    except MalformedEvidence:
        decode_tcb(raw, product, strict=False)
    else:
        assert encode_tcb(tcb, product) == raw


def test_the_layout_is_the_products() -> None:
    assert decode_tcb(bytes([3, 0, 0, 0, 0, 0, 8, 115]), Product.MILAN) == Tcb(3, 0, 8, 115)
    assert decode_tcb(bytes([0, 1, 0, 2, 0, 0, 0, 71]), Product.TURIN) == Tcb(1, 0, 2, 71, 0)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_tcb_has_eight_bytes(size: int) -> None:
    with pytest.raises(MalformedEvidence, match="8 bytes"):
        decode_tcb(bytes(size), Product.MILAN)


@pytest.mark.parametrize(
    ("tcb", "product"),
    [(Tcb(1, 1, 1, 1, 1), Product.MILAN), (Tcb(1, 1, 1, 1), Product.TURIN), (Tcb(256, 0, 0, 0), Product.GENOA)],
)
def test_levels_that_do_not_fit_are_refused(tcb: Tcb, product: Product) -> None:
    with pytest.raises(MalformedEvidence):
        encode_tcb(tcb, product)


def test_one_old_part_is_not_hidden_by_a_new_one() -> None:
    floor = Tcb(3, 0, 8, 115)
    assert Tcb(3, 0, 8, 115).at_least(floor)
    assert Tcb(4, 1, 9, 255).at_least(floor)
    assert not Tcb(2, 0, 8, 255).at_least(floor)
    assert not Tcb(3, 0, 7, 255).at_least(floor)


def test_an_fmc_floor_is_not_met_without_fmc() -> None:
    assert not Tcb(9, 9, 9, 9).at_least(Tcb(1, 1, 1, 1, 1))
    assert Tcb(9, 9, 9, 9).at_least(Tcb(1, 1, 1, 1, 0))
    assert Tcb(9, 9, 9, 9, 2).at_least(Tcb(1, 1, 1, 1, 1))


def test_levels_are_named_for_people() -> None:
    assert str(Tcb(1, 0, 2, 71, 0)) == "fmc 0, bootloader 1, tee 0, snp 2, microcode 71"
    assert Tcb(3, 0, 8, 115).as_dict() == {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}
