"""`seal evidence`: show what evidence says, and verify it offline."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from appliance.evidence_files import read_evidence, read_profile_file
from appliance.gpu_evidence import GpuFiles, appraise_gpu, gpu_claims, gpu_summary, is_gpu_file, print_gpu_claims
from appliance.output import print_json
from policies.errors import Unusable

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Show and verify attestation evidence.")

ReportFile = Annotated[
    Path, typer.Argument(metavar="REPORT", help="1184 raw bytes, an HCL report, JSON evidence, or a GPU's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
VekFile = Annotated[Path | None, typer.Option("--vek", metavar="FILE", help="The VCEK or VLEK, DER or PEM.")]
ChainPath = Annotated[
    Path | None,
    typer.Option("--chain", metavar="FILE-OR-FOLDER", help="ASK (or ASVK) and ARK, others do no harm; a GPU's chain."),
]
CrlFiles = Annotated[
    list[Path] | None,
    typer.Option("--crl", metavar="FILE", help="A revocation list (for a GPU, OCSP responses too); one per --crl."),
]
RimPaths = Annotated[
    list[Path] | None,
    typer.Option("--rim", metavar="FILE-OR-FOLDER", help="Reference manifests (RIM) of a GPU's driver and VBIOS."),
]
JwksFile = Annotated[
    Path | None,
    typer.Option("--jwks", metavar="FILE", help="The keys of NVIDIA's attestation service, for its tokens."),
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="A profile in TOML (see `seal evidence policy`).")
]
NonceHex = Annotated[
    str | None,
    typer.Option("--nonce", metavar="HEX", help="REPORT_DATA must begin with this, the rest zero; a GPU's SPDM nonce."),
]
ReportDataHex = Annotated[
    str | None, typer.Option("--report-data", metavar="HEX", help="REPORT_DATA must be this, all 64 bytes.")
]
IdBlockFiles = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--id-block", metavar="ID-BLOCK ID-AUTH", help="The ID block it must have been launched with."),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option("--cache", metavar="FOLDER", help="Take what is missing out of this cache of endorsements."),
]
AtTime = Annotated[
    str | None, typer.Option("--at", metavar="RFC3339", help="The time of verification, e.g. 2026-03-01T12:00:00Z.")
]


@app.command(
    epilog="Example: seal evidence show report.bin --vek vcek.der --chain amd-ca/",
)
def show(report: ReportFile, vek: VekFile = None, chain: ChainPath = None, as_json: AsJson = False) -> None:
    """Print every field of the evidence, decoded. Nothing is verified: for that, `seal evidence verify`."""
    from appliance.evidence_tables import print_claims
    from attestation.verifier import SHOW, Expected

    gpu = is_gpu_file(report)
    if gpu:
        claims = gpu_claims(report, chain)
    else:
        evidence = read_evidence(report, vek=vek, chain=chain, crls=())
        claims = dict(evidence.appraise(SHOW, Expected(), datetime.now(UTC)).claims)
    if as_json:
        print_json({"verified": False, "claims": claims})
    elif gpu:
        print_gpu_claims(claims)
    else:
        print_claims(claims, str(report))


@app.command(
    epilog="Example: seal evidence verify report.bin --vek vcek.der --chain amd-ca/ --nonce 00112233",
)
def verify(
    report: ReportFile,
    vek: VekFile = None,
    chain: ChainPath = None,
    crl: CrlFiles = None,
    rim: RimPaths = None,
    jwks: JwksFile = None,
    policy: PolicyFile = None,
    nonce: NonceHex = None,
    report_data: ReportDataHex = None,
    id_block: IdBlockFiles = None,
    cache: CacheFolder = None,
    at: AtTime = None,
    as_json: AsJson = False,
) -> None:
    """Verify evidence offline and list every check that fails: exit status 0 if it affirms, else 1."""
    from appliance.evidence_tables import print_appraisal
    from attestation.verifier import SHOW, Expected, load_profile

    moment = datetime.now(UTC) if at is None else _moment(at)
    data = _report_data(nonce, report_data)
    about: tuple[tuple[str, str], ...] | None = None
    if is_gpu_file(report):
        asked = report_data or nonce
        given = None if asked is None else _hex(asked, "--nonce", 32, 64)
        files = GpuFiles(chain, tuple(crl or ()), tuple(rim or ()), jwks)
        appraisal = appraise_gpu(report, files, policy, given, moment)
        about = tuple(gpu_summary(appraisal))
    else:
        profile = SHOW if policy is None else read_profile_file(policy, load_profile)
        expected = Expected(report_data=data, id_block=_id_block(id_block))
        evidence = read_evidence(report, vek=vek, chain=chain, crls=crl or (), cache=cache)
        appraisal = evidence.appraise(profile, expected, moment)
    if as_json:
        print_json(appraisal.to_json())
    else:
        print_appraisal(appraisal, str(report), moment, about=about)
    raise typer.Exit(0 if appraisal.affirming else 1)


@app.command(epilog="Example: seal evidence preload endorsements.tar.gz --cache /var/cache/sealwright/kds")
def preload(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="Folders, tar or zip archives, or single files.")
    ],
    cache: Annotated[Path, typer.Option("--cache", metavar="FOLDER", help="The cache to fill.")],
    as_json: AsJson = False,
) -> None:
    """Fill a cache of VCEKs, authorities and revocation lists, for a machine without a network."""
    from attestation.endorsements.kds_cache import KdsCache

    stored = [name for source in sources for name in KdsCache(cache).preload(source)]
    if not stored:
        raise Unusable(
            "there is no endorsement of AMD's in it", where=", ".join(map(str, sources)), do="Check what was given."
        )
    _print_stored(stored, cache, as_json)


@app.command(epilog="Example (needs a network): seal evidence fetch report.bin --cache /var/cache/sealwright/kds")
def fetch(
    report: ReportFile,
    cache: Annotated[Path, typer.Option("--cache", metavar="FOLDER", help="The cache to fill.")],
    product: Annotated[
        Literal["Milan", "Genoa", "Turin"] | None,
        typer.Option(help="The product line, for reports before version 3, which do not name it."),
    ] = None,
    service: Annotated[
        str, typer.Option("--service", metavar="URL", help="AMD's key distribution service, or a mirror of it.")
    ] = "https://kdsintf.amd.com",
    as_json: AsJson = False,
) -> None:
    """Fetch the certificates of a report's chip and its revocation list from AMD into a cache, once."""
    from attestation.endorsements.kds import KdsClient, https_fetch
    from attestation.endorsements.kds_cache import KdsCache
    from attestation.evidence.composite import SnpEvidence
    from attestation.evidence.report import Product

    evidence = SnpEvidence(read_evidence(report, vek=None, chain=None, crls=()).report)
    client = KdsClient(KdsCache(cache), https_fetch(), base=service.rstrip("/"))
    client.endorse(evidence, product=None if product is None else Product(product), revocation=True)
    stored = sorted(str(one.relative_to(cache)) for one in cache.rglob("*") if one.suffix in {".der", ".pem"})
    _print_stored(stored, cache, as_json)


