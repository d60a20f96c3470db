"""Where a service's output goes: JSON lines in a file of bounded size, and the last lines in memory."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

MAX_FILE_BYTES = 8 << 20
"""A log file is set aside beyond this size."""
KEPT_FILES = 3
"""Files set aside: service.log.1 (newest) to service.log.3."""
MAX_LINE_BYTES = 64 << 10
_TAIL_LINES = 200


class ServiceLog:
    """The log of one service; over its restarts, one file."""

    def __init__(self, service: str, path: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """
        Args:
            service: put on lines that are not JSON already.
            path: of the file; appended to.
            max_file_bytes: size at which it is set aside.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path = path
        self._service = service
        self._max_file_bytes = max_file_bytes
        self._tail: deque[dict[str, object]] = deque(maxlen=_TAIL_LINES)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Write lines of `stream` until it ends; a line beyond MAX_LINE_BYTES is cut into several."""
        rest = b""
        while chunk := await stream.read(MAX_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self.write(line)
            if len(rest) >= MAX_LINE_BYTES:
                self.write(rest)
                rest = b""
        self.write(rest)

    def write(self, line: bytes) -> None:
        """Append one line; what is no JSON object (warnings of C libraries, tracebacks) is put into one."""
        if not line.strip():
            return
        entry = _parse(line)
        if entry is None:
            now = datetime.now(UTC).isoformat()
            text = line.decode(errors="replace").rstrip()
            entry = {"event": text, "service": self._service, "level": "output", "timestamp": now}
        self._tail.append(entry)
        if self._file.tell() > self._max_file_bytes:
            self._rotate()
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def last_words(self) -> str:
        """Why the service ended, for people: the reason it logged, else its last lines."""
        for entry in reversed(self._tail):
            if entry.get("level") in ("error", "critical") and "reason" in entry:
                return str(entry["reason"])
        return "\n".join(str(entry.get("event", entry)) for entry in list(self._tail)[-8:]) or "it printed nothing"

    def forget(self) -> None:
        """Empty the memory; a restarted service does not answer for its predecessor's words."""
        self._tail.clear()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        for number in range(KEPT_FILES, 0, -1):
            older = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            if older.exists():
                older.replace(self.path.with_name(f"{self.path.name}.{number}"))
        self._file = self.path.open("ab")


def _parse(line: bytes) -> dict[str, object] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
