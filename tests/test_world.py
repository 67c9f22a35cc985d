"""The demo's world: what is asked can be answered, what is held out stays out, every word is one token."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO, TEXT_TEMPLATE
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.data.text import TextEncoder, load_tokenizer
from anchor_cli.demo.lexicon import LEXICONS, QUESTION_FORMS
from anchor_cli.demo.tokenizer import train_small_tokenizer, train_text_tokenizer, write_small_tokenizer
from anchor_cli.demo.world import World, make_world, training_pairs, vocabulary, write_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_small_tokenizer(vocabulary(), ["user", INSTRUCTION_KO, INSTRUCTION_EN])


def test_a_seed_is_a_world(world: World) -> None:
    assert make_world(seed=0) == world
    assert make_world(seed=1) != world
    # golden: the same on every machine and Python
    assert [document.text for document in world.documents[:2]] == GOLDEN
    assert len({document.text for document in world.documents}) == len(world.documents) == 400
    assert Counter(document.language for document in world.documents) == {"ko": 200, "en": 200}


GOLDEN = ["지금도 강릉의 선장에게 대나무 모자 하나가 있다.", "The poet of Marlow keeps a silver flute."]


def test_every_question_has_exactly_one_right_document(world: World) -> None:
    """The words of a fact that a question names are all in its own document's fact, and in no other's."""
    by_fact = {document.id: set(vars(document.fact).values()) for document in world.documents}
    for document in world.documents:
        for pattern, question in zip(_lexicon(document.language).questions, document.questions, strict=True):
            named = {value for part, value in vars(document.fact).items() if "{" + part in pattern}
            assert len(named) >= 3 and all(word in question for word in named)
            assert [id_ for id_, fact in by_fact.items() if named <= fact] == [document.id], question


def _lists(lexicon: object) -> list[tuple[str, ...]]:
    return [getattr(lexicon, part) for part in ("jobs", "towns", "materials", "things")]


def _lexicon(language: str):  # type: ignore[no-untyped-def]
    return next(lexicon for lexicon in LEXICONS if lexicon.language == language)


def test_held_out_questions_are_not_trained_on_and_every_form_is(world: World) -> None:
    pairs = list(training_pairs(world))
    asked = {pair["anchor"] for pair in pairs}
    held_out = {document.questions[document.held_out] for document in world.documents}
    assert len(pairs) == world.num_pairs == 400 * (QUESTION_FORMS - 1)
    assert len(asked) == 2000 and not asked & held_out
    forms = Counter((document.language, document.held_out) for document in world.documents)
    assert set(forms.values()) == {33, 34} and len(forms) == 2 * QUESTION_FORMS


def test_beir_folders(world: World, tmp_path: Path) -> None:
    train, folders = write_world(world, tmp_path)
    assert [json.loads(line) for line in train.read_text("utf-8").splitlines()] == list(training_pairs(world))
    benchmarks = load_benchmarks([str(folder) for folder in folders])  # languages told from the script of the queries
    assert [(b.language, len(b.corpus), len(b.queries)) for b in benchmarks] == [("ko", 400, 200), ("en", 400, 200)]
    texts = {document.id: document for document in world.documents}
    for benchmark in benchmarks:
        for query, grades in benchmark.qrels.items():
            [(document, grade)] = grades.items()
            assert grade == 1 and benchmark.queries[query] == texts[document].questions[texts[document].held_out]
            assert benchmark.corpus[document] == texts[document].text


def test_more_documents_than_the_words_can_tell_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="the ko words give only"):
        make_world(0, num_documents=4000)


def test_every_word_is_one_token(world: World, tokenizer: Tokenizer) -> None:
    pieces = {*vocabulary(), *INSTRUCTION_KO.split(), *INSTRUCTION_EN.split()}
    tokens = Counter()
    for document in world.documents:
        for text in (document.text, *document.questions):
            encoded = tokenizer.encode(f"{INSTRUCTION_KO}; {text}", add_special_tokens=False)
            tokens.update(f"{INSTRUCTION_KO}; {text}"[start:end].strip() for start, end in encoded.offsets)
            assert tokenizer.decode(encoded.ids) == f"{INSTRUCTION_KO}; {text}"
    split_off = {piece.rstrip("?.,") for piece in pieces} | {"?", ".", ",", ";"}
    assert set(tokens) <= split_off
    # With a space before it, a fact's word is always the same token: the documents' and the questions' are one.
    for lexicon in LEXICONS:
        for word in (word for part in _lists(lexicon) for word in part):
            assert len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1


def test_template_and_offsets(tokenizer: Tokenizer) -> None:
    [text] = TextEncoder(tokenizer, TEXT_TEMPLATE, 64).encode_batch(
        ["전주의 시인에게 거울 하나가 있나요?"], INSTRUCTION_KO
    )
    assert [tokenizer.id_to_token(int(text.ids[at])) for at in (0, -1)] == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode(list(text.ids[text.content_start : -1])).strip() == "전주의 시인에게 거울 하나가 있나요?"


def test_transformers_and_ours_read_the_folder_alike(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """transformers 5 rebuilds the tokenizer of a qwen3 folder from its own code; odd texts show a difference."""
    from transformers import AutoTokenizer

    write_small_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    odd = ["", "\n\n 1234's café 漢字 🦦", "한 국 어!!  \t tab", "<|im_end|> 안 <|im_start|>"]
    for text in [*odd, *(document.text for document in world.documents[:20])]:
        whole = TEXT_TEMPLATE.format(text=text)
        assert theirs(whole, add_special_tokens=False)["input_ids"] == ours.encode(whole, add_special_tokens=False).ids
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_training_a_tokenizer_twice_gives_the_same(tokenizer: Tokenizer) -> None:
    again = train_small_tokenizer(vocabulary(), ["user", INSTRUCTION_KO, INSTRUCTION_EN])
    assert again.to_str() == tokenizer.to_str()
    texts = ["복지 급여는 주민센터에서 신청할 수 있다", "You can apply for the benefit at the centre"] * 3
    small = train_text_tokenizer(texts, vocab_size=300)
    assert small.get_vocab_size() == 300 and small.decode(small.encode(texts[0]).ids) == texts[0]
