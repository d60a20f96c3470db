"""Becomes a service that cannot outlive its supervisor: `python child.py SUPERVISOR_PID COMMAND...`.

On Linux the kernel is asked to kill this process when the supervisor's thread that started it ends, however that
happens (SIGKILL and the out-of-memory killer included); the request survives exec. Doing this here, in a program of
its own, rather than between fork and exec of the supervisor, keeps Python code out of a forked copy of a process with
threads. Elsewhere than on Linux the command is run as it is. Uses the standard library only, so it starts in
milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to the supervisor, then become the command.

    Raises:
        SystemExit: the supervisor is gone already, or the kernel refuses.
    """
    supervisor, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise SystemExit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
        if os.getppid() != supervisor:
            raise SystemExit("the supervisor ended before this service began")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
