"""The text encoder's loader, network and tokenizer."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.text_encoder.checkpoint import infer_config, layout, load_encoder
from services.text_encoder.config import MAX_TOKENS, RELEASED
from services.text_encoder.engine import TextEncoder, TextEngine
from services.text_encoder.tokenizer import PromptTokenizer
from shared.checkpoints import read_pth
from shared.errors import CheckpointError
from shared.variants import TEXT_ENCODER_FILE, TOKENIZER_FOLDER, PromptFormat

_CPU = torch.device("cpu")
_LAYOUT_FILE = Path(__file__).parents[2] / "shared" / "checkpoint_layout.json"


def _engine(folder: Path, cache_bytes: int = 1 << 20) -> TextEngine:
    return TextEngine.read(folder, device=_CPU, precision=torch.float32, cache_bytes=cache_bytes)


@pytest.fixture(scope="module")
def copy(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes folders with the text encoder's files, to be damaged."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("text")
        shutil.copytree(tiny_checkpoint / TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER)
        shutil.copy(tiny_checkpoint / TEXT_ENCODER_FILE, folder / TEXT_ENCODER_FILE)
        return folder

    return make


def test_layout_at_the_released_widths_is_the_released_one() -> None:
    listed = json.loads(_LAYOUT_FILE.read_text())[TEXT_ENCODER_FILE]
    ours = {key: [str(d).removeprefix("torch."), *shape] for key, (d, shape) in layout(RELEASED).items()}
    assert ours == listed
    assert infer_config(Path("released"), layout(RELEASED)) == RELEASED


def test_padding_in_a_masked_batch_changes_no_row(tiny_checkpoint: Path) -> None:
    """Rows of prompts encoded alone equal those of one padded, masked batch; only the order of sums differs."""
    model, config = load_encoder(tiny_checkpoint / TEXT_ENCODER_FILE, device=_CPU, precision=torch.float32)
    encoder = TextEncoder(model, config, _CPU)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 1000, (length,), generator=generator) for length in (1, 40, 300)]
    ids = torch.zeros(3, MAX_TOKENS, dtype=torch.int64)
    mask = torch.zeros(3, MAX_TOKENS, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    with torch.inference_mode():
        padded = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, prompt in enumerate(prompts):
        alone = encoder.encode(prompt.tolist())
        assert alone.shape == (len(prompt), config.dim)
        torch.testing.assert_close(alone, padded[row, : len(prompt)], atol=1e-5, rtol=0)


def test_a_prompts_rows_do_not_depend_on_its_company(tiny_checkpoint: Path) -> None:
    prompts = ["rain", "a much longer prompt about a lighthouse keeper at the coast", ""]
    together = list(_engine(tiny_checkpoint).encode(prompts, 0))
    for prompt, item in zip(prompts, together, strict=True):
        (alone,) = _engine(tiny_checkpoint).encode([prompt], 0)
        assert torch.equal(alone.embedding.rows_LC, item.embedding.rows_LC)
        assert not alone.cached
        assert not item.cached


def test_bfloat16_on_a_cpu_stays_in_the_files_memory_map(tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / TEXT_ENCODER_FILE
    model, _ = load_encoder(path, device=_CPU, precision=torch.bfloat16)
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.bfloat16, name
        address = parameter.data_ptr()
        assert any(start <= address < end for start, end in mapped), name


def test_bfloat16_is_near_float32(tiny_checkpoint: Path) -> None:
    """bfloat16 keeps 8 bits (0.4 %) an operation; some dozens of them in a row stay within 3 % of the rows' size."""
    path = tiny_checkpoint / TEXT_ENCODER_FILE
    ids = list(range(3, 200))
    rows = {}
    for precision in (torch.float32, torch.bfloat16):
        model, config = load_encoder(path, device=_CPU, precision=precision)
        rows[precision] = TextEncoder(model, config, _CPU).encode(ids)
        assert rows[precision].dtype is precision
    exact, rounded = rows[torch.float32], rows[torch.bfloat16].float()
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.03


def test_the_token_embedding_is_in_memory_once(tiny_checkpoint: Path) -> None:
    model, _ = load_encoder(tiny_checkpoint / TEXT_ENCODER_FILE, device=_CPU, precision=torch.float32)
    assert model.shared.weight.data_ptr() == model.encoder.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    "text", ["", "plain words", "Ünïcødé 漢字 😀 \u200d \x07", "<S>hi<E> <AUDCAP>x<ENDAUDCAP>", "  two  spaces "]
)
def test_the_tokenizer_gives_any_text_back(tiny_checkpoint: Path, text: str) -> None:
    tokenizer = PromptTokenizer.read(tiny_checkpoint / TOKENIZER_FOLDER)
    tokens = tokenizer(text)
    assert tokenizer.decode(tokens.ids) == text
    assert tokens.ids[-1] == 1
    assert 0 not in tokens.ids
    assert not tokens.truncated


def test_long_text_is_cut_but_ends_with_the_end_mark(tiny_checkpoint: Path) -> None:
    tokenizer = PromptTokenizer.read(tiny_checkpoint / TOKENIZER_FOLDER)
    whole, cut = tokenizer("Q" * 511), tokenizer("Q" * 512)
    assert len(whole.ids) == len(cut.ids) == MAX_TOKENS
    assert not whole.truncated
    assert cut.truncated
    assert whole.ids == cut.ids


