"""`anchor prepare`: pairs from anywhere become a checked, tokenised, memory-mapped training set."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from anchor_cli.base.errors import InputError
from anchor_cli.commands.options import AsJson

NANOBEIR = "nanobeir"


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="A save_to_disk folder; .jsonl .json .csv .tsv .parquet, plain, .gz or .zst; a quoted glob; "
            f"hf://OWNER/NAME. Or the word {NANOBEIR}: a snapshot of the evaluation sets.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make; must not exist.")],
    query_column: Annotated[str | None, typer.Option(help="Column of the query. [guessed]")] = None,
    document_column: Annotated[str | None, typer.Option(help="Column of the document, or of a list. [guessed]")] = None,
    language_column: Annotated[
        str | None, typer.Option(help="Column of the language. [guessed, else decided by the script: ko or en]")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model folder, tokenizer.json or Hub id. [Qwen/Qwen3-0.6B]", metavar="MODEL")
    ] = None,
    max_seq_length: Annotated[
        int | None, typer.Option(min=5, help="Tokens of a text, template and [EOS] included. [512]", show_default=False)
    ] = None,
    instruction: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[LANG=]TEXT",
            help="Instruction of training queries of one language, or of all others; may be repeated. '*=': of the "
            "named languages only, '*=TEXT': of all others. [Korean]",
        ),
    ] = None,
    text_template: Annotated[
        str | None, typer.Option(help="Text around {text}; ends in [EOS]; \\n is a line break.")
    ] = None,
    spec: Annotated[
        Path | None, typer.Option(help="Take model, length, template and instructions from a run spec.")
    ] = None,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Worker processes. [all cores]")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a DatasetDict or Hub data set. [train]")] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W…", help="Mix sources by weight, one number each. [all rows of each]")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BEIR_DIR",
            help=f"Leave out rows that are in this benchmark; {NANOBEIR} works too; may be repeated.",
        ),
    ] = None,
    exclude_ngram: Annotated[int, typer.Option(min=2, help="Equal words in a row that count as a leak.")] = 13,
    separator_as_text: Annotated[
        bool,
        typer.Option(
            "--separator-as-text",
            help="Read !@#$%^&*() as text. By default `{instruction}; !@#$%^&*(){query}` brings its own instruction.",
        ),
    ] = False,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="Leave out nearly equal pairs too (MinHash; slower).")
    ] = False,
    stage: Annotated[
        Literal["I", "II"] | None,
        typer.Option(help="II: keep hard negatives and teacher scores, too. [of --spec, else I]", show_default=False),
    ] = None,
    max_characters: Annotated[int, typer.Option(min=1, help="Reject texts with more characters.")] = 1_000_000,
    as_json: AsJson = False,
) -> None:
    """Check, tokenise and write training pairs; ends with a table of what was kept and why the rest was not."""
    from anchor_cli.base.console import console, print_json

    if sources[0] == NANOBEIR and not Path(NANOBEIR).exists():
        if len(sources) > 1:
            raise InputError(f"{NANOBEIR} stands alone, found also {sources[1]}")
        _snapshot(out, as_json)
        return
    from anchor_cli.data.prepare.prepare import Options
    from anchor_cli.data.prepare.prepare import prepare as prepare_pairs
    from anchor_cli.data.prepare.summary import print_summary

    contract = _contract_options(tokenizer, max_seq_length, text_template, instruction, spec)
    stage_of_spec = contract.pop("stage")
    summary = prepare_pairs(
        sources,
        out,
        **contract,
        num_proc=num_proc or len(os.sched_getaffinity(0)),
        options=Options(
            query_column=query_column,
            document_column=document_column,
            language_column=language_column,
            split=split,
            subset=subset,
            weights=_weights(weights),
            exclude=tuple(exclude or ()),
            exclude_ngram=exclude_ngram,
            separator_as_text=separator_as_text,
            near_duplicates=near_duplicates,
            max_characters=max_characters,
            negatives=(stage or stage_of_spec) == "II",
        ),
    )
    print_summary(summary, contract["max_seq_length"], console())
    if as_json:
        print_json(summary.as_dict())


def _snapshot(out: Path, as_json: bool) -> None:
    from anchor_cli.base.console import print_json, say
    from anchor_cli.data.benchmarks.benchmarks import snapshot_nanobeir

    manifest = snapshot_nanobeir(out)
    for name, entry in manifest["sets"].items():
        say(f"{name}: {entry['queries']:,} queries, {entry['documents']:,} documents")
    say(f"evaluate with: anchor eval --data {out}, or set ANCHOR_NANOBEIR={out}")
    if as_json:
        print_json({"out": str(out), **manifest})


def _contract_options(
    tokenizer: str | None,
    max_seq_length: int | None,
    text_template: str | None,
    instruction: list[str] | None,
    spec: Path | None,
) -> dict[str, Any]:
    """What decides the token ids: the options, else the spec's values, else KURE's."""
    from anchor_cli.base.contract import INSTRUCTION_KO, NO_OTHERS, with_line_breaks

    options: dict[str, Any] = {"tokenizer": "Qwen/Qwen3-0.6B", "max_seq_length": 512, "stage": "I"}
    if spec is not None:
        from anchor_cli.spec.load import load_spec

        run = load_spec(spec)
        options = {
            "tokenizer": run.model_name_or_path,
            "max_seq_length": run.max_seq_length,
            "text_template": run.text_template,
            "instructions": run.query_instructions,
            "training_instructions": run.training_instructions,
            "stage": run.stage,
        }
    if instruction:
        named = _instructions([with_line_breaks(text) for text in instruction if text != NO_OTHERS])
        others = {} if NO_OTHERS in instruction else options.get("training_instructions", {"*": INSTRUCTION_KO})
        options["training_instructions"] = named | {key: others[key] for key in others if key not in named}
    text_template = with_line_breaks(text_template) if text_template else text_template
    given = {"tokenizer": tokenizer, "max_seq_length": max_seq_length, "text_template": text_template}
    return options | {key: value for key, value in given.items() if value is not None}


def _instructions(given: list[str]) -> dict[str, str]:
    """`ko=…` by language, `eng_Latn=…` and `zh-TW=…` too; what does not begin with a name and `=` is for all others.

    Raises:
        InputError: two instructions for the same rows.
    """
    instructions: dict[str, str] = {}
    for text in given:
        language, text = text.split("=", 1) if _LANGUAGE.match(text) else ("*", text)
        if language in instructions:
            of = "all other languages" if language == "*" else language
            raise InputError(f"--instruction: two for {of}: {instructions[language]!r} and {text!r}")
        instructions[language] = text
    return instructions


_LANGUAGE = re.compile(r"(\*|[\w-]{2,20})=")


def _weights(given: str | None) -> tuple[float, ...]:
    try:
        weights = tuple(float(weight) for weight in given.split(",")) if given else ()
    except ValueError:
        weights = (math.nan,)
    if not all(map(math.isfinite, weights)):
        raise InputError(f"--weights {given}: expected numbers, such as 2,1")
    return weights
