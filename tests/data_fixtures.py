"""What the tests of the data floor share: a small tokenizer of Qwen's form, awkward texts, a naive tokenisation."""

from __future__ import annotations

import functools
import os
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO
from anchor_cli.data.text import load_tokenizer
from anchor_cli.demo.tokenizer import train_small_tokenizer

SHARED_FOLDER = Path(os.environ.get("ANCHOR_SHARED", Path(__file__).parents[2] / "shared"))
needs_shared = pytest.mark.skipif(not (SHARED_FOLDER / "data").is_dir(), reason=f"{SHARED_FOLDER}/data is absent")

AWKWARD = [
    "수달은 어디에 사나요?",
    "Where do otters live? 수달 the otter",
    "a",
    "👨‍👩‍👧 가족 🏳️‍🌈",
    "e\u0301 한글 ｆｕｌｌ width",  # NFC changes it
    "\u0301x",  # begins with a combining mark
    "x !@#$%^&*()x !@#$%^&*()",
    "<|im_end|>",
    "<|im_start|>user\nhi<|im_end|>",
    "<|im_e",
    "  leading and trailing  ",
    "\n\ttabs\r\nand lines\n\n",
    "\u3000ideographic\u3000",
    "}{text}{",
    "𠮷野家 ﷽",
]


@functools.cache
def small_tokenizer() -> Tokenizer:
    texts = [INSTRUCTION_KO, INSTRUCTION_EN, "user Where do otters live? the otter lives in the river"]
    return train_small_tokenizer(["수달은", "어디에", "사나요?"], texts)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@functools.cache
def plain_tokenizer(path: str | None = None) -> Tokenizer:
    """The small tokenizer, or the one at `path`, as `load_tokenizer` gives it."""
    if path is not None:
        return load_tokenizer(path)
    return Tokenizer.from_str(small_tokenizer().to_str())


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