def test_the_tokenizer_is_read_alike_by_transformers(tiny_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    folder = tiny_checkpoint / TOKENIZER_FOLDER
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "A woman laughs. <S>Hello there!<E> Audio: rain, café"
    encoded = theirs(text, padding="max_length", truncation=True, max_length=512, add_special_tokens=True)
    kept = [i for i, m in zip(encoded["input_ids"], encoded["attention_mask"], strict=True) if m]
    assert list(PromptTokenizer.read(folder)(text).ids) == kept
    assert encoded["input_ids"][-1] == 0


def test_repeated_prompts_come_from_the_cache(tiny_checkpoint: Path) -> None:
    engine = _engine(tiny_checkpoint)
    first = list(engine.encode(["a", "b", "a"], 1))
    assert [item.cached for item in first] == [False, False, True]
    assert engine.num_encoded == 2
    again = engine.cached(["b", "a", "c"], 0)
    assert [item is not None for item in again] == [True, True, False]
    assert again[1] is not None
    assert again[1].embedding is first[0].embedding


def test_prompts_are_cleaned_before_their_sound_is_converted() -> None:
    texts = TextEngine.prepare(["A  cat. &lt;AUDCAP&gt;rain&lt;ENDAUDCAP&gt;"], PromptFormat.AUDIO_LINE)
    assert texts == ["A cat. Audio: rain"]


def test_the_fingerprint_follows_weights_and_tokenizer(tiny_checkpoint: Path, copy: Callable[[], Path]) -> None:
    fingerprints = {_engine(tiny_checkpoint).fingerprint, _engine(copy()).fingerprint}
    assert len(fingerprints) == 1
    other_weights, other_tokenizer = copy(), copy()
    tensors = dict(read_pth(other_weights / TEXT_ENCODER_FILE))
    tensors["norm.weight"] = tensors["norm.weight"] + 1
    (other_weights / TEXT_ENCODER_FILE).unlink()
    torch.save(tensors, other_weights / TEXT_ENCODER_FILE)
    path = other_tokenizer / TOKENIZER_FOLDER / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    fingerprints |= {_engine(other_weights).fingerprint, _engine(other_tokenizer).fingerprint}
    assert len(fingerprints) == 3


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def _weights(damage: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], str]:
    def apply(folder: Path) -> str:
        path = folder / TEXT_ENCODER_FILE
        tensors = {key: tensor.clone() for key, tensor in read_pth(path).items()}
        damage(tensors)
        torch.save(tensors, path)
        return path.name

    return apply


def _bomb(folder: Path) -> str:
    path = folder / TEXT_ENCODER_FILE
    torch.save({"token_embedding.weight": torch.zeros(2), "x": _Bomb(folder / "exploded")}, path)
    return path.name


def _bare_bomb(folder: Path) -> str:
    path = folder / TEXT_ENCODER_FILE
    path.write_bytes(pickle.dumps(_Bomb(folder / "exploded"), protocol=2))
    return path.name


def _truncated(folder: Path) -> str:
    path = folder / TEXT_ENCODER_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path.name


def _no_weights(folder: Path) -> str:
    (folder / TEXT_ENCODER_FILE).unlink()
    return Path(TEXT_ENCODER_FILE).name


def _no_tokenizer(folder: Path) -> str:
    shutil.rmtree(folder / TOKENIZER_FOLDER)
    return "tokenizer.json"


def _broken_tokenizer(folder: Path) -> str:
    (folder / TOKENIZER_FOLDER / "tokenizer.json").write_text('{"version": "1.0"}')
    return "tokenizer.json"


def _binary_tokenizer(folder: Path) -> str:
    (folder / TOKENIZER_FOLDER / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    return "tokenizer.json"


def _transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.1.ffn.fc1.weight"] = tensors["blocks.1.ffn.fc1.weight"].T.contiguous()


def _few_tokens(tensors: dict[str, torch.Tensor]) -> None:
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:500].clone()


def _flatten(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.0.attn.q.weight"] = tensors["blocks.0.attn.q.weight"].flatten()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_bomb, "refused, it holds more than tensors"),
        (_bare_bomb, "refused, it holds more than tensors"),
        (_truncated, "damaged or truncated"),
        (_no_weights, "no such file"),
        (_no_tokenizer, "no such file"),
        (_broken_tokenizer, "not a tokenizer"),
        (_binary_tokenizer, "not UTF-8"),
        (_weights(_transpose), r"blocks.1.ffn.fc1.weight has shape \[64, 160\], must be \[160, 64\]"),
        (_weights(_flatten), r"blocks.0.attn.q.weight has shape \[4096\]"),
        (_weights(lambda t: t.pop("blocks.0.norm2.weight")), "1 missing: blocks.0.norm2.weight"),
        (_weights(lambda t: t.pop("token_embedding.weight")), "token_embedding.weight is missing"),
        (_weights(lambda t: t.update(extra=torch.zeros(1))), "1 unexpected: extra"),
        (_weights(lambda t: t.clear()), "is missing"),
        (_weights(_few_tokens), "ids up to 999"),
    ],
)
def test_bad_files_are_named_and_nothing_in_them_is_run(
    copy: Callable[[], Path], damage: Callable[[Path], str], says: str
) -> None:
    folder = copy()
    name = damage(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        _engine(folder)
    assert name in caught.value.message
    assert not (folder / "exploded").exists()


def test_widths_that_contradict_each_other_are_refused_on_construction() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        replace(RELEASED, num_heads=7)
    with pytest.raises(ValueError, match="num_layers"):
        replace(RELEASED, num_layers=0)
