"""`seal job trace`: which site's copy of a model has leaked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from appliance.charter_files import read_file
from appliance.output import print_json
from policies.errors import Refused, Unusable

MAX_RECORD = 64 << 20


def trace(
    leaked: Annotated[Path, typer.Argument(metavar="MODEL", help="What has leaked (safetensors).")],
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="The job's result, as `seal job download` has written it.")
    ],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="The model key, 32 bytes, of the model's owner.")],
    false_alarms: Annotated[
        float, typer.Option(min=1e-30, max=0.1, help="With at most this probability a site is named for nothing.")
    ] = 1e-6,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Name the sites whose watermarks a leaked model has. Exit status 1 if there is none."""
    from fl.guard.watermark import trace as traced
    from fl.guard.watermark import watermark_key
    from fl.jobs.results import JOB_FILE, MODEL_FILE
    from fl.tensors import parse

    secret = read_file(key, 64)
    if len(secret) != 32:
        raise Unusable(f"a model key has 32 bytes, this one {len(secret)}", where=str(key), do="Name the model key.")
    job, sites = _job(result / JOB_FILE)
    models = [(path, path.stat().st_size if path.is_file() else 0) for path in (leaked, result / MODEL_FILE)]
    file, known = (parse(read_file(path, size), max_size=size, where=str(path)) for path, size in models)
    found = traced(file, watermark_key(secret, job), sites, known, false_alarms=false_alarms)
    named = [one for one in found if one.named]
    if as_json:
        print_json({"job": job, "named": [one.site for one in named], "sites": [asdict(one) for one in found]})
    else:
        for one in named or found[:1]:
            word = "has leaked it" if one.named else "is nearest, and is not named"
            typer.echo(f"{one.site} {word}: score {one.score:.1f}; one of no part has this with p <= {one.bound:.1e}")
    if not named:
        raise Refused(
            "no site's watermark is in this model",
            where=str(leaked),
            do="It may be another job's, or a result: results have none.",
        )


def _job(file: Path) -> tuple[str, list[str]]:
    try:
        document = json.loads(read_file(file, MAX_RECORD))
        job, sites = document["job"], sorted(document["sites"])
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable("this is no record of a job", where=str(file), do="Name a downloaded result.") from error
    if not isinstance(job, str) or not sites:
        raise Unusable("the record names no job or no sites", where=str(file), do="Name a downloaded result.")
    return job, sites
