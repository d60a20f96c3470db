"""The tokenizer beside the weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from services.text_encoder.config import MAX_TOKENS
from shared.checkpoints import require_file
from shared.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
_MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt."""

    ids: tuple[int, ...]
    """1 to MAX_TOKENS ids, the end mark last, without padding."""
    truncated: bool
    """True if the text's end was cut off."""


class PromptTokenizer:
    """Text to ids: the end mark added, cut at MAX_TOKENS, never padded."""

    def __init__(self, tokenizer: Tokenizer, *, sha256: str) -> None:
        """
        Args:
            tokenizer: as read from a file; its padding and truncation settings are replaced.
            sha256: of that file, hexadecimal.
        """
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer = tokenizer
        self.sha256 = sha256

    @classmethod
    def read(cls, folder: Path) -> PromptTokenizer:
        """The tokenizer of a folder with a `tokenizer.json`, as Hugging Face writes them.

        Raises:
            CheckpointError: missing, damaged, or without an end mark.
        """
        path = folder / TOKENIZER_FILE
        require_file(path)
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, more than any tokenizer; copy it again")
        content = path.read_bytes()
        try:
            tokenizer = Tokenizer.from_str(content.decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 ({error}); copy the file again") from None
        except Exception as error:  # noqa: BLE001  # the library raises bare Exception for any bad content
            raise CheckpointError(f"{path}: not a tokenizer ({str(error)[:200]}); copy the file again") from None
        if not tokenizer.encode("").ids:
            raise CheckpointError(f"{path}: adds no end mark, so an empty prompt has no token; use umT5's tokenizer")
        return cls(tokenizer, sha256=hashlib.sha256(content).hexdigest())

    @property
    def max_id(self) -> int:
        """The largest id it can give."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def __call__(self, text: str) -> Tokens:
        """Tokenize one text."""
        encoding = self._tokenizer.encode(text)
        return Tokens(tuple(encoding.ids), bool(encoding.overflowing))

    def decode(self, ids: tuple[int, ...]) -> str:
        """The text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
