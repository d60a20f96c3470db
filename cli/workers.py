"""`ovi workers`: the workers of the stages, as a gateway sees them."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli import flags
from cli.client import GatewayClient, run_with_client
from cli.errors import errors_in_words
from cli.words import as_dict, size_text
from ovi.common.v1 import system_pb2 as pb
from shared.system_proto import vram_mode_from_proto

_STATE_STYLES = {
    pb.WORKER_STATE_SERVING: "green",
    pb.WORKER_STATE_NOT_SERVING: "yellow",
    pb.WORKER_STATE_UNREACHABLE: "red",
}


def workers(
    stage: Annotated[str, typer.Option(help="Only those of text_encoder, fusion or vae.", show_default=False)] = "",
    server: flags.Server = flags.DEFAULT_SERVER,
    as_json: flags.Json = False,
) -> None:
    """Where the workers are, what they have loaded, and how much waits there."""
    with errors_in_words():
        found = [one for one in run_with_client(server, GatewayClient.workers) if stage in ("", one.stage)]
        if as_json:
            for worker in found:
                typer.echo(json.dumps(as_dict(worker), ensure_ascii=False))
            return
        table = Table(box=None, header_style="dim", pad_edge=False)
        for heading in ("stage", "address", "state", "loaded", "waiting or at work", "free memory", ""):
            table.add_column(heading, no_wrap=bool(heading))
        for worker in found:
            table.add_row(
                worker.stage,
                worker.address,
                Text(_state_word(worker), style=_STATE_STYLES.get(worker.state, "")),
                _loaded(worker),
                str(worker.num_pending),
                f"{size_text(worker.free_bytes)} of {size_text(worker.total_bytes)}" if worker.total_bytes else "",
                Text(worker.reason),
            )
        Console().print(table if found else "No workers.")


def _state_word(worker: pb.Worker) -> str:
    if worker.state == pb.WORKER_STATE_UNSPECIFIED:
        return "not asked yet"
    word = pb.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower().replace("_", " ")
    return f"{word}, passed over for {worker.passed_over_s:.0f} s" if worker.passed_over_s else word


def _loaded(worker: pb.Worker) -> str:
    mode = vram_mode_from_proto(worker.loaded_vram_mode, field="loaded_vram_mode").value
    parts = [worker.loaded_model, mode if worker.loaded_vram_mode else "", *worker.loaded_loras]
    return ", ".join(part for part in parts if part)
