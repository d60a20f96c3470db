"""Flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_DATA_DIR = Path("data")
DEFAULT_SERVER = "127.0.0.1:50050"
DEFAULT_PRIORITY = 5

DataDir = Annotated[
    Path,
    typer.Option(envvar="OVI_DATA_DIR", help="Folder of the database, clips and logs; made if missing."),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        envvar="OVI_CHECKPOINTS",
        help="Folder in the released layout. Default: ./checkpoints if it holds weights, else the tiny preset.",
        show_default=False,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(help="'tiny': a small random model, made in the data folder the first time.", show_default=False),
]
Device = Annotated[str, typer.Option(help="Of the fusion and VAE services: auto, cpu, cuda or cuda:N.")]
Gpus = Annotated[
    str,
    typer.Option(help="Of the fusion service: auto (all a plan can use), or a number; with --device cpu, of ranks."),
]
VaeGpus = Annotated[
    str,
    typer.Option(help="Of the VAE service: auto (those of the fusion service, at most 8), or a number; see --gpus."),
]
Plan = Annotated[
    str,
    typer.Option(
        help="How the GPUs of the fusion service share the work: auto, single, multi_2, multi_4, multi_8, or fsdp: each"
        " holds a part of the weights. auto chooses by their number and memory."
    ),
]
VramModeFlag = Annotated[
    str,
    typer.Option(
        "--vram-mode",
        help="How GPU memory is used: auto, standard, streamed, fp8, fp8_offload, ultra_low or all_gpu; the fp8 ones"
        " and ultra_low are lossy. auto chooses by the memory there is and says why.",
    ),
]
TextEncoderDevice = Annotated[str, typer.Option(help="Of the text encoder: auto, cpu, cuda or cuda:N.")]
Server = Annotated[str, typer.Option(envvar="OVI_SERVER", help="HOST:PORT of a gateway's gRPC API.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")]
Priority = Annotated[int, typer.Option(min=0, max=9, help="0 to 9; jobs with a higher one are begun first.")]
GrpcPort = Annotated[int, typer.Option(help="Of the gateway; the stages take the next three. 0: any free ones.")]
HttpPort = Annotated[int, typer.Option(help="Of the gateway's HTTP side. 0: any free one.")]
Host = Annotated[
    str,
    typer.Option(help="Interface the gateway listens on; beyond the loopback with TLS and API keys (see `ovi keys`)."),
]
StackTlsCert = Annotated[
    Path | None, typer.Option("--tls-cert", help="PEM certificate of the gateway: it then listens with TLS.")
]
StackTlsKey = Annotated[Path | None, typer.Option("--tls-key", help="Its private key.")]
StackInsecure = Annotated[bool, typer.Option("--insecure", help="Listen beyond the loopback without TLS.")]
KeysRequired = Annotated[bool, typer.Option("--require-keys", help="Ask for API keys on the loopback, too.")]
AdminKeyFile = Annotated[Path | None, typer.Option(help="File with a key that administers, of 32 characters or more.")]
