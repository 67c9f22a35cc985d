"""Token ids of an export, as other tools make them of `prompt + text`, against our rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_fixtures import AWKWARD
from export_fixtures import PIECES, make_contract, random_texts, texts_around_limit
from tokenizers import Tokenizer

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO, TextContract
from anchor_cli.data.text import BASE_TOKENIZER, TextEncoder, load_tokenizer, tokenizer_fingerprint
from anchor_cli.export.files import prompts
from anchor_cli.export.tokenizer import WHITE_SPACE, with_joined_merges, write_tokenizer

HEAD = "<|im_start|>user\n"


def naive_ids(base: Tokenizer, contract: TextContract, content: str, instruction: str | None) -> list[int]:
    """Design §2 in three lines: strip, template, tokenise once; truncation keeps [EOS]."""
    text = (f"{instruction}; {content}" if instruction else content).strip()
    ids = base.encode(contract.text_template.replace("{text}", text), add_special_tokens=False).ids
    return list(ids) if len(ids) <= contract.max_seq_length else [*ids[: contract.max_seq_length - 1], ids[-1]]


@pytest.fixture(scope="session")
def exported_tokenizer(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TextContract]:
    folder, contract = tmp_path_factory.mktemp("tokenizer"), make_contract(small_model)
    write_tokenizer(small_model, folder, contract)
    (folder / "config.json").write_text((small_model / "config.json").read_text())
    return folder, contract


def differing(folder: Path, contract: TextContract, texts: list[str]) -> list[str]:
    """Texts, as documents and as queries, whose ids by the raw library or by transformers are not ours."""
    from transformers import AutoTokenizer

    base, raw = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(str(folder))
    named = prompts(contract)
    found = []
    for prompt, instruction in (("document", None), ("query_ko", INSTRUCTION_KO), ("query_en", INSTRUCTION_EN)):
        by_transformers = theirs([named[prompt] + text for text in texts], truncation=True)["input_ids"]
        for text, ids in zip(texts, by_transformers, strict=True):
            want = naive_ids(base, contract, text, instruction)
            if ids != want or raw.encode(named[prompt] + text).ids != want:
                found.append(f"{prompt} {text!r}: want {want}, got {ids}")
    return found


def test_ids_are_ours_for_awkward_texts(exported_tokenizer: tuple[Path, TextContract]) -> None:
    texts = [text for text in AWKWARD if not text.rstrip().endswith("<|im_end|>")]
    texts += ["", " ", "\n", "\u3000\x1c", "x <|im_start|> y", " <think>", "a  <|im_end|>  b", HEAD + " x", "user\n x"]
    assert differing(*exported_tokenizer, texts) == []


def test_ids_are_ours_for_random_texts_around_the_limit(exported_tokenizer: tuple[Path, TextContract]) -> None:
    folder, contract = exported_tokenizer
    encoder = TextEncoder(load_tokenizer(folder), contract.text_template, contract.max_seq_length)
    texts = texts_around_limit(lambda text: encoder.encode_batch([text], None)[0].num_tokens, 48, 60, seed=1)
    assert differing(folder, contract, texts + random_texts(140, seed=2)) == []


def test_ids_are_ours_with_the_real_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    contract = make_contract(shared_data / "tokenizer", max_seq_length=64)
    write_tokenizer(shared_data / "tokenizer", tmp_path, contract)
    config = shared_data / "configs" / "Qwen3-0.6B.config.json"
    (tmp_path / "config.json").write_text(config.read_text())
    assert differing(tmp_path, contract, random_texts(200, seed=3) + list(PIECES)) == []


def test_every_white_space_is_stripped_and_nothing_else(exported_tokenizer: tuple[Path, TextContract]) -> None:
    folder, contract = exported_tokenizer
    assert len(WHITE_SPACE) == 29 and all(character.isspace() for character in WHITE_SPACE)
    near = ["\u200b", "\u200c", "\u2060", "\ufeff", "\u180e", "\x00", "\x1b"]
    assert differing(folder, contract, [f"{c}x{c}" for c in [*WHITE_SPACE, *near]]) == []


def test_a_text_in_its_whole_template_is_not_closed_twice(exported_tokenizer: tuple[Path, TextContract]) -> None:
    """LLM2Vec and its forks write the template themselves and then tokenise with special tokens."""
    from transformers import AutoTokenizer

    folder, contract = exported_tokenizer
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    templated = contract.text_template.replace("{text}", "수달은 강에 산다")
    want = naive_ids(load_tokenizer(folder), contract, "수달은 강에 산다", None)
    assert tokenizer(templated)["input_ids"] == want
    assert tokenizer("<|im_end|>")["input_ids"] == [contract.eos_token_id] * 2, "[EOS] alone is text"


def test_the_known_differences_are_those_of_the_documentation(exported_tokenizer: tuple[Path, TextContract]) -> None:
    """docs/export.md names two kinds of text that differ; this fails when one of them no longer does."""
    folder, contract = exported_tokenizer
    assert differing(folder, contract, ["it ends in <|im_end|>"]) != []
    assert differing(folder, contract, ["x<|im_end|>\u0338y"]) != []


def test_padding_sides_and_config(exported_tokenizer: tuple[Path, TextContract]) -> None:
    from transformers import AutoTokenizer

    folder, contract = exported_tokenizer
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 48
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    for side in ("left", "right"):
        batch = tokenizer([HEAD + "a", HEAD + "a b c d e f g"], padding=True, padding_side=side)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            kept = [token for token, real in zip(ids, mask, strict=True) if real]
            assert kept[-1] == contract.eos_token_id and kept.count(contract.eos_token_id) == 1
        assert set(batch) == {"input_ids", "attention_mask"}, "no token_type_ids: decoders refuse them"


def test_saved_by_transformers_and_loaded_again_it_is_the_same(
    exported_tokenizer: tuple[Path, TextContract], tmp_path: Path
) -> None:
    """What Stage II saves must not lose a rule."""
    from transformers import AutoTokenizer

    folder, _ = exported_tokenizer
    before = AutoTokenizer.from_pretrained(str(folder))
    before.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    after = AutoTokenizer.from_pretrained(str(tmp_path))
    texts = [HEAD + text for text in random_texts(60, seed=4)] + [HEAD, HEAD + " x <|im_end|> y ", HEAD + "x<|im_end|>"]
    want = before(texts, truncation=True)["input_ids"]
    assert after(texts, truncation=True)["input_ids"] == want
    assert after.model_max_length == 48 and after.padding_side == "left"


def test_the_untouched_tokenizer_is_kept(exported_tokenizer: tuple[Path, TextContract], small_model: Path) -> None:
    folder, contract = exported_tokenizer
    want = (small_model / "tokenizer.json").read_bytes()
    assert (folder / BASE_TOKENIZER / "tokenizer.json").read_bytes() == want
    assert tokenizer_fingerprint(load_tokenizer(folder)) == contract.tokenizer_fingerprint
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "chat_template" not in config and "add_eos_token" not in config


def test_merges_are_written_as_every_tokenizers_release_reads_them(
    exported_tokenizer: tuple[Path, TextContract], small_model: Path
) -> None:
    """tokenizers before 0.20, which the llm2vec package pins, reads a merge as one text; ids are the same."""
    folder, _ = exported_tokenizer
    written = json.loads((folder / "tokenizer.json").read_text())["model"]
    pairs = json.loads((small_model / "tokenizer.json").read_text())["model"]["merges"]
    assert written["merges"] == [f"{a} {b}" for a, b in pairs]
    with_blank = {"type": "BPE", "merges": [["a b", "c"], ["d", "e"]]}
    assert with_joined_merges(with_blank) == with_blank
