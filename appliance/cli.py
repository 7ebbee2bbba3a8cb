"""The `seal` command: nouns are loaded only when they are named, so that each starts in a blink.

Exit status (DESIGN.md section 6): 0 done or affirmed, 1 refused or failed a check, 2 unusable input or usage.
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from appliance.output import report_error
from policies.errors import SealwrightError, Unusable

NOUNS: dict[str, str] = {
    "image": "Build, measure, sign and compare CVM images.",
    "vm": "Start a measured virtual machine.",
    "evidence": "Show and verify attestation evidence.",
    "broker": "Run a broker: appraisal, key release, credentials, ledger.",
    "secret": "Deposit and inspect a member's own resources.",
    "charter": "Found, change, sign and read a consortium's charter.",
    "site": "Prepare a site's data; list, restart and stop sites.",
    "job": "Bundle, approve, submit, watch and download federated jobs.",
    "audit": "Check a ledger, its receipts and its evidence offline.",
    "demo": "One attested federated job and its attacks, end to end.",
    "poc": "All services of production on this machine, for one author.",
    "doctor": "Tell what this machine lacks, step by step.",
}
"""Each is a module `appliance.commands.<noun>` with a Typer application (or command) named `app`."""


# Typer carries its own copy of click, or uses the one installed, by version: name click's root error by way of Typer's.
CLICK_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Nouns(TyperGroup):
    """A group that imports a noun's module when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(NOUNS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A noun as the list of nouns shows it, which needs no noun's imports."""
        return TyperCommand(cmd_name, help=NOUNS[cmd_name]) if cmd_name in NOUNS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The noun that was named, loaded."""
        name, _, rest = super().resolve_command(ctx, args)
        if name not in NOUNS:
            return name, None, rest
        module = importlib.import_module(f"appliance.commands.{name}")
        command = get_command(module.app)
        command.name = name
        return name, command, rest


app = typer.Typer(cls=Nouns, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def seal() -> None:
    """Sealwright: confidential federated AI as one appliance."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments` (default: the process's own) and exit with the contract's status."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    if arguments is None:  # the process is ours; verbs that serve have handlers of their own
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_stopped(words, "told to end", 143)))
        signal.signal(signal.SIGINT, lambda *_: sys.exit(_stopped(words, "interrupted", 130)))
    try:
        result: Any = get_command(app).main(args=words, prog_name="seal", standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(_stopped(words, "interrupted", 130))
    except CLICK_ERROR as usage:
        if type(usage).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(str(usage))
            sys.exit(2)
        words_of_it = getattr(usage, "format_message", usage.__str__)()
        unusable = Unusable(
            words_of_it.rstrip("."), where="command line", do="See `seal --help`, or --help after the verb."
        )
        sys.exit(report_error(unusable, as_json=as_json))
    except SealwrightError as error:
        sys.exit(report_error(error, as_json=as_json))
    except KeyboardInterrupt:
        sys.exit(_stopped(words, "interrupted", 130))
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:  # a file or folder that was named, mostly to be written, and that no verb spoke of itself
        unusable = Unusable(
            error.strerror or str(error) or type(error).__name__,
            where="this machine" if error.filename is None else str(error.filename),
            do="See that its folder is there, has room, and may be written.",
        )
        sys.exit(report_error(unusable, as_json=as_json))
    sys.exit(result if isinstance(result, int) else 0)


def _stopped(words: list[str], how: str, status: int) -> int:
    """Say that the command was ended from outside; the exit status is a shell's for the signal."""
    noun = next((word for word in words if word in NOUNS), "")
    verb = words[words.index(noun) + 1 : words.index(noun) + 2] if noun not in {"", "demo", "doctor", "poc"} else []
    stream = sys.__stderr__ or sys.stderr  # whatever the verb has put in its place
    stream.write(f"seal: {' '.join([noun, *verb]).strip() or 'the command'} was {how} before it was done.\n")
    return status


if __name__ == "__main__":
    main()
