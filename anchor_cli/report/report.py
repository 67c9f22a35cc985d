"""`anchor report`: one or several runs as one self-contained HTML page. It needs no network, now or later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anchor_cli.base.errors import InputError, nearest
from anchor_cli.base.files import write_text_atomic
from anchor_cli.base.runs import RunFolder, remembered_runs
from anchor_cli.report.page import page
from anchor_cli.report.read import read_runs


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page and return where it is.

    Args:
        runs: run folders (`{output_dir}/{experiment_id}`); several are overlaid, in this order.
        out: the file to write; by default `report.html` in the run's folder, for several runs
            `report-<n>-runs.html` beside the first one.

    Raises:
        InputError: no run given, one given twice, a folder that is no run, a file in it that cannot be read.
    """
    if not runs:
        raise InputError("no run folder given", "anchor report RUN [RUN…]")
    places = [Path(run).resolve() for run in runs]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise InputError(f"{runs[index]}: given twice")
    records = read_runs(runs)
    if out is None:
        several = len(records) > 1
        out = places[0].parent / f"report-{len(records)}-runs.html" if several else RunFolder(places[0]).report
    target = Path(out)
    if target.is_dir():
        target = RunFolder(target).report
    write_text_atomic(target, page(records))
    return target


def find_run(name_or_path: str) -> Path:
    """A run folder by path, or by its experiment_id among the runs this user has started.

    Raises:
        InputError: neither, with the nearest name; or several, which are listed.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    known = [run for run in remembered_runs() if run.name == name_or_path]
    if len(known) == 1:
        return known[0]
    if known:
        raise InputError(f"{name_or_path}: several runs have this name: {', '.join(map(str, known))}", "name its path")
    near = nearest(name_or_path, [run.name for run in remembered_runs()])
    hint = f"did you mean {near}?" if near else "give a folder that has metrics.jsonl in it"
    raise InputError(f"{name_or_path}: no such run folder, and no run of that name is remembered", hint)
