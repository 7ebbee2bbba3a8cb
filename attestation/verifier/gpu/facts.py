"""What a report says, decoded: versions, board, firmware digest, mode, neighbours. Claims, until it is verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from attestation.errors import MalformedEvidence
from attestation.evidence.gpu import opaque
from attestation.evidence.gpu.opaque import FieldType
from attestation.evidence.gpu.spdm import GpuReport

ARCHITECTURES = {"GH": "HOPPER", "GB": "BLACKWELL", "LS": "LS10"}
"""Architecture by the first letters of a chip's name."""

MAX_OPAQUE_DATA_VERSION = 1

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Facts:
    """Decoded opaque data; None where the report has no such field, or one that cannot be decoded.

    Attributes:
        driver_version: For example `550.90.07`; switches have none.
        vbios_version: VBIOS or switch BIOS, for example `96.00.9F.00.01`.
        project, project_sku, chip_sku: The board; together they name the VBIOS's manifest.
        fwid: SHA-384 of the first mutable firmware, as that firmware reports it.
        nvdec0: NVDEC0_STATUS.
        mode: FEATURE_FLAG as `spt`, `mpt`, `ppcie`; `unstated` where an older driver does not say it.
        pcie_protected: PROTECTED_PCIE_STATUS.
        switch_locked: LOCK_SWITCH_STATUS of a switch.
        neighbours: Public identifiers of the devices this one is linked to, in the form their certificates have.
        own_pdi: A switch's own public identifier.
        unknown: Types of fields that are not known here.
        problems: What could not be decoded, in words.
    """

    driver_version: str | None
    vbios_version: str | None
    project: str | None
    project_sku: str | None
    chip_sku: str | None
    fwid: bytes | None
    nvdec0: int | None
    mode: str | None
    pcie_protected: bool | None
    switch_locked: bool | None
    neighbours: frozenset[bytes] | None
    own_pdi: bytes | None
    unknown: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def board(self) -> str | None:
        """PROJECT/PROJECT_SKU/CHIP_SKU."""
        parts = (self.project, self.project_sku, self.chip_sku)
        return None if None in parts else "/".join(str(part) for part in parts)

    def as_claims(self) -> dict[str, Any]:
        """JSON-able, absent fields left out."""
        claims: dict[str, Any] = {
            "driver_version": self.driver_version,
            "vbios_version": self.vbios_version,
            "project": self.project,
            "project_sku": self.project_sku,
            "chip_sku": self.chip_sku,
            "fwid": None if self.fwid is None else self.fwid.hex(),
            "nvdec0_status": self.nvdec0,
            "mode": self.mode,
            "protected_pcie": self.pcie_protected,
            "switch_locked": self.switch_locked,
            "neighbours": None if self.neighbours is None else sorted(one.hex() for one in self.neighbours),
        }
        return {name: value for name, value in claims.items() if value is not None}


def is_switch(model: str | None) -> bool:
    """Whether this chip is an NVSwitch, whose report has no driver and other fields than a GPU's."""
    return model is not None and model.startswith("LS")


def read_facts(report: GpuReport, model: str | None) -> Facts:
    """Decode a report's opaque data for this chip; never raises, problems are listed."""
    problems: list[str] = []
    switch = is_switch(model) or (model is None and report.field(FieldType.SWITCH_GPU_PDI) is not None)

    def read(kind: FieldType, decode: Callable[[bytes], _T]) -> _T | None:
        value = report.field(kind)
        if value is None:
            return None
        try:
            return decode(value)
        except MalformedEvidence as error:
            problems.append(f"{kind.name}: {error.what}")
            return None

    version = read(FieldType.OPAQUE_DATA_VERSION, opaque.number)
    if version is not None and version > MAX_OPAQUE_DATA_VERSION:
        problems.append(f"OPAQUE_DATA_VERSION: {version} is not known here")
    known = {int(kind) for kind in FieldType}
    return Facts(
        driver_version=read(FieldType.DRIVER_VERSION, opaque.text),
        vbios_version=read(FieldType.VBIOS_VERSION, opaque.vbios_version),
        project=read(FieldType.PROJECT, opaque.text),
        project_sku=read(FieldType.PROJECT_SKU, opaque.text),
        chip_sku=read(FieldType.CHIP_SKU, opaque.text),
        fwid=read(FieldType.FWID, _digest),
        nvdec0=read(FieldType.NVDEC0_STATUS, _nvdec),
        mode=_mode(read(FieldType.FEATURE_FLAG, opaque.number), switch, problems),
        pcie_protected=read(FieldType.PROTECTED_PCIE_STATUS, _pcie),
        switch_locked=read(FieldType.LOCK_SWITCH_STATUS, _locked),
        neighbours=read(FieldType.SWITCH_GPU_PDI, _gpu_neighbours)
        if switch
        else read(FieldType.SWITCH_PDI, _switch_neighbours),
        own_pdi=read(FieldType.SWITCH_PDI, _own_pdi) if switch else None,
        unknown=tuple(field.kind for field in report.opaque if field.kind not in known),
        problems=tuple(problems),
    )


def _mode(flag: int | None, switch: bool, problems: list[str]) -> str | None:
    if flag is None:
        return None if switch else "unstated"
    mode = opaque.FEATURE_FLAGS.get(flag)
    if mode is None:
        problems.append(f"FEATURE_FLAG: {flag} is not known here")
        return None
    return mode.value


def _digest(value: bytes) -> bytes:
    if len(value) != 48:
        raise MalformedEvidence(f"{len(value)} bytes are no SHA-384", where="FWID", do="Give the report unchanged.")
    return value


def _pcie(value: bytes) -> bool:
    states = {opaque.PCIE_PROTECTED: True, opaque.PCIE_PLAIN: False}
    found = states.get(opaque.number(value))
    if found is None:
        raise MalformedEvidence(
            f"{value.hex()} is not known here", where="PROTECTED_PCIE_STATUS", do="Give the report unchanged."
        )
    return found


def _nvdec(value: bytes) -> int:
    state = opaque.number(value)
    if state not in (opaque.NVDEC_ENABLED, opaque.NVDEC_DISABLED):
        raise MalformedEvidence(
            f"{value.hex()} is not known here", where="NVDEC0_STATUS", do="Give the report unchanged."
        )
    return state


def _locked(value: bytes) -> bool:
    return opaque.number(value) == 1


def _own_pdi(value: bytes) -> bytes:
    (own,) = opaque.identifiers(value) if len(value) == opaque.PDI_SIZE else (b"",)
    if not own:
        raise MalformedEvidence("not one identifier", where="SWITCH_PDI", do="Give the report unchanged.")
    return own


def _switch_neighbours(value: bytes) -> frozenset[bytes]:
    # A GPU writes the identifiers of its switches in the other byte order than certificates and switches do.
    return frozenset(one[::-1] for one in opaque.identifiers(value)) - _NOBODY


def _gpu_neighbours(value: bytes) -> frozenset[bytes]:
    # Eight identifiers, then a map of ports, which is not looked at.
    return frozenset(opaque.identifiers(value)[:8]) - _NOBODY


_NOBODY = frozenset({bytes(opaque.PDI_SIZE), b"\xff" * opaque.PDI_SIZE})
