"""Reading loosely typed fields of strangers: every violation is collected, and each names its field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from shared.errors import FieldViolation, InvalidRequest

T = TypeVar("T")

_SHOWN = 80
"""Characters of a wrong value that are said back."""


class FieldReader:
    """The fields of one request. Numbers may come as text, since forms have nothing else; null means absent."""

    def __init__(self, fields: Mapping[str, Any], *, prefix: str = "") -> None:
        """
        Args:
            fields: name to value.
            prefix: put before names in violations.
        """
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._prefix = prefix
        self.violations: list[FieldViolation] = []

    def wrong(self, name: str, description: str) -> None:
        """Note a violation."""
        self.violations.append(FieldViolation(self._prefix + name, description))

    def check(self) -> None:
        """
        Raises:
            InvalidRequest: there were violations.
        """
        if self.violations:
            raise InvalidRequest(self.violations)

    def only(self, names: Mapping[str, Any] | set[str]) -> None:
        """Note every field that is not among the names."""
        for name in self._fields.keys() - set(names):
            self.wrong(name[:_SHOWN], f"is unknown, allowed are {', '.join(sorted(names))}")

    def raw(self, name: str) -> Any:
        """The value as it came; None if it is absent."""
        return self._fields.get(name)

    def text(self, name: str, *, required: bool = False) -> str | None:
        """A text; None if it is absent or none."""
        value = self._fields.get(name)
        if value is None:
            if required:
                self.wrong(name, "is missing")
            return None
        if not isinstance(value, str):
            self._not(name, value, "a text")
            return None
        try:
            value.encode()
        except UnicodeEncodeError:
            self._not(name, value, "text without lone surrogates")
            return None
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number of a range; None if it is absent or none."""
        value = self._number(name, f"a whole number from {low} to {high}")
        if value is None:
            return None
        if not value.is_integer() or not low <= value <= high:
            self._not(name, self._fields[name], f"a whole number from {low} to {high}")
            return None
        return int(value)

    def number(self, name: str) -> float | None:
        """A finite number; None if it is absent or none."""
        return self._number(name, "a number")

    def choice(self, name: str, choices: Mapping[str, T]) -> T | None:
        """What a word stands for; None if it is absent or unknown."""
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or value not in choices:
            self._not(name, value, f"one of {', '.join(choices)}")
            return None
        return choices[value]

    def truth(self, name: str) -> bool | None:
        """True or false; None if it is absent or neither."""
        value = self._fields.get(name)
        if isinstance(value, str) and value in ("true", "false"):
            return value == "true"
        if value is None or isinstance(value, bool):
            return value
        self._not(name, value, "true or false")
        return None

    def _number(self, name: str, allowed: str) -> float | None:
        value = self._fields.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            self._not(name, value, allowed)
            return None
        try:
            number = float(value)
        except (ValueError, OverflowError):
            self._not(name, value, allowed)
            return None
        if not math.isfinite(number):
            self._not(name, value, allowed)
            return None
        return number

    def _not(self, name: str, value: Any, allowed: str) -> None:
        self.wrong(name, f"got {str(value)[:_SHOWN]!r}, allowed is {allowed}")
