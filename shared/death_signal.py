"""A process that cannot outlive its parent; as a program: `python death_signal.py PARENT_PID COMMAND...`.

On Linux the kernel is asked to kill this process when the thread that started it ends, however that happens (SIGKILL
and the out-of-memory killer included); the request survives exec. A supervisor runs this program, which then becomes
the service, rather than asking between fork and exec: that keeps Python code out of a forked copy of a process with
threads. Uses the standard library only, so it starts in milliseconds without any other package in reach.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """On Linux: be killed when the thread that started this process ends. Elsewhere nothing happens.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, then become the command.

    Raises:
        SystemExit: the parent is gone already, or the kernel refuses.
    """
    parent, command = int(arguments[0]), arguments[1:]
    try:
        die_with_parent()
    except OSError as error:
        raise SystemExit(str(error)) from None
    if sys.platform == "linux" and os.getppid() != parent:
        raise SystemExit("the supervisor ended before this service began")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
