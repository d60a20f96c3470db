"""Who changed what with an administrator's rights, and who was refused: one line a call, apart from the other logs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from services.gateway.auth.caller import Action, Caller, Role
from shared.logging import get_logger

log = get_logger("audit")

_OFTEN = (Action.READ, Action.REGISTER)
"""Calls that are repeated again and again, and change nothing that matters afterwards."""


class Audit:
    """Writes the lines: to the service's log (component "audit"), and to a file if there is one."""

    def __init__(self, path: Path | None = None) -> None:
        """
        Args:
            path: of a file that is appended to; None: the log alone.

        Raises:
            OSError: it cannot be written.
        """
        self._file: IO[str] | None = None if path is None else path.open("a", encoding="utf-8")
        if path is not None:
            path.chmod(0o600)

    def call(self, caller: Caller, action: Action, what: str, address: str, outcome: str) -> None:
        """Note a call, if it is one to be noted: what administers, what an administrator's key changes, and refusals.

        Args:
            caller: whose.
            action: what kind of call.
            what: method or path; never a body.
            address: where it came from.
            outcome: "allowed", or why not.
        """
        by_administrator = caller.role is Role.ADMIN and caller.key_id and action not in _OFTEN
        if action is Action.ADMINISTER or by_administrator or outcome != "allowed":
            self.note(caller, what, address, outcome)

    def note(self, caller: Caller, what: str, address: str, outcome: str) -> None:
        """Note this in any case."""
        fields = {
            "call": what,
            "key_id": caller.key_id,
            "key_name": caller.name,
            "role": caller.role.value,
            "address": address,
            "outcome": outcome,
        }
        log.info("audit", **fields)
        if self._file is not None:
            time = datetime.now(UTC).isoformat()
            self._file.write(json.dumps({"time": time, **fields}, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
