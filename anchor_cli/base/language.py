"""Korean or English, told from the script alone: one rule for training rows and for benchmarks."""

from __future__ import annotations

import re

HANGUL_SYLLABLES = "\uac00-\ud7a3"
"""Composed syllables, as a range of a regular expression."""

_HANGUL = re.compile(r"[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")  # syllables and all blocks of jamo
_LETTER = re.compile(r"[^\W\d_]")
_HANGUL_SHARE_OF_KOREAN = 0.3  # assumption: Korean questions quote English names, English ones hardly ever Hangul


def hangul_share(text: str) -> float:
    """Share of Hangul among the letters of `text`, 0..1; 0.0 when it has no letter."""
    num_letters = len(_LETTER.findall(text))
    return len(_HANGUL.findall(text)) / num_letters if num_letters else 0.0


def language_of(text: str) -> str:
    """`ko` where Hangul is at least 30 % of the letters, else `en`."""
    return "ko" if hangul_share(text) >= _HANGUL_SHARE_OF_KOREAN else "en"
