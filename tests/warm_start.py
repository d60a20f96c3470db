"""Processes whose imports are done: forks of one that has imported a module, and done nothing else.

Most of a service's start is the import of torch, transformers and diffusers. A test's service is a process of its own
all the same, with its own arguments, log, signals and exit status; `ovi up` and torchrun in other tests start services
from nothing. The process that is forked is `python -m tests.warm_start MODULE FD`, one for each module and environment.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

AVAILABLE = sys.platform == "linux"
_ROOT = Path(__file__).parents[1]
_MAX_MESSAGE = 1 << 16
_MAX_PARENTS = 5
"""Kept at once, some 400 MB each."""
_Key = tuple[str, frozenset[tuple[str, str]]]
_parents: dict[_Key, tuple[subprocess.Popen[bytes], socket.socket]] = {}
_lock = threading.Lock()


class WarmProcess:
    """The part of `subprocess.Popen` that tests use, for a process that somebody else has forked."""

    def __init__(self, report: TextIO, stderr: TextIO) -> None:
        """
        Args:
            report: says the process id in its first line and the exit status in its second.
            stderr: what the process writes there.
        """
        first = report.readline()
        assert first, "its imports failed, see the output"
        self.pid = int(first)
        self.stderr = stderr
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._read_status, args=(report,), daemon=True).start()

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, -N after signal N.

        Raises:
            subprocess.TimeoutExpired: it still runs after that many seconds.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing happens if the process has ended."""
        if self.returncode is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                self._ended.wait()

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def _read_status(self, report: TextIO) -> None:
        with report:
            self.returncode = int(report.readline())
        self._ended.set()


def start_warm(module: str, arguments: list[str], environment: Mapping[str, str]) -> WarmProcess:
    """Run `python -m MODULE ARGUMENTS` from the repository's root, its imports done.

    Args:
        module: a package with a `__main__`, or a module that is run.
        arguments: of the module.
        environment: all of the process's.
    """
    stderr_read, stderr_write = os.pipe()
    report_read, report_write = os.pipe()
    try:
        socket.send_fds(_parent(module, environment), [json.dumps(arguments).encode()], [stderr_write, report_write])
    finally:
        os.close(stderr_write)
        os.close(report_write)
    return WarmProcess(os.fdopen(report_read), os.fdopen(stderr_read))


def _parent(module: str, environment: Mapping[str, str]) -> socket.socket:
    # pytest writes the name of the present test there.
    kept = {key: value for key, value in environment.items() if key != "PYTEST_CURRENT_TEST"}
    key = (module, frozenset(kept.items()))
    with _lock:
        if key not in _parents or _parents[key][0].poll() is not None:
            if len(_parents) >= _MAX_PARENTS:
                process, requests = _parents.pop(next(iter(_parents)))
                requests.close()  # at which it ends
                process.wait()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, "-m", "tests.warm_start", module, str(theirs.fileno())]
                _parents[key] = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=kept, cwd=_ROOT), ours
        return _parents[key][1]


def _become_asked_for(requests: socket.socket) -> list[str] | None:
    """Fork for every request; returns its arguments in the new process, and None in this one when nobody asks."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, *_ = socket.recv_fds(requests, _MAX_MESSAGE, 2)
        if not message:
            return None
        stderr, report = files
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            pid = os.fork()
            if pid:
                _report_end(pid, stderr, report)
            os.close(report)
            os.dup2(stderr, 2)
            os.close(stderr)
            arguments: list[str] = json.loads(message)
            return arguments
        os.close(stderr)
        os.close(report)


def _report_end(pid: int, stderr: int, report: int) -> None:
    os.close(stderr)
    os.write(report, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def main() -> None:
    """Import, then fork whenever asked to."""
    module, requests = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    target = f"{module}.__main__" if hasattr(importlib.import_module(module), "__path__") else module
    importlib.import_module(target)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, f"{module}: threads that an import starts do not fork"
    # It is run anew, as `python -m` does; what it imports stays.
    del sys.modules[target]
    gc.freeze()
    arguments = _become_asked_for(requests)
    if arguments is not None:
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
