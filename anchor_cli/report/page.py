"""The page of `anchor report`: its numbers and tables. Charts are in `panels`, layout in `templates/run.html.j2`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from anchor_cli.base import metric_names as names
from anchor_cli.report.charts import EVENT_COLOURS, SOFT
from anchor_cli.report.panels import all_benchmarks, retrieval_panels, run_colour, training_panels
from anchor_cli.report.read import MRR, NDCG, RunRecord
from anchor_cli.report.render import duration, number, render

_MARKS = {"resume": "▲", "stop": "■", "incident": "✕", "checkpoint_failed": "✕"}
_FOLDED_FROM = 13  # evaluations; so many are folded away


class Cell(NamedTuple):
    """A cell that is not plain text: with a star, a colour sample before it, or coloured."""

    text: str
    best: bool = False
    sample: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under column titles (a line break in a title is one on the page)."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    note: str = ""
    folded: bool = False
    text: bool = False
    """Cells are left-aligned text, not numbers."""


class Card(NamedTuple):
    """One number with its name above and where it comes from below; `kind`: "good", "bad" or none."""

    title: str
    value: str
    note: str
    kind: str = ""


def page(runs: Sequence[RunRecord]) -> str:
    """The whole document for one run, or for several overlaid."""
    run, several = runs[0], len(runs) > 1
    kinds = {event.kind for event in run.marked_events()} if not several else set()
    return render(
        "run.html.j2",
        title=f"{len(runs)} runs" if several else run.name,
        run=run,
        runs=runs,
        stages=sorted({one.stage for one in runs}),
        facts=[str(run.spec.get("model_name_or_path", "")), _steps_done(run), duration(run.trained_seconds())],
        overview=_runs_table(runs) if several else None,
        cards=list(_cards(run)),
        marks=[(mark, kind.replace("_", " "), EVENT_COLOURS[kind]) for kind, mark in _MARKS.items() if kind in kinds],
        retrieval=retrieval_panels(runs),
        scores=_score_table(runs),
        training=training_panels(runs),
        events=_events_table(runs),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _cards(run: RunRecord) -> Iterator[Card]:
    """The numbers one looks for first."""
    average, loss, memory = run.evaluation("avg"), run.series(names.LOSS), run.series(names.PEAK_MEMORY_GB)
    if len(average):
        step, value = average.best()
        first = f"{average.values[0]:.3f} at {average.steps[0]:,}"
        yield Card("best nDCG@10", f"{value:.3f}", f"average, at step {step:,}; {first}", "good")
        yield Card("last nDCG@10", f"{average.values[-1]:.3f}", f"average, at step {average.steps[-1]:,}")
    if len(loss):
        yield Card("loss", f"{loss.values[-1]:.3f}", f"from {loss.values[0]:.3f} at step {loss.steps[0]:,}")
    for key, title, note, scale in (
        (names.PAIRS_PER_S, "pairs per second", "median", 1.0),
        (names.TOKENS_PER_S, "tokens per second", "median", 1.0),
        (names.MFU, "MFU, %", "median, of the peak", 100.0),
    ):
        if len(run.series(key)):
            yield Card(title, _median(run, key, scale), note)
    if len(memory):
        yield Card("peak memory", f"{max(memory.values):.1f} GB", "one process")
    health = {key: run.evaluation("avg", key) for key in names.HEALTH_KEYS}
    if reason := names.collapse({key: series.values[-1] for key, series in health.items() if len(series)}):
        yield Card("embeddings", "collapsed", f"{reason.partition(':')[0]}, last evaluation", "bad")
    resumes, incidents = _troubles(run)
    yield Card("resumes / trouble", f"{resumes} / {incidents}", "events.jsonl", "bad" if incidents else "")


def _runs_table(runs: Sequence[RunRecord]) -> Table:
    """One row a run, with the colour that stands for it in the charts."""
    rows: list[list[str | Cell]] = []
    for index, run in enumerate(runs):
        average, loss = run.evaluation("avg"), run.series(names.LOSS)
        step, best = average.best() if len(average) else (0, 0.0)
        resumes, incidents = _troubles(run)
        rows.append([
            Cell(run.name, sample=run_colour(index)),
            run.state,
            f"{run.last_step:,}",
            duration(run.trained_seconds()),
            f"{best:.4f} at {step:,}" if len(average) else "–",
            f"{average.values[-1]:.4f}" if len(average) else "–",
            f"{loss.values[-1]:.3f}" if len(loss) else "–",
            _median(run, names.PAIRS_PER_S),
            _median(run, names.TOKENS_PER_S),
            _median(run, names.MFU, 100.0),
            f"{resumes} / {incidents}",
        ])  # fmt: skip
    columns = ["run", "state", "steps", "time", "best nDCG@10\naverage", "last\nnDCG@10", "loss", "pairs / s\nmedian",
               "tokens / s\nmedian", "MFU\nmedian, %", "resumes /\nincidents"]  # fmt: skip
    return Table(columns, rows)


def _troubles(run: RunRecord) -> tuple[int, int]:
    """Resumes, and incidents with failed saves."""
    resumes = sum(event.kind == "resume" for event in run.events)
    return resumes, sum(event.kind in ("incident", "checkpoint_failed") for event in run.events)


def _median(run: RunRecord, key: str, scale: float = 1.0) -> str:
    series = run.series(key)
    return number(statistics.median(series.values) * scale) if len(series) else "–"


def _steps_done(run: RunRecord) -> str:
    total = run.total_steps
    return f"step {run.last_step:,}" + (f" of {total:,}" if total else "")


def _score_table(runs: Sequence[RunRecord]) -> Table | None:
    """Every evaluation of a run; for several runs the step of the best average of each."""
    sets = ["avg", *all_benchmarks(runs)]
    keys = [(name, metric) for name in sets for metric in (NDCG, MRR)]
    titles = [f"{'average' if name == 'avg' else name}\n{'nDCG@10' if metric == NDCG else 'MRR@10'}"
              for name, metric in keys]  # fmt: skip
    rows: list[list[str | Cell]] = []
    for run in runs:
        columns = [dict(zip(series.steps, series.values)) for series in (run.evaluation(*key) for key in keys)]
        steps = sorted({step for column in columns for step in column})
        average = run.evaluation("avg")
        if len(runs) > 1:
            steps = [average.best()[0]] if len(average) else []
        for step in steps:
            cells = [_score(column, step, star=len(runs) == 1) for column in columns]
            rows.append([*([run.name] if len(runs) > 1 else []), f"{step:,}", *cells])
        if len(runs) > 1 and not steps:
            rows.append([run.name, *["–"] * (1 + len(keys))])
    if not any(run.benchmarks or len(run.evaluation("avg")) for run in runs):
        return None
    if len(runs) > 1:
        return Table(["run", "step", *titles], rows, "At the step of the best average")
    return Table(["step", *titles], rows, "Every evaluation", folded=len(rows) >= _FOLDED_FROM)


def _score(column: dict[int, float], step: int, *, star: bool) -> str | Cell:
    value = column.get(step)
    return "–" if value is None else Cell(f"{value:.4f}", best=star and value == max(column.values()))


def _events_table(runs: Sequence[RunRecord]) -> Table | None:
    """Start, resumes, stops, incidents; checkpoints and evaluations are counted, not listed."""
    rows: list[list[str | Cell]] = []
    counts = []
    for run in runs:
        for event in run.events:
            if event.kind in ("checkpoint", "evaluation"):
                continue
            when = datetime.fromtimestamp(event.time, UTC).strftime("%Y-%m-%d %H:%M:%S") if event.time else "–"
            kind = Cell(event.kind.replace("_", " "), colour=EVENT_COLOURS.get(event.kind, SOFT))
            details = "; ".join(
                f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
                for key, value in event.details.items()
            )
            rows.append([*([run.name] if len(runs) > 1 else []), when, f"{event.step:,}", kind, details])
        checkpoints = sum(event.kind == "checkpoint" for event in run.events)
        if checkpoints:
            of_run = f" ({run.name})" if len(runs) > 1 else ""
            counts.append(f"{checkpoints:,} checkpoint{'s' * (checkpoints > 1)} saved{of_run}")
        if run.superseded:
            counts.append(f"{run.superseded:,} logged lines left out: trained again after a resume")
    columns = [*(["run"] if len(runs) > 1 else []), "time (UTC)", "step", "event", "details"]
    return Table(columns, rows, note="; ".join(counts), text=True) if rows else None
