"""What the workflow engine writes down, as JSON: nothing it reads back can run code."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from dbos import Serializer

from shared.errors import ERRORS, FieldViolation, Internal, InvalidRequest, OviError

_ERROR_KEY = "__error__"
_BY_REASON = {error.reason: error for error in ERRORS}


class JsonSerializer(Serializer):
    """JSON values, and errors by the reason they have in `shared.errors`."""

    def name(self) -> str:
        """Kept beside every value, so that a later format can be told apart."""
        return "ovi_json"

    def serialize(self, data: Any) -> str:
        """The text of a value.

        Raises:
            TypeError: something that is neither JSON nor an error.
        """
        return json.dumps(_error_to_json(data) if isinstance(data, Exception) else data)

    def deserialize(self, serialized_data: str) -> Any:
        """The value of a text.

        Raises:
            ValueError: not JSON.
        """
        value = json.loads(serialized_data)
        if isinstance(value, dict) and _ERROR_KEY in value:
            return _error_from_json(value[_ERROR_KEY])
        return value


def _error_to_json(error: Exception) -> dict[str, Any]:
    if not isinstance(error, OviError):
        error = Internal(f"{type(error).__name__}: {error}")
    violations = [asdict(v) for v in error.violations] if isinstance(error, InvalidRequest) else []
    return {_ERROR_KEY: {"reason": error.reason, "message": error.message, "violations": violations}}


def _error_from_json(value: dict[str, Any]) -> OviError:
    kind = _BY_REASON.get(value["reason"], Internal)
    if issubclass(kind, InvalidRequest):
        return InvalidRequest([FieldViolation(**violation) for violation in value["violations"]])
    return kind(value["message"])
