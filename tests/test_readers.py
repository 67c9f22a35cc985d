"""The programs of docs/export.md read an export as we do: benchmarks/readers/run.py, one program a test.

Slow, and the first time it fills some 8 GB of environments below ~/.cache/anchor/readers (or $ANCHOR_READERS). A
program that cannot be installed or run on this machine is skipped with the reason.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from export_fixtures import make_checkpoint, make_contract

from anchor_cli.export.export import export

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "readers"))
import run as readers

CANNOT = {
    "llamacpp": "pre-tokenizer was not recognized",  # of a tokenizer that nobody published
    "llm2vec": "qwen3",  # its transformers 4.44 does not know it
}


@pytest.fixture(scope="module")
def texts(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, readers.Texts]:
    run = tmp_path_factory.mktemp("output") / "kure"
    run.mkdir()
    folder = export(make_checkpoint(run, 2, small_model, make_contract(small_model)), out=run / "stage2").folder
    return folder, readers.Texts(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", readers.READERS)
def test_a_program_reads_an_export_as_we_do(name: str, texts: tuple[Path, readers.Texts]) -> None:
    cache = Path(os.environ.get("ANCHOR_READERS") or Path.home() / ".cache" / "anchor" / "readers")
    row = readers.read(name, texts[0], cache, texts[1])
    if row["outcome"] == "not run":
        pytest.skip(row["why"])
    if name in CANNOT:
        assert row["outcome"] == "cannot" and CANNOT[name] in row["why"], row
    else:
        assert row["outcome"] == "works", row


def test_another_vector_is_told_from_ours() -> None:
    """The judgement can fail: one text's vector is turned a little."""
    import numpy as np

    mine = object.__new__(readers.Texts)
    mine.names, mine.ids, mine.vectors = ["a", "b", "c"], [[1], [2], [3]], np.eye(3)
    answer = {"vectors": [[1, 0, 0], [0, 1, 0.01], None], "versions": {}, "setting": ""}
    row = readers.judged(answer, mine)
    assert (row["outcome"], row["num_texts"], row["num_not_given"]) == ("differs", 2, 1)
    assert row["largest"] == pytest.approx(1 - 1 / np.sqrt(1 + 1e-4))
    assert [name for name, _ in row["differing"]] == ["b"]


def test_the_readme_names_the_programs_that_were_run_and_work_and_no_others() -> None:
    results = json.loads(readers.RESULTS.read_text(encoding="utf-8"))
    for page in ("README.md", "README.ko.md"):
        text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
        for name, reader in readers.READERS.items():
            works = any(row["outcome"] == "works" for row in results[name].values())
            assert (reader.title.split()[0] in text) == works, (page, name)
