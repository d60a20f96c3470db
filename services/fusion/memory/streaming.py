"""The order in which the fusion model's weights come to the device."""

from __future__ import annotations

from services.fusion.units import Entries
from shared.memory.sizes import AUDIO_STEM_LAYERS
from shared.memory.streaming import UnitStream


def entries_of(stream: UnitStream, num_layers: int) -> Entries:
    """What `units.announce` needs, for units in the order text, its blocks, stem, audio stem, blocks, heads."""
    stem = num_layers + 1
    first_block = stem + 1 + AUDIO_STEM_LAYERS
    return Entries(
        text=lambda: stream.enter(0),
        text_block=lambda index: stream.enter(1 + index),
        stem=lambda: stream.enter(stem),
        audio_stem=lambda index: stream.enter(stem + 1 + index),
        block=lambda index: stream.enter(first_block + index),
        heads=lambda: stream.enter(first_block + num_layers),
    )
