"""What all ranks of a service do together: load, go through the steps of a piece of work, end."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TypeVar

from shared.errors import CheckpointError
from shared.group.control import Command, ControlChannel
from shared.group.ranks import EXIT_GROUP_FAILED, Fellowship
from shared.logging import get_logger

log = get_logger(__name__)

T = TypeVar("T")

_STOP = "stop"


def lead(channel: ControlChannel, command: Command, steps: Iterator[T]) -> Generator[T, None, None]:
    """On rank 0: tell the others what is done, and yield this rank's steps of it.

    Whether a next step is taken is decided here, once a step: it is not if the consumer closes the iterator. A failure
    in a step cannot be undone on the other ranks; it ends the group.
    """
    channel.send(command)
    try:
        for step in steps:
            wanted = False
            try:
                yield step
                wanted = True
            finally:
                channel.go_on(wanted)
    except Exception as error:
        log.error("the group has failed and ends", exc_info=error)
        os._exit(EXIT_GROUP_FAILED)


def follow_steps(channel: ControlChannel, steps: Iterator[object]) -> None:
    """On the other ranks: take this rank's steps, as many as rank 0 says."""
    for _ in steps:
        if not channel.go_on():
            break


def follow(fellowship: Fellowship, tasks: Mapping[str, Callable[[Command], None]]) -> None:
    """On every rank but 0: do what rank 0 says, by kind of command, until it says stop; then leave the group.

    Raises:
        RuntimeError: rank 0 is gone, or a collective failed; the process should end.
    """
    while (command := fellowship.channel.receive()).kind != _STOP:
        tasks[command.kind](command)
    fellowship.leave()


def stop_followers(fellowship: Fellowship) -> None:
    """On rank 0: let the other ranks end, and leave the group.

    Raises:
        DistStoreError: see Fellowship.leave.
    """
    fellowship.part()
    try:
        fellowship.channel.send(Command(_STOP, {}, {}))
    except RuntimeError as error:
        # After a start that failed on every rank. Raised here, it would hide why.
        log.warning("the other ranks have ended before", reason=str(error))
        return
    fellowship.leave()


def load_together(load: Callable[[], T], what: str, channel: ControlChannel) -> T:
    """What `load` gives on this rank, if all ranks could load `what`.

    Raises:
        CheckpointError: this rank or another could not.
        Exception: whatever else `load` raises; the other ranks get a CheckpointError.
    """
    well = False
    try:
        loaded = load()
        well = True
    finally:
        all_well = channel.agree(well)
    if not all_well:
        raise CheckpointError(f"{what} could not be loaded on every rank; the logs of the ranks say why")
    return loaded
