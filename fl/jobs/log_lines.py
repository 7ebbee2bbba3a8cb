"""Lines of text that a script may log: forms that its bundle declares, whose numbers alone the script chooses.

A form is text with places for numbers: `epoch {int} of {int}: loss {number}`. `{int}` is a whole number of up to six
digits, `{number}` one with the significant digits that the job declares. A line that has a declared form is written
anew by it, so that so many different lines can leave and no more; any other line does not leave.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Annotated, Final

from pydantic import AfterValidator, StringConstraints

INT_CHOICES: Final = 2 * 10**6 - 1
MAX_LINE: Final = 512
_PLACE: Final = re.compile(r"\{(int|number)\}")
_INT: Final = r"(-?[0-9]{1,6})"
_NUMBER: Final = r"([-+]?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:e[-+]?[0-9]{1,3})?)"
_OF_NUMBERS: Final = re.compile(r"[-+.0-9e]")


def _form(text: str) -> str:
    literals = _PLACE.split(text)[::2]
    if any("{" in literal or "}" in literal for literal in literals):
        raise ValueError("a form's places are {int} and {number}")
    # With something else between them and around them, numbers end where they seem to: a line is read in one way.
    beside = [one for literal in literals[1:] for one in literal[:1]] + [literal[-1:] for literal in literals[:-1]]
    if any(not literal for literal in literals[1:-1]) or any(_OF_NUMBERS.fullmatch(one) for one in beside if one):
        raise ValueError("beside a form's places there is a space or another sign that no number has")
    return text


Form = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[ -~]+$"), AfterValidator(_form)]


@lru_cache(maxsize=1024)
def _pattern(form: str) -> re.Pattern[str]:
    parts = _PLACE.split(form)
    return re.compile("".join(
        re.escape(part) if at % 2 == 0 else _INT if part == "int" else _NUMBER for at, part in enumerate(parts)
    ))  # fmt: skip


def rewritten(line: str, forms: tuple[str, ...], digits: int) -> str:
    """`line` by the first form that it has. Raises ValueError if it has none, or a number of it is out of bounds."""
    from fl.jobs.outputs import rounded

    if len(line) > MAX_LINE:
        raise ValueError(f"it has more than {MAX_LINE} characters")
    for form in forms:
        found = _pattern(form).fullmatch(line)
        if found is not None:
            numbers = iter(found.groups())
            return _PLACE.sub(
                lambda place, numbers=numbers: (  # type: ignore[misc]
                    str(int(next(numbers)))
                    if place[1] == "int"
                    else f"{rounded(float(next(numbers)), digits):.{digits}g}"
                ),
                form,
            )
    raise ValueError("it has none of the declared forms")


def lines_bits(forms: tuple[str, ...], most_bytes: int, number_choices: int) -> int:
    """Bits of a round's lines: how many different sequences of lines there are in so many bytes, each with its end."""
    if not forms or not most_bytes:
        return 0
    choices, shortest = 0, MAX_LINE
    for form in forms:
        places = _PLACE.findall(form)
        choices += math.prod(INT_CHOICES if place == "int" else number_choices for place in places)
        shortest = min(shortest, len(_PLACE.sub("0", form)) + 1)
    lines = most_bytes // shortest
    return math.ceil(lines * math.log2(choices) + math.log2(lines + 1))
