"""One check that did not pass, in words that need no look at the code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed check.

    Attributes:
        check: The check's name, as in `docs/reference/checks.md` and in a profile's `[checks]`.
        value: What was found.
        expected: What would have passed.
    """

    check: str
    value: str
    expected: str

    def as_dict(self) -> dict[str, str]:
        """The three parts by name."""
        return {"check": self.check, "value": self.value, "expected": self.expected}

    def __str__(self) -> str:
        return f"{self.check}: {self.value}; expected {self.expected}"
