"""Evidence and verdicts for people: tables on a terminal, plain text in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attestation.verifier.appraisal import Appraisal

_STYLES = {"affirming": "bold green", "warning": "bold yellow", "contraindicated": "bold red", "none": "bold red"}
_MARKS = {"affirming": "✔", "warning": "!", "contraindicated": "✘", "none": "✘"}

_POLICY = {
    "smt": "hyper-threads allowed",
    "migrate_ma": "migration agent allowed",
    "debug": "host may debug: read and write memory",
    "single_socket": "one socket only",
    "cxl_allow": "memory on CXL devices allowed",
    "mem_aes_256_xts": "AES-256-XTS required",
    "rapl_dis": "power meters must be off",
    "ciphertext_hiding_dram": "ciphertext must be hidden",
    "page_swap_disable": "page moves and swaps forbidden",
}
_PLATFORM = {
    "smt": "hyper-threads on",
    "tsme": "transparent memory encryption on",
    "ecc": "error-correcting memory",
    "rapl_dis": "power meters off",
    "ciphertext_hiding_dram": "ciphertext hidden",
    "alias_check": "memory checked for aliases (BadRAM)",
    "iommu_write_safe": "bit 6 (IOMMU write-safe)",
    "tio": "trusted I/O on",
}
_KEY = {"author_key_en": "author key enabled", "mask_chip_key": "chip key masked: no signature"}


_NOT_AUTHENTIC = 99  # AR4SI: the evidence's own signature or chain does not hold

_LACKING = {
    "freshness": "no --nonce or --report-data",
    "measurement": "no reference values",
    "init-data": "no reference values",
    "revocation": "no --crl",
    "gpu-freshness": "no --nonce",
    "gpu-driver-measurements": "no matching --rim",
    "gpu-vbios-measurements": "no matching --rim",
    "gpu-devtools": "no matching --rim",
    "gpu-revocation": "no --crl",
    "gpu-topology": "one device alone",
}


def print_claims(claims: Mapping[str, Any], source: str, *, console: Console | None = None) -> None:
    """Print every field of a report, decoded, group by group."""
    out = console or Console(highlight=False)
    world = claims["platform"]
    title = Text.assemble(
        ("SEV-SNP report ", "bold"), (str(claims["version"]), "bold"), f"  {claims['product'] or 'unknown product'}  "
    )
    title.append(str(world), style="bold magenta" if world == "virtual" else "")
    title.append(f"  {source}", style="dim")
    out.print(title)
    for heading, rows in _groups(claims):
        out.print(Text(f"\n{heading}", style="bold"))
        out.print(Padding(_grid(rows), (0, 0, 0, 2)))
    out.print(Text("\nNot verified. `seal evidence verify` proves who signed it, and judges it.", style="dim"))


def print_appraisal(
    appraisal: Appraisal,
    source: str,
    at: datetime,
    *,
    about: Sequence[tuple[str, str]] | None = None,
    console: Console | None = None,
) -> None:
    """Print a verdict: what failed and why, what was not judged, and the few claims that tell the machine apart.

    `about` takes the place of those claims for evidence of another kind than SEV-SNP's.
    """
    out = console or Console(highlight=False)
    style = _STYLES[appraisal.status]
    verdict = Text(f"{_MARKS[appraisal.status]} {appraisal.status}", style=style)
    if appraisal.claims.get("platform") == "virtual":
        verdict.append(" (virtual platform)", style="bold magenta")
    out.print(verdict.append(f"  {source}", style="not bold default"))
    if appraisal.failures:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("check", style="red" if appraisal.status != "warning" else "yellow", no_wrap=True)
        table.add_column("found", overflow="fold")
        table.add_column("expected", overflow="fold")
        for failure in appraisal.failures:
            table.add_row(failure.check, failure.value, failure.expected)
        out.print(Padding(table, (1, 0, 0, 2)))
    if _NOT_AUTHENTIC in appraisal.vector.values() or appraisal.status == "none":
        out.print(Text("\n  Nobody vouches for what follows: it is what the evidence says of itself.", style="yellow"))
    rows = [*(_machine_summary(appraisal.claims) if about is None else about), *_judgement(appraisal, at)]
    out.print(Padding(_grid(rows), (1, 0, 0, 2)))


def _grid(rows: Iterable[tuple[str, str | Text]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True, min_width=22)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _machine_summary(claims: Mapping[str, Any]) -> Iterator[tuple[str, str | Text]]:
    yield "machine", _machine(claims)
    yield "firmware", f"{claims['current_firmware']}, reported TCB {_levels(claims['reported_tcb'])}"
    yield "measurement", claims["measurement"]
    if "extra_data" in claims.get("vtpm", {}):
        yield "quote's extra data", _bytes(claims["vtpm"]["extra_data"])
    else:
        yield "report data", _bytes(claims["report_data"])
    yield "host data", _bytes(claims["host_data"])


def _judgement(appraisal: Appraisal, at: datetime) -> Iterator[tuple[str, str | Text]]:
    yield "claims", _vector(appraisal.vector)
    yield "not judged", _not_judged(appraisal.not_judged)
    yield "profile", f"{appraisal.profile}, at {at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _not_judged(names: tuple[str, ...]) -> Text:
    """Those that most verdicts need first, each with what it lacks; the rest by name."""
    needed = [f"{name} ({_LACKING[name]})" for name in _LACKING if name in names]
    text = Text(", ".join(needed))
    rest = [name for name in names if name not in _LACKING]
    if rest:
        text.append(f"{'; ' if needed else ''}{', '.join(rest)}", style="dim")
    return text or Text("nothing: all was judged")


def _vector(vector: Mapping[str, int]) -> Text:
    text = Text()
    for name, value in vector.items():
        if not value:
            continue
        word, style = (
            ("affirmed", "green") if value < 32 else ("warning", "yellow") if value < 96 else ("against", "red")
        )
        text.append(f"{', ' if text else ''}{name} ")
        text.append(f"{word} ({value})", style=style)
    silent = [name for name, value in vector.items() if not value]
    if silent:
        text.append(f"{'; ' if text else ''}no word on {', '.join(silent)}", style="dim")
    return text


def _groups(claims: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[tuple[str, str | Text]]]]:
    yield "Machine", _machine_rows(claims)
    yield "Firmware", _firmware_rows(claims)
    policy, platform = claims["policy"], claims["platform_info"]
    yield f"Guest policy {policy['value']}, ABI {policy['abi_major']}.{policy['abi_minor']}", _bits(policy, _POLICY)
    yield f"Platform {platform['value']}", _bits(platform, _PLATFORM)
    yield (
        "Guest",
        [
            ("measurement", claims["measurement"]),
            ("report data", _bytes(claims["report_data"])),
            ("host data", _bytes(claims["host_data"])),
            ("VMPL", str(claims["vmpl"])),
            ("report id", claims["report_id"]),
            ("report id, agent", _bytes(claims["report_id_ma"])),
        ],
    )
    yield (
        "ID block",
        [
            ("guest SVN", str(claims["guest_svn"])),
            ("family id", _bytes(claims["family_id"])),
            ("image id", _bytes(claims["image_id"])),
            ("ID key", _bytes(claims["id_key_digest"])),
            ("author key", _bytes(claims["author_key_digest"])),
        ],
    )
    if "vtpm" in claims:
        yield "Virtual TPM (Azure)", _vtpm_rows(claims["vtpm"])


def _vtpm_rows(vtpm: Mapping[str, Any]) -> Iterator[tuple[str, str | Text]]:
    for name, value in vtpm["configuration"].items():
        yield name, {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    yield "user data", _bytes(vtpm["user_data"] or "")
    if "extra_data" not in vtpm:
        yield "quote", Text("none: not fresh", style="dim")
        return
    yield "quote's extra data", _bytes(vtpm["extra_data"])
    for number, value in vtpm["registers"].items():
        yield f"register {number}", _bytes(value)


def _firmware_rows(claims: Mapping[str, Any]) -> Iterator[tuple[str, str | Text]]:
    for name in ("current", "committed"):
        yield f"{name} firmware", claims[f"{name}_firmware"]
    for name in ("current", "committed", "reported", "launch", "certified"):
        if f"{name}_tcb" in claims:
            yield f"{name} TCB", _levels(claims[f"{name}_tcb"])
    for name in ("launch", "current"):
        if f"{name}_mit_vector" in claims:
            yield f"{name} mitigations", claims[f"{name}_mit_vector"]


def _machine_rows(claims: Mapping[str, Any]) -> Iterator[tuple[str, str | Text]]:
    yield "product", _machine(claims)
    if "cpuid" in claims:
        cpuid = claims["cpuid"]
        yield "CPUID", f"family 0x{cpuid['family']:02x}, model 0x{cpuid['model']:02x}, stepping {cpuid['stepping']}"
    yield "chip id", _bytes(claims["chip_id"])
    key = claims["key_info"]
    yield "signing key", f"{key['signing_key']}  [{key['value']}], signature algorithm {claims['signature_algo']}"
    yield from _bits(key, _KEY)
    for name, label in (("csp_id", "provider"), ("hwid", "certified chip id")):
        if name in claims:
            yield label, claims[name]


def _machine(claims: Mapping[str, Any]) -> str:
    name = claims.get("product_name")
    product = claims["product"] or "unknown product"
    return f"{product} ({name})" if name and name != product else str(product)


def _bits(word: Mapping[str, Any], meanings: Mapping[str, str]) -> list[tuple[str, str | Text]]:
    rows: list[tuple[str, str | Text]] = []
    for name, meaning in meanings.items():
        value = Text("yes  " if word[name] else "no   ", style="" if word[name] else "dim").append(meaning, style="dim")
        rows.append((name.replace("_", "-"), value))
    return rows


def _levels(tcb: Any) -> str:
    if isinstance(tcb, str):
        return tcb
    return ", ".join(f"{name} {level}" for name, level in tcb.items())


def _bytes(text: str) -> str | Text:
    """Hex, but words for the two values that mean nothing."""
    if not text.strip("0"):
        return Text("all zero", style="dim")
    if not text.strip("f"):
        return Text("all ones", style="dim")
    return text
