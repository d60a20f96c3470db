"""A service whose ranks are started by two agents of torchrun, as on two hosts, on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.service_process import ServiceProcess, free_port

END_TIMEOUT_S = 40
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def running_on_two_hosts(
    module: str, *flags: str, ranks_per_host: int, log_dir: Path
) -> Iterator[list[ServiceProcess]]:
    """Start both agents; yields them when health says SERVING. The service listens where either one says.

    Args:
        module: run as each rank.
        flags: of the module.
        ranks_per_host: processes of each agent.
        log_dir: gets a file of each agent's and its ranks' output.
    """
    port, meeting = free_port(), free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(ranks_per_host)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{meeting}", "--rdzv-id", "test"]
    command += ["--local-addr", "127.0.0.1", "--max-restarts", "5", "--monitor-interval", "0.2"]
    command += ["-m", module, "--port", str(port), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    hosts = []
    with contextlib.ExitStack() as files:
        for index in range(2):
            log = files.enter_context((log_dir / f"host{index}.log").open("w"))
            process = subprocess.Popen(command, stderr=log, stdout=log, text=True, env=environment, cwd=ROOT)
            hosts.append(ServiceProcess(process, f"127.0.0.1:{port}"))
        try:
            hosts[0].wait_serving()
            yield hosts
        finally:
            processes = [psutil.Process(host.process.pid) for host in hosts]
            processes += [rank for process in processes for rank in process.children(recursive=True)]
            for host in hosts:
                host.process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
            for process in alive:
                process.kill()
