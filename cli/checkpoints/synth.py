"""Synthetic checkpoints: seeded random weights in exactly the released files, keys and dtypes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cli.checkpoints.presets import (
    PRESETS,
    Preset,
    fusion_file_layout,
    fusion_metadata,
    is_fp8,
    stage_file_layouts,
)
from cli.checkpoints.tokenizer import write_tokenizer
from cli.checkpoints.values import ValuePool, distribution_of
from cli.checkpoints.writers import Draw, layout_bytes, write_pth, write_safetensors
from services.vae.checkpoint import anti_alias_filter
from shared.checkpoints import Layout
from shared.errors import AlreadyExists, FailedPrecondition, FieldViolation, InvalidRequest, ResourceExhausted
from shared.variants import TOKENIZER_FOLDER, VARIANTS, Variant

_MAX_SEED = 2**63 - 1
_FILES_AT_ONCE = 3
_FILTER_SUFFIX = ".filter"
_FP8_SOURCE = "720x720_5s"


@dataclass(frozen=True)
class SynthRequest:
    """What to make."""

    preset: str
    out: Path
    """Folder to fill; made if missing."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Fusion files to write."""
    seed: int = 0
    force: bool = False
    """Replace files that are there."""
    link_variants: bool = False
    """Make further bfloat16 variants hard links to the first one: less disk and time, equal weights."""


@dataclass(frozen=True)
class _File:
    name: str
    layout: Layout
    content: str
    """Files of equal content names get equal values."""
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return layout_bytes(self.layout)


def synthesize(request: SynthRequest, *, on_file: Callable[[str, int], None]) -> None:
    """Write a whole checkpoint folder. The same request gives the same bytes.

    Args:
        request: what to make.
        on_file: called with name and bytes after each file, from the writing threads.

    Raises:
        InvalidRequest: unknown preset or variant, or a bad seed.
        AlreadyExists: files are there and `force` is off.
        ResourceExhausted: the disk is too small.
        FailedPrecondition: the file system refuses.
    """
    preset, variants = _checked(request)
    files, links = _plan(request, preset, variants)
    _check_folder(request, [file.name for file in files] + [name for name, _ in links], files)
    pool = ValuePool(request.seed, preset.pool_values)

    def write(file: _File) -> None:
        path = request.out / file.name
        draw = _draw_for(file, pool)
        if path.suffix == ".safetensors":
            write_safetensors(path, file.layout, file.metadata, draw)
        else:
            write_pth(path, file.layout, draw)
        on_file(file.name, path.stat().st_size)

    try:
        _all_at_once([partial(write, file) for file in sorted(files, key=lambda f: -f.num_bytes)])
        for name, source in links:
            _link(request.out / source, request.out / name)
            on_file(name, 0)
        write_tokenizer(request.out / TOKENIZER_FOLDER)
    except OSError as error:
        raise FailedPrecondition(f"{request.out}: writing failed ({error.strerror or error})") from None
    on_file(TOKENIZER_FOLDER, 0)


def _all_at_once(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks on a few threads; after the first failure no further one begins."""
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="synth") as threads:
        futures = [threads.submit(task) for task in tasks]
        try:
            for future in futures:
                future.result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _link(source: Path, name: Path) -> None:
    name.unlink(missing_ok=True)
    os.link(source, name)


def _checked(request: SynthRequest) -> tuple[Preset, list[Variant]]:
    violations = []
    preset = PRESETS.get(request.preset)
    if preset is None:
        violations.append(FieldViolation("preset", f"got {request.preset!r}, allowed is {', '.join(PRESETS)}"))
    unknown = [name for name in request.variants if name not in VARIANTS]
    if unknown or not request.variants:
        what = f"got {', '.join(unknown) or 'none'}, allowed is one or more of {', '.join(VARIANTS)}"
        violations.append(FieldViolation("variants", what))
    if not 0 <= request.seed <= _MAX_SEED:
        violations.append(FieldViolation("seed", f"got {request.seed}, allowed is 0 to {_MAX_SEED}"))
    if violations or preset is None:
        raise InvalidRequest(violations)
    return preset, [VARIANTS[name] for name in dict.fromkeys(request.variants)]


def _plan(
    request: SynthRequest, preset: Preset, variants: Sequence[Variant]
) -> tuple[list[_File], list[tuple[str, str]]]:
    """Files to write, and (name, source) of hard links."""
    metadata = fusion_metadata(preset)
    files = [_File(name, layout, name, {}) for name, layout in stage_file_layouts(preset).items()]
    links: list[tuple[str, str]] = []
    first: str | None = None
    for variant in variants:
        if request.link_variants and first is not None and not is_fp8(variant):
            links.append((variant.file, first))
            continue
        content = VARIANTS[_FP8_SOURCE].file if is_fp8(variant) else variant.file
        files.append(_File(variant.file, fusion_file_layout(variant, preset.fusion), content, metadata))
        if not is_fp8(variant):
            first = first or variant.file
    return files, links


def _check_folder(request: SynthRequest, names: Sequence[str], files: Sequence[_File]) -> None:
    present = [name for name in names if (request.out / name).exists()]
    if present and not request.force:
        raise AlreadyExists(f"{request.out} holds {', '.join(present)} already; --force replaces them")
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FailedPrecondition(f"{request.out}: cannot be made ({error.strerror})") from None
    needed = sum(file.num_bytes for file in files)
    free = shutil.disk_usage(request.out).free
    if needed > free:
        what = f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise ResourceExhausted(f"{request.out}: {what}; choose fewer --variants, or --link-variants")


def _draw_for(file: _File, pool: ValuePool) -> Draw:
    def draw(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if key.endswith(_FILTER_SUFFIX):
            return anti_alias_filter()
        return pool.draw(f"{file.content}/{key}", shape, dtype, distribution_of(file.content, key, shape))

    return draw
