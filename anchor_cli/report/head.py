"""The head of the report page: for one run its state and the numbers one looks for first, for several a table."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence

from anchor_cli.base import metric_names as names
from anchor_cli.report.charts import COLOURS
from anchor_cli.report.html import card, cell_table, duration, number
from anchor_cli.report.read import RunRecord

_STATES = {
    "finished": "finished · 완료",
    "stopped": "stopped · 중지",
    "failed": "failed · 실패",
    "open": "not ended · 진행 중",
}


def run_colour(index: int) -> str:
    """The colour that stands for run `index` all over the page."""
    return COLOURS[index % len(COLOURS)]


def head(runs: Sequence[RunRecord], title: str) -> str:
    heading = f'<header><p class="kicker">anchor · Stage I report</p><h1>{html.escape(title)}</h1>'
    if len(runs) > 1:
        return heading + _runs_table(runs) + "</header>"
    run = runs[0]
    facts = [str(run.spec.get("model_name_or_path", "")), _step_text(run), duration(run.trained_seconds())]
    chips = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts if fact)
    return (
        f'{heading}<p class="run"><em class="{run.state}">{_STATES[run.state]}</em>{chips}</p>'
        f'<div class="cards">{"".join(_cards(run))}</div></header>'
    )


def _runs_table(runs: Sequence[RunRecord]) -> str:
    """One line a run, with the colour that stands for it below."""
    rows = []
    for index, run in enumerate(runs):
        average, loss = run.evaluation("avg"), run.series(names.LOSS)
        step, best = average.best() if len(average) else (0, 0.0)
        resumes, incidents = _counts(run)
        rows.append([
            f'<i class="swatch" style="background:{run_colour(index)}"></i><b>{html.escape(run.name)}</b>',
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
    return cell_table("", columns, rows, html_column=0)


def _counts(run: RunRecord) -> tuple[int, int]:
    resumes = sum(event.kind == "resume" for event in run.events)
    return resumes, sum(event.kind in ("incident", "checkpoint_failed") for event in run.events)


def _median(run: RunRecord, key: str, scale: float = 1.0) -> str:
    series = run.series(key)
    return number(statistics.median(series.values) * scale) if len(series) else "–"


def _step_text(run: RunRecord) -> str:
    total = run.total_steps
    return f"step {run.last_step:,}" + (f" of {total:,}" if total else "")


def _cards(run: RunRecord) -> list[str]:
    """The numbers one looks for first."""
    cards = []
    average = run.evaluation("avg")
    if len(average):
        step, value = average.best()
        first = f"{average.values[0]:.3f} at {average.steps[0]:,}"
        cards.append(card("best nDCG@10", f"{value:.3f}", f"average, at step {step:,}; {first}", "good"))
        cards.append(card("last nDCG@10", f"{average.values[-1]:.3f}", f"average, at step {average.steps[-1]:,}"))
    loss = run.series(names.LOSS)
    if len(loss):
        cards.append(card("loss", f"{loss.values[-1]:.3f}", f"from {loss.values[0]:.3f} at step {loss.steps[0]:,}"))
    for key, title, unit, scale in (
        (names.PAIRS_PER_S, "pairs per second", "median", 1.0),
        (names.TOKENS_PER_S, "tokens per second", "median", 1.0),
        (names.MFU, "MFU, %", "median, of the peak", 100.0),
    ):
        if len(run.series(key)):
            cards.append(card(title, _median(run, key, scale), unit))
    memory = run.series(names.PEAK_MEMORY_GB)
    if len(memory):
        cards.append(card("peak memory", f"{max(memory.values):.1f} GB", "one process"))
    resumes, incidents = _counts(run)
    bad = "bad" if incidents else ""
    cards.append(card("resumes / trouble", f"{resumes} / {incidents}", "events.jsonl", bad))
    return cards
