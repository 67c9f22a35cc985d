"""`anchor prepare`: pairs from anywhere become one checked, tokenised, memory-mapped folder.

Sources are read in order; their parts go to worker processes (parse, check, tokenise: `rows`) and come back in order;
duplicates are decided in one process, part after part, and rows are written as they come (`keeper`). So the result does
not depend on the number of processes, and memory not on the number of rows. The folder appears by one rename.
"""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from anchor_cli.base.console import progress, say
from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO, TEXT_TEMPLATE, TextContract
from anchor_cli.base.errors import InputError
from anchor_cli.base.files import (
    is_abandoned,
    staged_folder,
    this_host,
    words_for_disk_errors,
    writer_of,
)
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.data.pairs import SCORE_COLUMNS
from anchor_cli.data.prepare.keeper import Keeper
from anchor_cli.data.prepare.leaks import NGRAM_WORDS, LeakIndex
from anchor_cli.data.prepare.near import require_library
from anchor_cli.data.prepare.summary import PrepareSummary
from anchor_cli.data.prepare.work import EvenSample, Task, Work
from anchor_cli.data.prepare.workers import in_order
from anchor_cli.data.sources.files import Limits
from anchor_cli.data.sources.sources import Source, SourceOptions, check_split_options, open_source, require_there
from anchor_cli.data.text import TextEncoder, contract_with, load_tokenizer

_SMALL_ROWS, _SMALL_BYTES = 3000, 1 << 20  # less is done before another process has started


@dataclass(frozen=True)
class Options(SourceOptions):
    """What is asked of `prepare` beside sources, place and contract."""

    weights: tuple[float, ...] = ()
    """Rows by weight, one a source: the source with the fewest rows for its weight is taken whole."""
    exclude: tuple[str, ...] = ()
    """Benchmarks, as for `anchor eval --data`, whose texts must not be trained on."""
    exclude_ngram: int = NGRAM_WORDS
    """Words in a row that count as a leak."""
    separator_as_text: bool = False
    """Take `!@#$%^&*()` for text; by default it marks a record with an instruction of its own."""
    near_duplicates: bool = False
    """Leave out nearly equal pairs too."""
    max_characters: int = 1_000_000
    """Of a text; longer ones are rejected."""

    def as_given(self) -> dict[str, Any]:
        """Those that are set, for the manifest."""
        return {key: value for key, value in vars(self).items() if key != "reported" and value not in (None, (), False)}


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | Path,
    max_seq_length: int = 512,
    text_template: str = TEXT_TEMPLATE,
    instructions: dict[str, str] | None = None,
    training_instructions: dict[str, str] | None = None,
    num_proc: int = 1,
    options: Options | None = None,
) -> PrepareSummary:
    """Prepare `sources` into the new folder `out`.

    Args:
        sources: folders, files, globs, Hub ids; see `sources`. The first of two equal rows is the one that stays.
        out: must not exist.
        tokenizer: model folder, tokenizer.json or Hub id.
        max_seq_length: tokens of a text, template and [EOS] included.
        instructions: query instruction by language, for evaluation; goes into the contract.
        training_instructions: instruction of a row's query by language, `*` for every other language.
        num_proc: worker processes; changes the speed only.

    Raises:
        InputError: sources, columns, template or instructions are not right, or no row is left.
        RunError: a worker process died, the disk is full, or the Hub cannot be reached.
    """
    options, out, started = options or Options(), Path(out), time.monotonic()
    _clear_unfinished(out)
    require_there(sources)
    contract = _contract(
        load_tokenizer(tokenizer),
        max_seq_length=max_seq_length,
        text_template=text_template,
        instructions=instructions or {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN},
        training_instructions=training_instructions or {"*": INSTRUCTION_KO},
    )
    if options.near_duplicates:
        require_library()
    disk_errors = words_for_disk_errors(out, remedy="make room, or choose another place with --out")
    with disk_errors, staged_folder(out) as staged:
        scratch = staged / "scratch"
        scratch.mkdir()
        leaks = _leak_folder(options, scratch)
        work = Work(str(tokenizer), contract, Limits(options.max_characters), leaks, options.near_duplicates)
        work = replace(work, negatives=options.negatives, separator_as_text=options.separator_as_text)
        summary = _write_all(list(sources), staged, scratch, work, options, num_proc, out)
    for note in summary.tally.instructions.notes() if options.reported is not None else ():
        say(note)
    summary.seconds = time.monotonic() - started
    return summary