def _print_stored(stored: list[str], cache: Path, as_json: bool) -> None:
    if as_json:
        print_json({"cache": str(cache), "stored": stored})
    else:
        typer.echo("\n".join(stored))


@app.command(epilog="Example: seal evidence policy --profile broker > appraisal.toml")
def policy(
    profile: Annotated[
        Literal["show", "broker", "show-gpu", "broker-gpu"],
        typer.Option(help="`show` judges the hardware; `broker` demands every judgement; `-gpu` is for GPUs."),
    ] = "show",
    section: Annotated[
        bool, typer.Option("--section", help="A GPU's profile as the section [gpu] of the charter's appraisal.toml.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a ready-made profile as commented TOML, to start one of your own from."""
    from attestation.verifier import BROKER, SHOW
    from attestation.verifier.gpu.profile import BROKER_GPU, SHOW_GPU

    ready_made = {one.name: one for one in (SHOW, BROKER, SHOW_GPU, BROKER_GPU)}
    chosen = ready_made[profile]
    if section and profile not in ("show-gpu", "broker-gpu"):
        raise Unusable("--section is for GPU profiles", where="command line", do="Add --profile broker-gpu.")
    if as_json:
        document = chosen.model_dump(by_alias=True, mode="json")
        print_json({"gpu": document} if section else document)
        return
    from attestation.verifier.gpu.profile import GpuProfile
    from attestation.verifier.gpu.profile_toml import gpu_profile_to_toml
    from attestation.verifier.profile_toml import profile_to_toml

    if isinstance(chosen, GpuProfile):
        typer.echo(gpu_profile_to_toml(chosen, section="gpu" if section else ""), nl=False)
    else:
        typer.echo(profile_to_toml(chosen), nl=False)


def _id_block(paths: tuple[Path, Path] | None) -> tuple[bytes, bytes] | None:
    from attestation.endorsements.sources import read_bounded
    from attestation.evidence.id_block import ID_AUTH_SIZE, ID_BLOCK_SIZE

    if paths is None:
        return None
    block, authentication = paths
    return (
        read_bounded(block, ID_BLOCK_SIZE, "ID block"),
        read_bounded(authentication, ID_AUTH_SIZE, "ID authentication"),
    )


def _report_data(nonce: str | None, report_data: str | None) -> bytes | None:
    """The 64 bytes asked for: all of them, or their head with the rest zero."""
    if nonce is not None and report_data is not None:
        raise Unusable(
            "--nonce and --report-data exclude each other", where="command line", do="Give all 64 bytes, or their head."
        )
    if report_data is not None:
        return _hex(report_data, "--report-data", 64, 64)
    return None if nonce is None else _hex(nonce, "--nonce", 1, 64).ljust(64, b"\0")


def _hex(text: str, option: str, least: int, most: int) -> bytes:
    digits = text.removeprefix("0x")
    if not re.fullmatch(r"([0-9a-fA-F]{2})*", digits) or not least <= len(digits) // 2 <= most:
        size = f"{most} bytes" if least == most else f"{least} to {most} bytes"
        raise Unusable(f"{option} takes {size} in hex", where="command line", do="Two digits a byte, no blanks.")
    return bytes.fromhex(digits)


def _moment(text: str) -> datetime:
    unusable = Unusable(
        f"--at {text} is no time in RFC 3339", where="command line", do="Give it like 2026-03-01T12:00:00Z."
    )
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise unusable
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise unusable from None
