"""Every causal architecture equals the stock model one text at a time, or is refused in words: docs name which."""

from __future__ import annotations

import pytest
from architecture_sweep import BEGIN, END, EQUAL, NOT_BUILT, PAGE, WRONG, architectures, sweep, table
from transformers import __version__


def rows_of(text: str) -> dict[str, str]:
    """{architecture: result} of the page's table."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:] if line]
    return {name: result for result, names in rows for name in names.split(", ")}


def page_table() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def test_a_few_architectures_are_as_the_page_says() -> None:
    few = ["bloom", "gpt_oss", "granite", "llama", "nemotron", "phi"]
    got = sweep(few)
    assert got == {name: result for name, result in rows_of(page_table()).items() if name in few}
    assert table(got).count("\n") == 2 + len(set(got.values())) and got["granite"] == EQUAL


@pytest.mark.slow
def test_every_architecture_equals_the_stock_model_or_is_refused_in_words() -> None:
    results = sweep(architectures())
    wrong = {name: result for name, result in results.items() if result.startswith(WRONG)}
    assert not wrong
    built = [name for name, result in results.items() if result != NOT_BUILT]
    assert len(built) >= 100
    if f"transformers {__version__}" in PAGE.read_text(encoding="utf-8"):
        said = rows_of(page_table())
        other = {
            n: (r, said.get(n)) for n, r in results.items() if said.get(n) != r and NOT_BUILT not in (r, said.get(n))
        }
        assert not other, "run python tests/architecture_sweep.py"
