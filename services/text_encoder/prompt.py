"""Prompt text before it is tokenized: cleaning, and the form in which a variant wants sound described. Pure.

The two forms: `... <AUDCAP>rain on leaves<ENDAUDCAP>` and `... Audio: rain on leaves` at the end. Speech stands between
`<S>` and `<E>` in both and is never touched.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

import ftfy

from shared.variants import PromptFormat

_OPEN, _CLOSE, _LINE = "<AUDCAP>", "<ENDAUDCAP>", "Audio:"
_SPEECH = re.compile(r"<S>.*?<E>", re.IGNORECASE | re.DOTALL)
_PARTS = re.compile(r"(<S>.*?<E>|<AUDCAP>|<ENDAUDCAP>)", re.IGNORECASE | re.DOTALL)
_LINE_MARK = re.compile(r"\bAudio:|(?:(?<=[.!?>\"')\]…”’]\s)|^)(?i:audio):")
"""The word as the model knows it anywhere, in another case only where a sentence begins."""
_SENTENCE_ENDS = (".", "!", "?", "…")


def clean_prompt(text: str) -> str:
    """Mend broken encodings, undo HTML escapes (twice: some texts are escaped twice), make white space single."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def format_prompt(text: str, prompt_format: PromptFormat) -> str:
    """The text with its sound described in the wanted form; idempotent.

    To AUDIO_LINE: every tagged description moves, in order, to one `Audio:` at the end. To AUDCAP_TAGS: a trailing
    `Audio:` description becomes a tagged one; a text that has tags already keeps its words, and its tags are spelled
    and closed as the model knows them. A description without words vanishes on the way. Without any description the
    text stays as it is.
    """
    if prompt_format is PromptFormat.AS_IS:
        return text
    tagged = _Tagged.parse(text)
    if prompt_format is PromptFormat.AUDIO_LINE:
        return tagged.as_line() if tagged.has_tags else text
    return tagged.as_tags() if len(tagged.pieces) > 1 else _line_to_tags(tagged.pieces[0])


@dataclass(frozen=True)
class _Tagged:
    """A text split at its sound tags: plain and tagged pieces in turn, plain first and last; speech is in either."""

    pieces: tuple[str, ...]
    has_tags: bool

    @classmethod
    def parse(cls, text: str) -> _Tagged:
        pieces = [""]
        has_tags = False
        for part in _PARTS.split(text):
            inside = len(pieces) % 2 == 0
            if part.upper() not in (_OPEN, _CLOSE):
                pieces[-1] += part
                continue
            has_tags = True
            if inside == (part.upper() == _CLOSE):
                pieces.append("")
            else:
                pieces[-1] += " "  # what stood around a stray tag must not become one
        if len(pieces) % 2 == 0:
            pieces.append("")
        return cls(tuple(pieces), has_tags)

    def as_tags(self) -> str:
        spelled = [f"{_OPEN}{piece}{_CLOSE}" if i % 2 else piece for i, piece in enumerate(self.pieces)]
        return "".join(spelled)

    def as_line(self) -> str:
        plain = " ".join(piece.strip() for piece in self.pieces[::2] if piece.strip())
        sounds = [piece.strip() for piece in self.pieces[1::2] if piece.strip()]
        if not sounds:
            return plain
        if _line_mark(plain) is None:
            return f"{plain} {_LINE} {_join(sounds)}".strip()
        return _join([plain, *sounds])


def _join(sentences: list[str]) -> str:
    """One string, with a full stop after every sentence that has no end of its own but the last."""
    ended = [s if s.endswith(_SENTENCE_ENDS) or s.endswith(":") else f"{s}." for s in sentences[:-1]]
    return " ".join([*ended, sentences[-1]])


def _line_mark(text: str) -> re.Match[str] | None:
    """The last `Audio:` outside speech."""
    masked = _SPEECH.sub(lambda match: ">" * len(match[0]), text)
    matches = list(_LINE_MARK.finditer(masked))
    return matches[-1] if matches else None


def _line_to_tags(text: str) -> str:
    while mark := _line_mark(text):
        plain, sound = text[: mark.start()].strip(), text[mark.end() :].strip()
        if sound:
            return f"{plain} {_OPEN}{sound}{_CLOSE}".strip()
        text = plain  # a mark without words goes, and the one before it is the last
    return text
