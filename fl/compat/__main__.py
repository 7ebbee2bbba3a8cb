"""`python -m fl.compat SYSTEM SCRIPT ARGUMENTS…`: run a script with the stand-ins for a system."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from fl.compat import NotSupported, install
from policies.errors import Refused, SealwrightError


def main() -> int:
    """The script's status; 2 if it wants what is not supported, or what it asks for is unusable, 1 for a refusal."""
    system, script, *arguments = sys.argv[1:]
    path = Path(script).resolve()
    try:
        install(system)
        sys.argv = [str(path), *arguments]
        sys.path[0] = str(path.parent)
        runpy.run_path(str(path), run_name="__main__")
    except NotSupported as error:
        sys.stderr.write(f"{error.msg}\n")
        return 2
    except SealwrightError as error:
        sys.stderr.write(f"{error}\n")
        return 1 if isinstance(error, Refused) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
