"""Structured logs: one JSON object a line on stderr, with service, rank and request id."""

from __future__ import annotations

import logging
import os
import sys
from typing import cast

import structlog


def configure_logging(service: str, *, level: str = "info", rank: int = 0) -> None:
    """Set up structlog and the standard library's loggers for one process.

    Args:
        service: name put on every line.
        level: debug, info, warning or error.
        rank: torch.distributed rank put on every line; 0 without ranks.

    Raises:
        ValueError: unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r} is unknown; use debug, info, warning or error")
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*processors, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # one write a line: ranks share a pipe
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, rank=rank, pid=os.getpid())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=processors,
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(number, logging.WARNING))


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module; `name` is put on every line as `component`."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger(component=name))
