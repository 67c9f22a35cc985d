"""Text to token ids: against the plain tokenizer on the whole templated string, character by character."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import AWKWARD, SHARED_FOLDER, needs_shared, nfc, plain_tokenizer, small_tokenizer, tokenizer_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from anchor_cli.base.contract import INSTRUCTION_KO, TEXT_TEMPLATE, query_prefix
from anchor_cli.base.errors import InputError
from anchor_cli.data.text import (
    SEPARATOR,
    TextEncoder,
    content_of,
    eos_of,
    load_tokenizer,
    split_record,
    tokenizer_fingerprint,
)

__all__ = ["tokenizer_folder"]  # a fixture
PREFIX = "<|im_start|>user\n"
EOS = "<|im_end|>"
INSTRUCTIONS = [None, INSTRUCTION_KO, "  padded", "query:"]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(AWKWARD)


def naive(tokenizer: Tokenizer, content: str, instruction: str | None) -> tuple[list[int], int]:
    """Design §2 read aloud: ids of the whole string; index of the first token of which a character is content."""
    full = f"{instruction}; {content}" if instruction else content
    text = full.strip()
    encoding = tokenizer.encode(PREFIX + text + EOS, add_special_tokens=False)
    num_content = len(content.rstrip()) if content.strip() else 0
    if not instruction:
        num_content = len(text)
    content_chars = set(range(len(PREFIX) + len(text) - num_content, len(PREFIX) + len(text)))
    touched = [i for i, (left, right) in enumerate(encoding.offsets) if content_chars & set(range(left, right))]
    return encoding.ids, min(touched, default=len(encoding.ids) - 1)


def check(tokenizer: Tokenizer, content: str, instruction: str | None) -> None:
    got = TextEncoder(tokenizer, TEXT_TEMPLATE, 100_000).encode_batch([content], instruction)[0]
    want_ids, want_start = naive(tokenizer, content, instruction)
    assert got.ids.tolist() == want_ids
    assert got.ids.dtype == np.int32
    assert got.content_start == want_start
    assert got.num_tokens == len(want_ids)
    full = f"{instruction}; {content}".strip() if instruction else content.strip()
    assert tokenizer.decode(got.ids.tolist(), skip_special_tokens=False) == nfc(PREFIX + full + EOS)


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize("content", [*AWKWARD, "", "   "])
def test_ids_and_content_mask_are_those_of_the_whole_string(content: str, instruction: str | None) -> None:
    check(small_tokenizer(), content, instruction)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(any_text, st.sampled_from(INSTRUCTIONS))
def test_fuzz_small_tokenizer(content: str, instruction: str | None) -> None:
    check(plain_tokenizer(), content, instruction)


@needs_shared
@settings(max_examples=150, deadline=None, derandomize=True)
@given(any_text, st.sampled_from(INSTRUCTIONS))
def test_fuzz_qwen_tokenizer(content: str, instruction: str | None) -> None:
    check(plain_tokenizer(str(SHARED_FOLDER / "data" / "tokenizer")), content, instruction)


def test_merges_cross_the_boundary_between_instruction_and_content() -> None:
    tokenizer = small_tokenizer()
    got = TextEncoder(tokenizer, TEXT_TEMPLATE, 512).encode_batch(["otters live"], "Retrieve")[0]
    first = int(got.ids[got.content_start])
    assert tokenizer.decode([first]) == " otters"  # one token: the space of "; " and the content's first word


@pytest.mark.parametrize("max_seq_length", [8, 9, 10, 16, 33])
def test_truncation_drops_the_end_of_the_content_and_keeps_eos(max_seq_length: int) -> None:
    tokenizer = small_tokenizer()
    content = " ".join(f"otters {i} 수달은" for i in range(30))
    want = tokenizer.encode(PREFIX + content + EOS, add_special_tokens=False).ids
    got = TextEncoder(tokenizer, TEXT_TEMPLATE, max_seq_length).encode_batch([content], None)[0]
    assert got.ids.tolist() == want[: max_seq_length - 1] + [want[-1]]
    assert got.num_tokens == len(want)


def test_a_text_of_exactly_the_length_is_whole() -> None:
    tokenizer = small_tokenizer()
    num = len(tokenizer.encode(PREFIX + "the otter" + EOS, add_special_tokens=False).ids)
    got = TextEncoder(tokenizer, TEXT_TEMPLATE, num).encode_batch(["the otter"], None)[0]
    assert len(got.ids) == got.num_tokens == num


def test_no_room_for_content_is_an_error() -> None:
    encoder = TextEncoder(small_tokenizer(), TEXT_TEMPLATE, 8)
    assert encoder.try_encode_batch(["otters", "river"], INSTRUCTION_KO) == [None, None]
    with pytest.raises(InputError, match="no room for content.*max_seq_length"):
        encoder.encode_batch(["otters"], INSTRUCTION_KO)


def test_a_batch_equals_its_texts_one_by_one() -> None:
    encoder = TextEncoder(small_tokenizer(), TEXT_TEMPLATE, 20)
    random.seed(0)
    contents = [random.choice(AWKWARD) for _ in range(40)]
    for content, got in zip(contents, encoder.encode_batch(contents, "query:"), strict=True):
        want = encoder.encode_batch([content], "query:")[0]
        assert got.ids.tolist() == want.ids.tolist()
        assert (got.content_start, got.num_tokens) == (want.content_start, want.num_tokens)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (f"{SEPARATOR}x", ("", "x")),
        (f"do; {SEPARATOR}x", ("do; ", "x")),
        (f"do; {SEPARATOR}a{SEPARATOR}b", ("do; ", f"a{SEPARATOR}b")),
        (f"a; b; {SEPARATOR}x", ("a; b; ", "x")),
        (f"지시문; {SEPARATOR}", ("지시문; ", "")),
        ("no separator", None),
        (f"how to type {SEPARATOR}", None),
        (f"do;{SEPARATOR}x", None),
        (f" {SEPARATOR}x", None),
        (f"a {SEPARATOR}b; {SEPARATOR}c", None),
    ],
)
def test_a_record_is_split_at_its_first_separator(text: str, want: tuple[str, str] | None) -> None:
    assert split_record(text) == want
    assert content_of(text) == (text if want is None else want[1])


def test_eos_of() -> None:
    want = small_tokenizer().token_to_id(EOS)
    assert eos_of(small_tokenizer(), TEXT_TEMPLATE) == (EOS, want)
    wrong = ("{text}", "no text<|im_end|>", "{text}\n<|im_end|>", "{text}<|im_end|>\n", "{text}{text}<|im_end|>")
    for template in wrong:
        with pytest.raises(InputError, match="text_template"):
            eos_of(small_tokenizer(), template)


def test_fingerprint_ignores_truncation_padding_and_post_processor_only(tokenizer_folder: Path) -> None:
    loaded = load_tokenizer(tokenizer_folder)
    want = tokenizer_fingerprint(loaded)
    other = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    other.enable_truncation(7)
    other.enable_padding(length=9)
    assert tokenizer_fingerprint(other) == want
    assert len(loaded.encode("the otter " * 20).ids) > 20
    other.add_tokens(["수달이"])
    assert tokenizer_fingerprint(other) != want


def test_load_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: not found"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="nowhere: not found"):
        load_tokenizer("/nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


@needs_shared
def test_ids_of_the_qwen_vocabulary() -> None:
    tokenizer = load_tokenizer(SHARED_FOLDER / "data" / "tokenizer")
    got = TextEncoder(tokenizer, TEXT_TEMPLATE, 512).encode_batch(["한국"], INSTRUCTION_KO)[0]
    assert got.ids[:3].tolist() == [151644, 872, 198]  # <|im_start|> user \n, as published for Qwen3
    assert got.ids[-1] == 151645
    assert got.ids[got.content_start :].tolist() == [130092, 151645]  # " 한국" is one token, [EOS] is no content


def test_an_instruction_that_ends_in_white_space_is_put_before_the_query_as_it_is() -> None:
    """The prompt of plain sentence-transformers models: no template's head, no `; `."""
    assert query_prefix("Find it") == "Find it; "
    assert query_prefix("Instruct: find it\nQuery: ") == "Instruct: find it\nQuery: "
    assert query_prefix(None) == query_prefix("") == ""
