"""Fusion weight files: layouts of the release, precisions, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.fusion.checkpoint import CONFIG_KEY, FusionFile, layout
from services.fusion.engine import FusionEngine
from services.fusion.model.config import RELEASED
from shared.checkpoints import SafetensorsHeader
from shared.errors import CheckpointError, InvalidRequest
from tests.fusion_checkpoint import SMALL, VIDEO_AREA, write_variant

CPU = torch.device("cpu")
METADATA = {CONFIG_KEY: json.dumps({"num_heads": SMALL.num_heads, "text_len": SMALL.text_len})}


def test_layout_of_the_release() -> None:
    text = (Path(__file__).parents[2] / "shared" / "checkpoint_layout.json").read_text()
    released = json.loads(text)["Ovi/model_960x960_10s.safetensors"]
    ours = {key: [str(dtype).removeprefix("torch."), *shape] for key, (dtype, shape) in layout(RELEASED).items()}
    assert ours == released


def test_open_infers_every_width_and_loads_exactly(tmp_path) -> None:
    path = write_variant(tmp_path, "720x720_5s")
    file = FusionFile.open(path)
    assert file.config == SMALL and file.video_area == VIDEO_AREA and file.precision == "bfloat16"
    stored = load_file(path)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = file.load(CPU, dtype).state_dict()
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[key], stored[key].to(dtype)) for key in stored)


def test_rows_are_those_of_the_tensor_and_nothing_more(tmp_path) -> None:
    path = write_variant(tmp_path, "720x720_5s")
    header, stored = SafetensorsHeader.read(path), load_file(path)
    key, empty = "video_model.blocks.0.ffn.0.weight", "audio_model.head.modulation"
    rows = dict(header.rows({key: (3, 10), empty: (1, 1)}, CPU))
    assert torch.equal(rows[key], stored[key][3:10])
    assert rows[key].untyped_storage().nbytes() == rows[key].nbytes, "no view of the whole file"
    assert rows[empty].shape == (0, *stored[empty].shape[1:]) and rows[empty].dtype == stored[empty].dtype


def test_rows_of_a_file_that_was_cut_are_refused(tmp_path) -> None:
    path = write_variant(tmp_path, "720x720_5s")
    header = SafetensorsHeader.read(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        dict(header.rows(dict.fromkeys(header.layout, (0, 1)), CPU))


def test_fp8_weights_have_the_same_keys_and_their_own_values(tmp_path) -> None:
    path = write_variant(tmp_path, "720x720_5s")
    stored = load_file(path)
    fp8 = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 and "blocks" in k else v for k, v in stored.items()}
    path8 = tmp_path / "fp8.safetensors"
    save_file(fp8, path8, metadata=METADATA)
    file = FusionFile.open(path8)
    assert file.precision == "float8_e4m3fn"
    loaded = file.load(CPU, torch.float32).state_dict()
    key = "video_model.blocks.0.ffn.0.weight"
    assert torch.equal(loaded[key], fp8[key].float())
    assert not torch.equal(loaded[key], stored[key].float())


def test_metadata_that_makes_no_sense_is_refused(tmp_path) -> None:
    stored = load_file(write_variant(tmp_path, "720x720_5s"))
    for text in ("[1]", "{", '{"num_heads": 0}', '{"colour": 1}', '{"num_heads": "many"}', '{"num_heads": 7}'):
        path = tmp_path / "odd.safetensors"
        save_file(stored, path, metadata={CONFIG_KEY: text})
        with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
            FusionFile.open(path)


def _without(stored, key):
    return {k: v for k, v in stored.items() if k != key}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: _without(s, "audio_model.blocks.1.norm3.bias"), r"1 missing: audio_model.blocks.1.norm3.bias"),
        (lambda s: _without(s, "video_model.patch_embedding.weight"), "not an Ovi fusion checkpoint"),
        (lambda s: s | {"extra": torch.zeros(1)}, "1 unexpected: extra"),
        (
            lambda s: s | {"video_model.head.head.weight": torch.zeros(5, 48)},
            r"video_model.head.head.weight has shape \[5, 48\], must be \[192, 48\]",
        ),
    ],
)
def test_wrong_keys_and_shapes_are_named(tmp_path, change, says) -> None:
    stored = load_file(write_variant(tmp_path, "720x720_5s"))
    path = tmp_path / "wrong.safetensors"
    save_file(change(stored), path, metadata=METADATA)
    with pytest.raises(CheckpointError, match=says) as caught:
        FusionFile.open(path)
    assert str(path) in str(caught.value)


def test_missing_truncated_and_foreign_files_are_named(tmp_path) -> None:
    path = write_variant(tmp_path, "720x720_5s")
    data = path.read_bytes()
    for content, says in [
        (data[:-1], "truncated"),
        (data[:1000], "truncated"),
        (b"", "truncated"),
        (b"\xff" * 100, "not a safetensors file"),
        (len(b"{}").to_bytes(8, "little") + b"{}" + b"junk", "truncated"),
        ((9).to_bytes(8, "little") + b"not json!", "damaged"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=says) as caught:
            FusionFile.open(path)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        FusionFile.open(path)


def test_engine_serves_the_good_variants_and_names_the_bad(tmp_path) -> None:
    write_variant(tmp_path, "720x720_5s")
    bad = write_variant(tmp_path, "960x960_10s")
    bad.write_bytes(bad.read_bytes()[:-10])
    engine = FusionEngine(tmp_path, CPU, torch.float32)
    engine.discover()
    assert list(engine.served) == ["720x720_5s"]
    with pytest.raises(CheckpointError, match=r"model_960x960_10s.safetensors.*truncated"):
        engine.variant("960x960_10s")
    with pytest.raises(InvalidRequest, match=r"model: got 'x', allowed is one of \['720x720_5s'\]"):
        engine.variant("x")


def test_engine_without_any_file_says_what_is_needed(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"Ovi/model.safetensors"):
        FusionEngine(tmp_path, CPU, torch.float32).discover()


def test_engine_holds_one_variant_at_a_time(tmp_path) -> None:
    for seed, variant in enumerate(["720x720_5s", "960x960_10s"]):
        write_variant(tmp_path, variant, seed=seed)
    engine = FusionEngine(tmp_path, CPU, torch.float32)
    engine.discover()
    first = engine.load("720x720_5s")
    assert engine.load("720x720_5s") is first and engine.loaded_id == "720x720_5s"
    second = engine.load("960x960_10s")
    assert engine.loaded_id == "960x960_10s"
    key = "video_model.head.head.weight"
    assert not torch.equal(first.state_dict()[key], second.state_dict()[key])
