"""Named lists of benchmarks: `anchor eval --suite NAME`, `eval_data: ["suite:NAME"]`.

    nanobeir         the four sets of KURE's training (the default of `anchor eval`)
    nanobeir-full    all 13 subsets, Korean and English
    kure             the eight Korean sets of KURE's leaderboard
    FILE             {"sets": [{"name": …, "source": …, "language": …, …}]}: the keys of `RetrievalSet`

`kure` holds what `eval/evaluate.py` of https://github.com/nlpai-lab/KURE (2024-12 to 2025) evaluates and
`eval/leaderboard.py` averages: eight task names of MTEB with Korean queries and documents, nDCG@10, where
MultiLongDocRetrieval is the mean of dev and test. What a name means (repository, configuration, split, revision) is
read from the tasks of mteb 2.26.24. The leaderboard's published figures were made with mteb 1.31 and its revisions.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from anchor_cli.base.errors import InputError, nearest
from anchor_cli.data.benchmarks.hub_sets import RetrievalSet

KURE = (
    RetrievalSet(
        "Ko-StrategyQA", "taeminlee/Ko-StrategyQA", "ko", "dev",
        revision="d243889a3eb6654029dbd7e7f9319ae31d58f97c",
    ),
    RetrievalSet(
        "AutoRAGRetrieval", "yjoonjang/markers_bm", "ko", "test",
        revision="fd7df84ac089bbec763b1c6bb1b56e985df5cc5c",
    ),
    RetrievalSet(
        "MIRACLRetrieval", "mteb/MIRACLRetrieval", "ko", "dev", part="ko",
        revision="9c09abc13478308c27598f350e31d8f06b9b5481",
    ),
    RetrievalSet(
        "PublicHealthQA", "xhluca/publichealth-qa", "ko", "test", part="korean",
        columns={"query": "question", "document": "answer"},
    ),
    RetrievalSet(
        "BelebeleRetrieval", "mteb/belebele", "ko", "test", part="kor_Hang",
        revision="979a211276faa22f671e69d096634193567cfd05",
        columns={"query": "question", "document": "flores_passage", "document_id": "link"},
    ),
    RetrievalSet(
        "MrTidyRetrieval", "mteb/mrtidy", "ko", "test", part="korean",
        revision="fc24a3ce8f09746410daee3d5cd823ff7a0675b7",
    ),
    *(
        RetrievalSet(
            f"MultiLongDocRetrieval-{split}", "mteb/MultiLongDocRetrieval", "ko", split, part="ko", weight=0.5,
            revision="837028901907a7d419b4ab906f28e011ce1cc824",
        )
        for split in ("dev", "test")
    ),
    RetrievalSet(
        "XPQARetrieval", "mteb/XPQARetrieval", "ko", "test", part="kor-kor",
        revision="fc4624be978945a0ceebbc4b85737258fe26330b",
    ),
)  # fmt: skip
Suite = tuple[RetrievalSet, ...] | str
SUITES: dict[str, Suite] = {"nanobeir": "nanobeir", "nanobeir-full": "nanobeir:all", "kure": KURE}
"""Sets by the suite's name, or the `--data` that means the same."""


def suite_of(name: str) -> Suite:
    """A suite by its name, or from a file. Raises InputError."""
    if name in SUITES:
        return SUITES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        near = nearest(name, SUITES)
        raise InputError(
            f"--suite {name}: no such suite and no such file",
            f"did you mean {near}?" if near else f"expected {', '.join(SUITES)} or a JSON file",
        )
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["sets"]
        assert isinstance(rows, list) and rows
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        message = f"{path}: not a suite: {type(error).__name__}: {error}"
        raise InputError(message, 'expected {"sets": [{"name": …, "source": …, "language": …}]}') from None
    return tuple(_set_of(row, f"{path}: set {number}", path.parent) for number, row in enumerate(rows, start=1))


def _set_of(row: Any, where: str, folder: Path) -> RetrievalSet:
    """One entry of a file; a relative path of its source is looked for beside the file, too."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: {row!r}, expected a JSON object")
    known = {each.name: each for each in fields(RetrievalSet)}
    for key in row:
        if key not in known:
            near = nearest(key, known)
            raise InputError(
                f"{where}: unknown key {key!r}", f"did you mean {near}?" if near else f"it has {', '.join(known)}"
            )
    for key, each in known.items():
        if key not in row and each.default is MISSING and each.default_factory is MISSING:
            raise InputError(f"{where}: no {key!r}")
    try:
        given = TypeAdapter(RetrievalSet).validate_json(json.dumps(row), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    columns = set(given.columns)
    if columns and not {"query", "document"} <= columns <= {"query", "document", "document_id"}:
        raise InputError(f"{where}: columns: expected query, document and perhaps document_id, not {sorted(columns)}")
    if given.weight <= 0:
        raise InputError(f"{where}: weight {given.weight}: expected a number above 0")
    beside = folder / given.source
    return replace(given, source=str(beside)) if beside.exists() else given
