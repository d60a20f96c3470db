"""Cleaning and sound forms of prompts."""

from __future__ import annotations

import random

import pytest

from services.text_encoder.prompt import clean_prompt, format_prompt
from shared.variants import PromptFormat

AS_IS, LINE, TAGS = PromptFormat.AS_IS, PromptFormat.AUDIO_LINE, PromptFormat.AUDCAP_TAGS


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        ("  a \n\t b\u3000c  ", "a b c"),
        ("&amp;lt;S&amp;gt;hi&amp;lt;E&amp;gt;", "<S>hi<E>"),
        ("fish &amp; chips", "fish & chips"),
        ("schÃ¶n", "schön"),
        ("cafe\u0301", "café"),
        ("<S>hello<E> Audio: rain", "<S>hello<E> Audio: rain"),
        ("漢字 😀", "漢字 😀"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean_prompt(text) == cleaned
    assert clean_prompt(cleaned) == cleaned


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A cat.<AUDCAP>purring<ENDAUDCAP>", "A cat. Audio: purring"),
        ("A cat. <AUDCAP> purring <ENDAUDCAP> ", "A cat. Audio: purring"),
        (
            "A cat <AUDCAP>purring<ENDAUDCAP> and a dog <AUDCAP>barks!<ENDAUDCAP> run",
            "A cat and a dog run Audio: purring. barks!",
        ),
        ("<AUDCAP>rain<ENDAUDCAP>", "Audio: rain"),
        ("<audcap>rain<EndAudCap>", "Audio: rain"),
        ("A cat <AUDCAP>purring", "A cat Audio: purring"),
        ("A cat purring<ENDAUDCAP>", "A cat purring"),
        ("A <AUDCAP><ENDAUDCAP> cat", "A cat"),
        ("A cat. Audio: rain <AUDCAP>purring<ENDAUDCAP>", "A cat. Audio: rain. purring"),
        (
            "<S>Hi <AUDCAP>x<ENDAUDCAP><E> he says <AUDCAP>wind<ENDAUDCAP>",
            "<S>Hi <AUDCAP>x<ENDAUDCAP><E> he says Audio: wind",
        ),
        ("<AUDCAP>a man: <S>Audio: on<E>, clearly<ENDAUDCAP>", "Audio: a man: <S>Audio: on<E>, clearly"),
    ],
)
def test_tags_become_one_line_at_the_end(text: str, line: str) -> None:
    assert format_prompt(text, LINE) == line


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("A cat. Audio: purring", "A cat. <AUDCAP>purring<ENDAUDCAP>"),
        ("A cat Audio:purring, rain.", "A cat <AUDCAP>purring, rain.<ENDAUDCAP>"),
        ("A cat. audio: purring", "A cat. <AUDCAP>purring<ENDAUDCAP>"),
        ("AUDIO: purring", "<AUDCAP>purring<ENDAUDCAP>"),
        ("A cat.  Audio:  ", "A cat."),
        ("One. Audio: two. Audio: three", "One. Audio: two. <AUDCAP>three<ENDAUDCAP>"),
        ("He says <S>Audio: off<E> Audio: wind", "He says <S>Audio: off<E> <AUDCAP>wind<ENDAUDCAP>"),
        ("Wind. Audio: a voice: <S>Audio: off<E>", "Wind. <AUDCAP>a voice: <S>Audio: off<E><ENDAUDCAP>"),
    ],
)
def test_a_line_becomes_tags(text: str, tags: str) -> None:
    assert format_prompt(text, TAGS) == tags


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", LINE),
        ("", TAGS),
        ("A cat.", LINE),
        ("A cat.", TAGS),
        ("A cat. Audio: rain", LINE),
        ("A cat. <AUDCAP>rain<ENDAUDCAP> It runs. <AUDCAP>wind<ENDAUDCAP>", TAGS),
        ("the audio: too loud", TAGS),
        ("an Audiobook", TAGS),
        ("<S>Audio: this is speech<E>", TAGS),
        ("<S>say <AUDCAP>tag<ENDAUDCAP><E>", LINE),
        ("A <AUDCAP>rain<ENDAUDCAP> Audio: wind", AS_IS),
        ("<audcap>x", AS_IS),
    ],
)
def test_what_is_in_the_wanted_form_already_stays_as_it_is(text: str, wanted: PromptFormat) -> None:
    assert format_prompt(text, wanted) == text


def test_tags_of_the_wanted_form_are_spelled_and_closed() -> None:
    assert format_prompt("A cat <audcap>rain", TAGS) == "A cat <AUDCAP>rain<ENDAUDCAP>"
    assert format_prompt("<AUDCAP>a<AUDCAP>b<ENDAUDCAP>c<ENDAUDCAP>", TAGS) == "<AUDCAP>a b<ENDAUDCAP>c "


_PIECES = (
    "A cat",
    " ",
    ".",
    "Audio:",
    "audio:",
    "<AUDCAP>",
    "<ENDAUDCAP>",
    "<audcap>",
    "<S>",
    "<E>",
    "rain!",
    "<AUD",
    "CAP>",
    "Aud",
    "io:",
)


def test_any_text_is_converted_once_and_for_all_and_keeps_its_speech() -> None:
    """20000 random arrangements of every mark: a second conversion changes nothing, complete speech survives whole."""
    generator = random.Random(5)
    for _ in range(20000):
        words = generator.choices(_PIECES, k=generator.randint(0, 9))
        said = f"<S>{generator.randint(0, 999)} Audio: <AUDCAP>said<ENDAUDCAP><E>"
        text = "".join([*words, said]) if "<S>" not in words else "".join(words)
        for wanted in (LINE, TAGS):
            once = format_prompt(text, wanted)
            assert format_prompt(once, wanted) == once, (text, wanted)
            assert said not in text or said in once, (text, wanted)


def test_there_and_back_keeps_a_trailing_description() -> None:
    tags = "A man waves. <S>Bye!<E> <AUDCAP>surf, gulls<ENDAUDCAP>"
    line = "A man waves. <S>Bye!<E> Audio: surf, gulls"
    assert format_prompt(tags, LINE) == line
    assert format_prompt(line, TAGS) == tags
