"""Which retrieval benchmarks a `--data` or an `eval_data` means, and their loading.

    nanobeir                    the four of KURE: NanoMSMARCO and NanoNQ, Korean and English (the default)
    nanobeir:all                all 13 subsets of both languages
    nanobeir:ko                 KURE's two of one language; nanobeir:ko/all its 13
    nanobeir:en/NanoNQ          one subset; also en:NanoNQ, and NanoNQ for both languages
    DIR, ko:DIR                 a BEIR folder, a folder of the layout of a NanoBEIR data set (every subset; with
                                DIR/NanoNQ one), or a snapshot (everything in it); `ko:` sets the language, which
                                otherwise is decided by the share of Hangul
    ORG/NAME, de:ORG/NAME/NanoNQ  (also with hf:// in front of ORG) another NanoBEIR data set of the Hub
    ko:ORG/NAME[/PART][/SPLIT]  another retrieval set of the Hub, or a copy of its repository: `hub_sets`; a BEIR .zip
    suite:NAME                  a named list of sets: `suites`

With the environment variable ANCHOR_NANOBEIR=DIR, `nanobeir…` is read from the snapshot DIR instead of the Hub.
A set that cannot be loaded is an error that names it: an average over fewer sets is another number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from anchor_cli.base.errors import InputError, nearest
from anchor_cli.base.hub import is_hub_id
from anchor_cli.base.language import language_of
from anchor_cli.data.benchmarks.beir import CORPUS_FILE, QRELS_FILE, QUERIES_FILE, Benchmark, read_beir
from anchor_cli.data.benchmarks.hub_sets import RetrievalSet, read_zip, sets_of
from anchor_cli.data.benchmarks.nanobeir import (
    HUB_IDS,
    KURE_SUBSETS,
    MANIFEST_FILE,
    SUBSETS,
    is_nano_folder,
    read_nano,
    read_snapshot,
    snapshot_nanobeir,
    snapshot_sets,
    subset_named,
    subsets_of,
)
from anchor_cli.data.benchmarks.suites import suite_of

__all__ = ["Benchmark", "DEFAULT_DATA", "load_benchmarks", "snapshot_nanobeir"]

DEFAULT_DATA = ("nanobeir",)
SUITE = "suite:"
SNAPSHOT_VARIABLE = "ANCHOR_NANOBEIR"


Part = Callable[[], Benchmark]
"""One benchmark that a spec means, not yet read."""


def load_benchmarks(specs: Sequence[str] | None = None) -> list[Benchmark]:
    """The benchmarks that `specs` mean, in their order; without any, the four of KURE.

    Raises:
        InputError: a spec means nothing, a file of it is faulty, or two benchmarks have one name.
        RunError: the Hub cannot be reached.
    """
    parts = [(spec, part) for spec in specs or DEFAULT_DATA for part in parts_of(spec)]
    loaded: dict[str, tuple[str, Benchmark]] = {}
    for spec, read in parts:
        benchmark = read()
        if benchmark.name in loaded:
            raise InputError(
                f"--data {spec}: {benchmark.name} is given already, by --data {loaded[benchmark.name][0]}",
                "name each set once; a LANG: in front, or another folder name, distinguishes two",
            )
        loaded[benchmark.name] = spec, benchmark
    return [benchmark for _, benchmark in loaded.values()]


def is_hub_set(place: str) -> bool:
    """Whether a name without its `LANG:` means a data set of the Hub, or a part of it: OWNER/NAME[/PART][/SPLIT].

    Unlike a SOURCE of pairs it needs no `hf://`; with it, a folder of that name here is not looked at.
    """
    return place.startswith("hf://") or is_hub_id("/".join(place.split("/")[:2]))


def language_and_place(spec: str) -> tuple[str | None, str]:
    """`ko:DIR` -> (ko, DIR); without a language, or where a file has that very name, (None, spec)."""
    match = None if Path(spec).exists() else re.fullmatch(r"([a-z]{2,3}):(?!//)(.+)", spec)
    return (match[1], match[2]) if match else (None, spec)


def parts_of(spec: str) -> list[Part]:
    """The benchmarks that `spec` means, none of them read yet; only a Hub id without a subset asks the Hub.

    Raises:
        InputError: it means nothing.
    """
    if spec.startswith(SUITE):
        return _suite(spec.removeprefix(SUITE))
    if spec.lower() == "nanobeir" or spec.lower().startswith("nanobeir:"):
        return _nanobeir(spec)
    language, place = language_and_place(spec)
    if not Path(place).exists() and (place in SUBSETS or place.lower() == "nanobeir"):
        subset = place if place in SUBSETS else ""
        return [
            part for known in ([language] if language else HUB_IDS) for part in _nanobeir(f"nanobeir:{known}/{subset}")
        ]
    if Path(place).is_dir():
        return _folder(place, language)
    if place.endswith(".zip") and Path(place).is_file():
        return [partial(read_zip, Path(place), language)]
    if has_card(Path(place).parent):
        return _sets(str(Path(place).parent), [Path(place).name], language)
    if is_nano_folder(Path(place).parent) and not has_card(Path(place).parent):
        parent = str(Path(place).parent)
        return [partial(read_nano, parent, subset_named(Path(place).name, subsets_of(parent)), language)]
    if Path(place).exists():
        raise InputError(
            f"--data {spec}: {place} is a file",
            f"name the folder that holds {CORPUS_FILE}, {QUERIES_FILE} and {QRELS_FILE}",
        )
    if is_hub_set(place):
        owner, name, *names = place.removeprefix("hf://").removeprefix("datasets/").split("/")
        if names and names[0].startswith("Nano"):
            return [partial(read_nano, f"{owner}/{name}", each, language) for each in names]
        return _sets(f"{owner}/{name}", names, language)
    raise InputError(f"--data {spec}: no such folder and no such benchmark", _suggestion(place))


def has_card(folder: Path) -> bool:
    """Whether a folder is a copy of a Hub repository whose card names configurations."""
    card = folder / "README.md"
    return card.is_file() and "config_name:" in card.read_text(encoding="utf-8", errors="replace")


def _sets(source: str, names: list[str], language: str | None) -> list[Part]:
    """The sets of a repository in a layout of the Hub; those of NanoBEIR are read as its evaluator reads them."""
    sets = sets_of(source, names, language)
    if all(each.split.startswith("Nano") for each in sets):
        return [partial(read_nano, source, each.split, language) for each in sets]
    return [partial(_read_set, each) for each in sets]


def _read_set(each: RetrievalSet) -> Benchmark:
    benchmark = each.read()
    if each.language:
        return benchmark
    language = language_of(" ".join(benchmark.queries.values()))
    return replace(benchmark, language=language, name=f"{language}/{each.name}")


def _suite(name: str) -> list[Part]:
    suite = suite_of(name)
    return parts_of(suite) if isinstance(suite, str) else [each.read for each in suite]


def _suggestion(place: str) -> str:
    parent = Path(place).parent
    if parent.is_dir() and (near := nearest(Path(place).name, (path.name for path in parent.iterdir()))):
        return f"did you mean {parent / near}?"
    if near := nearest(place, ["nanobeir", *(f"nanobeir:{language}" for language in HUB_IDS), "nanobeir:all"]):
        return f"did you mean {near}?"
    return "expected nanobeir, nanobeir:ko/NanoNQ, a BEIR folder, or the Hub id of a NanoBEIR data set"


def _nanobeir(spec: str) -> list[Part]:
    """The parts of `nanobeir`, `nanobeir:all`, `nanobeir:LANG`, `nanobeir:LANG/all` and `nanobeir:LANG/SUBSET`."""
    language, _, subset = spec.partition(":")[2].partition("/")
    if language == "all" and not subset:
        wanted = [(known, name) for known in HUB_IDS for name in SUBSETS]
    elif language and language not in HUB_IDS:
        near = nearest(language, HUB_IDS)
        elsewhere = "for another language name a Hub data set, such as de:lightonai/NanoBEIR-de"
        hint = f"did you mean nanobeir:{near}?" if near else elsewhere
        raise InputError(f"--data {spec}: language {language!r}, expected one of {', '.join(HUB_IDS)}, or all", hint)
    else:
        subsets = SUBSETS if subset == "all" else (subset_named(subset),) if subset else KURE_SUBSETS
        wanted = [(known, name) for known in ([language] if language else HUB_IDS) for name in subsets]
    snapshot = os.environ.get(SNAPSHOT_VARIABLE)
    if snapshot:
        return [partial(read_snapshot, Path(snapshot), f"{known}/{name}") for known, name in wanted]
    return [partial(read_nano, HUB_IDS[known], name, known) for known, name in wanted]


def _folder(place: str, language: str | None) -> list[Part]:
    folder = Path(place)
    if (folder / MANIFEST_FILE).is_file():
        return [
            partial(read_snapshot, folder, name)
            for name in snapshot_sets(folder)
            if language is None or name.startswith(language + "/")
        ]
    if has_card(folder):
        return _sets(place, [], language)
    if is_nano_folder(folder):
        return [partial(read_nano, place, subset, language) for subset in subsets_of(place)]
    return [partial(read_beir, folder, language)]
