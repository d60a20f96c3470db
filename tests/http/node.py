"""Node programs for tests: the studio's own client, and JavaScript of the documentation."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ROOT / ".tools" / "node_modules"
WAIT_S = 60.0


def node() -> str:
    """The program; a test that cannot have it fails with what to do."""
    found = shutil.which("node")
    if found is None or not (MODULES / "socket.io-client").is_dir():
        pytest.fail(
            "node and socket.io-client are needed: install Node.js with npm, then `make socketio`", pytrace=False
        )
    return found


class StudioClient:
    """A running socket.io-client."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.seen: list[tuple[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            self._events.put((said["event"], said.get("data")))

    def emit(self, event: str, *args: Any) -> None:
        """Send an event, or do `break`: cut the connection as a network does."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"event": event, "args": args}) + "\n")
        self._process.stdin.flush()

    def wait(self, event: str, **wanted: Any) -> Any:
        """The next event of this name whose data have these values."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                name, data = self._events.get(timeout=max(0.01, deadline_s - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {event} with {wanted}; the last ones: {self.seen[-5:]}") from None
            self.seen.append((name, data))
            if name == event and all(data.get(field) == value for field, value in wanted.items()):
                return data


@contextlib.contextmanager
def studio_client(url: str, transports: str = "websocket", key: str = "") -> Iterator[StudioClient]:
    """A client that is connected."""
    command = [node(), str(ROOT / "tests/http/studio_client.mjs"), f"{MODULES}/", url, transports, key]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        client = StudioClient(process)
        client.wait("connect")
        yield client
    finally:
        process.kill()
        process.wait()
