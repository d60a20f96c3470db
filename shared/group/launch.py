"""`python -m shared.group.launch --nproc-per-node N -m MODULE FLAGS`: torchrun for ranks that are all on this host.

torchrun itself listens on every interface, in plain text, for whoever wants to be a rank. Here nothing of the group
does: the agent's store is made for it on the loopback, rank 0 serves the ranks' own store there (see `ranks`), and gloo
and NCCL are told to meet over the loopback. What GPUs say to each other is not affected.
"""

from __future__ import annotations

import os
import sys
import uuid
from datetime import timedelta

import psutil
from torch.distributed import run as torchrun

from shared.group.ranks import LOOPBACK, serve_store

_TIMEOUT = timedelta(seconds=300)


def main(arguments: list[str]) -> None:
    """Run torchrun, which does not return before its ranks have ended.

    Args:
        arguments: of torchrun, without those that say how many hosts there are and how they meet.
    """
    store = serve_store(LOOPBACK, 0, _TIMEOUT)
    interface = _loopback_interface()
    os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    # Otherwise the agent serves the ranks' store, on every interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    meeting = ["--nnodes", "1", "--local-addr", LOOPBACK, "--rdzv-backend", "c10d", "--rdzv-id", uuid.uuid4().hex]
    meeting += ["--rdzv-endpoint", f"{LOOPBACK}:{store.port}", "--rdzv-conf", "is_host=0"]
    torchrun.main([*meeting, *arguments])


def _loopback_interface() -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            return name
    raise SystemExit(f"no network interface has the address {LOOPBACK}, over which the ranks of one host meet")


if __name__ == "__main__":
    main(sys.argv[1:])
