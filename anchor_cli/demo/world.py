"""A small bilingual world made from a seed: facts, one-sentence documents about them, and questions.

Every fact is told by one document and asked for in six forms. One form of every document is held out for evaluation;
the other five are training pairs. All forms are seen in training, with other facts: a held-out question can only be
answered by a model whose embeddings hold the facts, not by one that has learned question-document pairs by heart.

    write_world(make_world(seed=0), folder)
        train.jsonl                              {"anchor", "positive", "language"} a line
        heldout-ko/  heldout-en/                 BEIR folders: corpus.jsonl (all documents of both languages),
                                                 queries.jsonl, qrels/test.tsv
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from anchor_cli.demo.lexicon import LEXICONS, QUESTION_FORMS, Lexicon

# No two facts of a world share the words of any three parts, and every question form names three or more.
UNIQUE = (
    ("job", "town", "material"),
    ("job", "town", "thing"),
    ("job", "material", "thing"),
    ("town", "material", "thing"),
)
_SLOT = re.compile(r"\{\w+\}")
_DRAWS_PER_FACT = 100


@dataclass(frozen=True)
class Fact:
    """Somebody of a town who keeps a thing; all words are of one language."""

    job: str
    town: str
    material: str
    thing: str


@dataclass(frozen=True)
class Document:
    """One fact with its sentence and its questions; `questions[held_out]` is for evaluation only."""

    id: str
    language: str
    fact: Fact
    text: str
    questions: tuple[str, ...]
    held_out: int

    @property
    def training_questions(self) -> tuple[str, ...]:
        return tuple(question for form, question in enumerate(self.questions) if form != self.held_out)


@dataclass(frozen=True)
class World:
    """All documents of one seed, the languages taking turns."""

    seed: int
    documents: tuple[Document, ...]

    @property
    def num_pairs(self) -> int:
        return sum(len(document.training_questions) for document in self.documents)


def fill(pattern: str, fact: Fact) -> str:
    """Put a fact's words into a pattern."""
    return pattern.format_map(asdict(fact))


def _draw_fact(lexicon: Lexicon, rng: random.Random) -> Fact:
    return Fact(
        job=rng.choice(lexicon.jobs),
        town=rng.choice(lexicon.towns),
        material=rng.choice(lexicon.materials),
        thing=rng.choice(lexicon.things),
    )


def _facts(lexicon: Lexicon, count: int, rng: random.Random) -> list[Fact]:
    """`count` facts, pairwise different in every set of UNIQUE.

    Raises:
        ValueError: when the word lists cannot give that many.
    """
    taken: list[set[tuple[str, ...]]] = [set() for _ in UNIQUE]
    facts: list[Fact] = []
    for _ in range(count * _DRAWS_PER_FACT):
        if len(facts) == count:
            break
        fact = _draw_fact(lexicon, rng)
        keys = [tuple(getattr(fact, part) for part in parts) for parts in UNIQUE]
        if any(key in seen for key, seen in zip(keys, taken, strict=True)):
            continue
        for key, seen in zip(keys, taken, strict=True):
            seen.add(key)
        facts.append(fact)
    if len(facts) < count:
        raise ValueError(f"the {lexicon.language} words give only {len(facts)} facts of {count}")
    return facts


def make_world(seed: int, num_documents: int = 400) -> World:
    """Make the world of a seed; the same seed gives the same world on every machine.

    Args:
        seed: any integer.
        num_documents: documents over all languages, shared out equally.

    Raises:
        ValueError: for more documents than the words can tell apart (some 1,000 a language).
    """
    rng = random.Random(f"anchor demo world {seed}")
    by_language: list[list[Document]] = []
    for index, lexicon in enumerate(LEXICONS):
        count = num_documents // len(LEXICONS) + (index < num_documents % len(LEXICONS))
        held_out = [position % QUESTION_FORMS for position in range(count)]
        rng.shuffle(held_out)
        by_language.append(
            [
                Document(
                    id=f"{lexicon.language}-{number:04d}",
                    language=lexicon.language,
                    fact=fact,
                    text=fill(lexicon.document, fact),
                    questions=tuple(fill(pattern, fact) for pattern in lexicon.questions),
                    held_out=held_out[number],
                )
                for number, fact in enumerate(_facts(lexicon, count, rng))
            ]
        )
    turns = [documents[i] for i in range(len(by_language[0])) for documents in by_language if i < len(documents)]
    return World(seed=seed, documents=tuple(turns))


def training_pairs(world: World) -> Iterator[dict[str, str]]:
    """Rows of the training set: a question that is not held out, and its document."""
    for document in world.documents:
        for question in document.training_questions:
            yield {"anchor": question, "positive": document.text, "language": document.language}


def vocabulary() -> list[str]:
    """Every word and particle the world can use, one entry each: what the small tokenizer learns as one token.

    Korean words and their particles are separate entries, so that 시인에게 and 시인의 share a token.
    """
    words: dict[str, None] = {}
    for lexicon in LEXICONS:
        for part in (lexicon.jobs, lexicon.towns, lexicon.materials, lexicon.things):
            words.update(dict.fromkeys(part))
        for pattern in (lexicon.document, *lexicon.questions):
            words.update(dict.fromkeys(_SLOT.sub(" ", pattern).split()))
    return list(words)


def _write_jsonl(path: Path, rows: Iterator[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_world(world: World, folder: Path) -> tuple[Path, list[Path]]:
    """Write a world's training pairs and one BEIR folder of held-out questions per language.

    Returns:
        The path of `train.jsonl`, and the BEIR folders (ko, en). Each folder's corpus holds all documents.
    """
    train = folder / "train.jsonl"
    _write_jsonl(train, training_pairs(world))
    benchmarks = []
    for lexicon in LEXICONS:
        language = lexicon.language
        asked = [document for document in world.documents if document.language == language]
        beir = folder / f"heldout-{language}"
        _write_jsonl(beir / "corpus.jsonl", ({"_id": d.id, "title": "", "text": d.text} for d in world.documents))
        _write_jsonl(beir / "queries.jsonl", ({"_id": f"q-{d.id}", "text": d.questions[d.held_out]} for d in asked))
        judgements = "".join(f"q-{document.id}\t{document.id}\t1\n" for document in asked)
        (beir / "qrels").mkdir(exist_ok=True)
        (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgements, encoding="utf-8")
        benchmarks.append(beir)
    return train, benchmarks
