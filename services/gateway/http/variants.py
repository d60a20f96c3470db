"""Which model variant makes a clip of the wanted length and size; clients name those rather than models. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from services.gateway.http.reading import FieldReader
from services.gateway.models import ModelInfo, runnable
from shared.shapes import SIZE_MULTIPLE, legal_size

_SIDES = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def sides_of(text: str) -> tuple[int, int] | None:
    """The two numbers of "AxB"; None if the text is not of this form."""
    sides = _SIDES.fullmatch(text)
    return (int(sides[1]), int(sides[2])) if sides is not None else None


def seconds_of(model: ModelInfo) -> int:
    """Length of the clips that a variant makes, in whole seconds."""
    return model.num_frames // model.fps


def choose_variant(
    models: Mapping[str, ModelInfo],
    *,
    model_id: str,
    seconds: int | None,
    size: tuple[int, int] | None,
    on_seconds: Callable[[str], None],
    on_size: Callable[[str], None],
    show_seconds: Callable[[int], str] = str,
    show_size: Callable[[int, int], str],
) -> str:
    """The id of the first variant that makes such a clip.

    Args:
        models: all variants, by id.
        model_id: as the client named it; empty: any. An unknown one is given back, to be refused by the engine.
        seconds: wanted; None: any.
        size: (height, width) wanted; None: any.
        on_seconds: called with what is wrong if no variant makes this length.
        on_size: the same for the size.
        show_seconds: a length in the client's words.
        show_size: a (height, width) in the client's words.
    """
    legal = runnable(models)
    if model_id and model_id not in legal:
        return model_id
    candidates = [legal[model_id]] if model_id else list(legal.values())
    if seconds is not None:
        fitting = [model for model in candidates if seconds_of(model) == seconds]
        if not fitting:
            lengths = sorted({seconds_of(model) for model in candidates})
            on_seconds(f"got {show_seconds(seconds)}, allowed{_of(model_id)} is {_listed(map(show_seconds, lengths))}")
            return model_id
        candidates = fitting
    if size is not None:
        fitting = [
            model for model in candidates if min(size) >= SIZE_MULTIPLE // 2 and legal_size(*size, model.video_area)
        ]
        if not fitting:
            common = {wanted: None for model in candidates for wanted in model.sizes}
            areas = _listed(dict.fromkeys(str(model.video_area) for model in candidates))
            what = f"any size of {areas} pixels in multiples of {SIZE_MULTIPLE}, such as"
            shown = _listed(show_size(*wanted) for wanted in common)
            on_size(f"got {show_size(*size)}, allowed{_of(model_id)} is {what} {shown}")
            return model_id
        candidates = fitting
    return candidates[0].id if candidates else model_id


def read_size(reader: FieldReader, field: str, *, order: str) -> tuple[int, int] | None:
    """(first, second) side of a field "AxB"; None if it is absent or none."""
    text = reader.text(field)
    if text is None:
        return None
    sides = sides_of(text)
    if sides is None:
        reader.wrong(field, f"got {text[:80]!r}, allowed is {order} in pixels")
    return sides


def _of(model_id: str) -> str:
    return f" for {model_id}" if model_id else ""


def _listed(values: Iterable[str]) -> str:
    return " or ".join(values)