def _write_all(
    specs: list[str], staged: Path, scratch: Path, work: Work, options: Options, num_proc: int, out: Path
) -> PrepareSummary:
    sources = [open_source(spec, options) for spec in specs]
    check_split_options(specs, options)
    _require_language_columns(sources, work.contract)
    work = replace(work, scores=_scores_of_all(sources) if options.negatives else ())
    samples = _samples_by_weight(sources, options.weights, work.limits)
    hints = [sample.wanted if sample else source.rows_hint for source, sample in zip(sources, samples, strict=True)]
    total = None if None in hints else sum(hint for hint in hints if hint is not None)
    keeper = Keeper(staged, scratch, work.schema, near=options.near_duplicates)
    names: deque[str] = deque()
    tasks = _tasks(sources, samples, work.limits, names)
    small = sum(source.num_bytes or _SMALL_BYTES for source in sources) < _SMALL_BYTES
    small = small if total is None else total < _SMALL_ROWS
    begun: float | None = None
    with progress("prepare", total, "rows") as bar:
        for prepared, seconds in in_order(tasks, work, 1 if small else num_proc):
            begun = begun or time.monotonic() - seconds  # so the start of processes and tokenizers is no work on rows
            keeper.take(names.popleft(), prepared)
            bar.advance(prepared.num_in)
    rows_seconds = time.monotonic() - (begun or 0.0)
    shutil.rmtree(scratch)
    summary = keeper.finish(out, sources, work, options.as_given())
    summary.rows_seconds = rows_seconds
    return summary


def _contract(tokenizer: Tokenizer, **values: Any) -> TextContract:
    contract = contract_with(tokenizer, **values)
    encoder = TextEncoder(tokenizer, contract.text_template, contract.max_seq_length)
    for language, instruction in contract.training_instructions.items():
        if encoder.try_encode_batch(["a"], instruction or None)[0] is None:
            raise InputError(
                f"instruction {language!r} and template leave no room for content in {contract.max_seq_length} tokens",
                "raise --max-seq-length or shorten the instruction",
            )
    return contract


def _require_language_columns(sources: list[Source], contract: TextContract) -> None:
    """Hangul tells Korean from English; other languages need a column."""
    others = sorted(set(contract.training_instructions) - {"*", "ko", "en"})
    for source in sources:
        for file in source.files:
            if others and file.columns.language is None:
                raise InputError(
                    f"{file.name}: instructions for {', '.join(others)}, but no language column; "
                    "only ko and en are decided by the script",
                    "name it with --language-column NAME",
                )


def _scores_of_all(sources: list[Source]) -> tuple[str, ...]:
    """The columns of scores that every file has; those that some lack are left out, with a line that says so."""
    having = [file.columns.scores for source in sources for file in source.files]
    names = [name for columns in SCORE_COLUMNS for name in columns if any(name in one for one in having)]
    if lacking := [name for name in names if not all(name in one for one in having)]:
        say(f"{', '.join(lacking)} left out: not every source has them")
    return tuple(name for name in names if name not in lacking)


def _samples_by_weight(sources: list[Source], weights: Sequence[float], limits: Limits) -> list[EvenSample | None]:
    """Which rows of each source are taken; None: all."""
    if not weights:
        return [None] * len(sources)
    if len(weights) != len(sources) or min(weights) <= 0:
        raise InputError(f"--weights: {len(weights)} weights for {len(sources)} sources, expected one above 0 for each")
    sizes = [source.count_rows(limits) for source in sources]
    unit = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    samples: list[EvenSample | None] = []
    for source, size, weight in zip(sources, sizes, weights, strict=True):
        wanted = min(round(unit * weight), size)
        samples.append(EvenSample(wanted, size) if size else None)
        say(f"{source.spec}: {wanted:,} of {size:,} rows by weight {weight:g}")
    return samples


def _tasks(
    sources: list[Source], samples: list[EvenSample | None], limits: Limits, names: deque[str]
) -> Iterator[Task]:
    """Every part of every file, in order; the file's name goes to `names` at the same time."""
    for source, sample in zip(sources, samples, strict=True):
        first = 0
        for file in source.files:
            for part in file.parts(limits):
                names.append(file.name)
                yield Task(part, file.columns, sample, first)
                first += part.num_rows


def _leak_folder(options: Options, scratch: Path) -> Path | None:
    if not options.exclude:
        return None
    folder = scratch / "leaks"
    folder.mkdir()
    benchmarks = load_benchmarks(list(options.exclude))
    LeakIndex.build(benchmarks, options.exclude_ngram).save(folder)
    return folder


def _clear_unfinished(out: Path) -> None:
    """Remove what an earlier, killed run of this host left beside `out`; refuse to work beside a live one.

    On a shared disk that of another host stays: whether its process is alive cannot be seen from here.
    """
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.partial-*")):
        host, process = writer_of(left) or ("", 0)
        if is_abandoned(left) or (host, process) == (this_host(), os.getpid()):
            say(f"{left}: left by a run that was stopped; removed, starting over")
            shutil.rmtree(left, ignore_errors=True)
        elif host == this_host():
            remedy = f"stop it, or remove {left} if that is another program"
            raise InputError(f"{out}: process {process} is preparing it", remedy)
        elif host:
            say(f"{left}: begun by process {process} of {host}; left untouched, delete it if that process is gone")
