"""The page of `anchor report`: which panels there are and in what order. One function a panel, each returns HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from anchor_cli.base import metric_names as names
from anchor_cli.report.charts import COLOURS, EVENT_COLOURS, Chart, Line, render
from anchor_cli.report.data_panel import data_panel
from anchor_cli.report.head import head, run_colour
from anchor_cli.report.html import STYLE, cell_table, duration, key_table, legend, number, panel
from anchor_cli.report.read import MRR, NDCG, Event, RunRecord, Series

_PERFORMANCE = (
    (names.PAIRS_PER_S, "Pairs per second", "초당 쌍", "pairs / s, all processes", 1.0),
    (names.TOKENS_PER_S, "Tokens per second", "초당 토큰", "tokens / s, all processes", 1.0),
    (names.MFU, "Model FLOPs utilisation", "연산 활용률", "% of peak", 100.0),
    (names.PEAK_MEMORY_GB, "Peak memory", "최대 메모리", "GB, one process", 1.0),
)
DATA_COLOURS = {"loss": "#1f2933", "d2q": COLOURS[0], "q2d": COLOURS[1]}


def page(runs: Sequence[RunRecord]) -> str:
    """The whole document for one run, or for several overlaid."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    scores = [_ndcg_average_panel(runs), *_ndcg_set_panels(runs)]
    curves = [
        _loss_panel(runs),
        *([_side_loss_panel(runs, "d2q"), _side_loss_panel(runs, "q2d")] if len(runs) > 1 else []),
        _metric_panel(runs, names.LEARNING_RATE, "Learning rate", "학습률", "learning rate", from_zero=True),
        _grad_norm_panel(runs),
        *(
            _metric_panel(runs, key, title, korean, unit, from_zero=True, scale=scale)
            for key, title, korean, unit, scale in _PERFORMANCE
        ),
        _clock_panel(runs),
        _health_panel(runs),
    ]
    body = [
        head(runs, title),
        _section("Retrieval", "검색 성능", "grid", [*scores, _score_table(runs)], _event_key(runs)),
        _section("Training", "학습", "grid", [part for part in curves if part], _event_key(runs)),
        _section("What happened", "사건", "wide", [_events_panel(runs)]),
        _section("Data", "데이터", "wide", [data_panel(run, i, single=len(runs) == 1) for i, run in enumerate(runs)]),
        _section("Spec", "설정", "wide", [_spec_panel(runs)]),
        _section("Environment", "환경", "wide", [_environment_panel(runs)]),
    ]
    stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)} · anchor report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n<footer>Written by <code>anchor report</code> on {stamp}. Self-contained: loads nothing.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _section(title: str, korean: str, layout: str, panels: Sequence[str], note: str = "") -> str:
    if not any(panels):
        return ""
    inner = "\n".join(part for part in panels if part)
    heading = f'<h2>{title} <span lang="ko">{korean}</span>{note}</h2>'
    return f'<section>{heading}\n<div class="{layout}">\n{inner}\n</div></section>'


def _event_key(runs: Sequence[RunRecord]) -> str:
    """What the marks on the axes stand for; only those that occur."""
    marks = {"resume": "▲", "stop": "■", "incident": "✕", "checkpoint_failed": "✕"}
    kinds = {event.kind for event in _events_of(runs)}
    shown = [
        f'<b style="color:{EVENT_COLOURS[kind]}">{mark} {kind.replace("_", " ")}</b>'
        for kind, mark in marks.items()
        if kind in kinds
    ]
    return f'<small class="key">{" ".join(shown)}</small>' if shown else ""


def _ndcg_average_panel(runs: Sequence[RunRecord]) -> str:
    """One run: every set and the average. Several: the average of each."""
    if len(runs) == 1:
        run = runs[0]
        lines = [
            Line(run.evaluation(name), name, COLOURS[index % len(COLOURS)]) for index, name in enumerate(run.benchmarks)
        ]
        lines.append(Line(run.evaluation("avg"), "average", "#1f2933", bold=True))
        title, korean = "nDCG@10 by evaluation set", "평가 세트별 nDCG@10"
    else:
        lines = [Line(run.evaluation("avg"), run.name, run_colour(i), bold=True) for i, run in enumerate(runs)]
        title, korean = "nDCG@10, average over sets", "세트 평균 nDCG@10"
    return _score_panel(lines, title, korean, runs, name="ndcg", wide=len(runs) == 1)


def _ndcg_set_panels(runs: Sequence[RunRecord]) -> list[str]:
    """Several runs: one panel a set. One run: the MRR@10 average beside the sets' chart."""
    if len(runs) == 1:
        return []
    shared: dict[str, None] = {}
    for run in runs:
        for benchmark in run.benchmarks:
            shared.setdefault(benchmark)
    panels = []
    for index, benchmark in enumerate(shared):
        lines = [Line(run.evaluation(benchmark), run.name, run_colour(i), bold=True) for i, run in enumerate(runs)]
        panels.append(_score_panel(lines, f"nDCG@10 · {benchmark}", "", runs, name=f"ndcg{index}"))
    return panels


def _score_panel(
    lines: list[Line], title: str, korean: str, runs: Sequence[RunRecord], name: str, wide: bool = False
) -> str:
    lines = [line for line in lines if len(line.series)]
    if not lines:
        return ""
    chart = Chart(lines, "nDCG@10, 0 to 1", _events_of(runs), mark_best=True, last_step=_last_step(runs), wide=wide)
    labels = []
    for line in lines:
        step, value = line.series.best()
        labels.append((line.label, line.colour, f"best {value:.3f} at step {step:,}", line.bold))
    return panel(title, korean, render(chart, name), legend(labels), "★ marks the best", wide=wide)


def _loss_panel(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        return _metric_panel(runs, names.LOSS, "Loss", "손실", "cross-entropy, nats per target token", smooth=True)
    run = runs[0]
    lines = [
        Line(run.series(names.D2Q_LOSS), _weighted("D2Q: query from its document", run, "d2q"), DATA_COLOURS["d2q"]),
        Line(run.series(names.Q2D_LOSS), _weighted("Q2D: document from its query", run, "q2d"), DATA_COLOURS["q2d"]),
        Line(run.series(names.LOSS), "loss", DATA_COLOURS["loss"], bold=True),
    ]
    return _panel_of(lines, runs, "Loss", "손실", "cross-entropy, nats per target token", "loss", smooth=True)


def _weighted(label: str, run: RunRecord, side: str) -> str:
    weight = run.spec.get(f"{side}_weight")
    return label if weight is None else f"{label} (× {weight:g})"


def _side_loss_panel(runs: Sequence[RunRecord], side: str) -> str:
    key = names.D2Q_LOSS if side == "d2q" else names.Q2D_LOSS
    title = "D2Q loss" if side == "d2q" else "Q2D loss"
    korean = "문서에서 질문 복원" if side == "d2q" else "질문에서 문서 복원"
    return _metric_panel(runs, key, title, korean, "cross-entropy, nats per target token", smooth=True)


def _grad_norm_panel(runs: Sequence[RunRecord]) -> str:
    limits = {run.spec.get("max_grad_norm") for run in runs}
    limit = limits.pop() if len(limits) == 1 else None
    reference = (float(limit), f"clipped at {limit:g}") if isinstance(limit, int | float) and limit > 0 else None
    return _metric_panel(
        runs, names.GRAD_NORM, "Gradient norm", "기울기 크기", "L2 norm before clipping, log scale",
        log=True, smooth=True, reference=reference,
    )  # fmt: skip


def _metric_panel(runs: Sequence[RunRecord], key: str, title: str, korean: str, unit: str, **options: Any) -> str:
    if len(runs) == 1:
        lines = [Line(runs[0].series(key), "", COLOURS[0])]
    else:
        lines = [Line(run.series(key), run.name, run_colour(index)) for index, run in enumerate(runs)]
    return _panel_of(lines, runs, title, korean, unit, key.replace("/", "-"), **options)


def _panel_of(
    lines: list[Line], runs: Sequence[RunRecord], title: str, korean: str, unit: str, name: str, **options: Any
) -> str:
    lines = [line for line in lines if len(line.series)]
    if not lines:
        return ""
    chart = Chart(lines, unit, _events_of(runs), last_step=_last_step(runs), **options)
    scale = options.get("scale", 1.0)
    labels = [(line.label, line.colour, f"last {number(line.series.values[-1] * scale)}", line.bold) for line in lines]
    note = ""
    if options.get("smooth") and any(len(line.series) > 60 for line in lines):
        note = f"faint: as logged; bold: running {'median' if options.get('log') else 'mean'}"
    return panel(title, korean, render(chart, name), legend(labels), note)


def _health_panel(runs: Sequence[RunRecord]) -> str:
    """Mean cosine of document pairs, over the sets: near 1 means that all texts lie in one direction (collapse)."""
    lines = []
    for index, run in enumerate(runs):
        sets = run.benchmarks if len(runs) == 1 else run.benchmarks[:1]
        for place, benchmark in enumerate(sets):
            colour = COLOURS[place % len(COLOURS)] if len(runs) == 1 else run_colour(index)
            label = benchmark if len(runs) == 1 else f"{run.name}: {benchmark}"
            lines.append(Line(run.evaluation(benchmark, names.MEAN_COSINE), label, colour))
    title, unit = "Embedding health", "mean cosine of two documents; 1 is collapse"
    return _panel_of(lines, runs, title, "임베딩 건강", unit, "health")


def _clock_panel(runs: Sequence[RunRecord]) -> str:
    """Steps against the clock: pauses, slow stretches and work done twice are what it shows."""
    starts = [run.start_time() for run in runs]
    known = [start for start in starts if start is not None]
    if not known:
        return ""
    lines = []
    for index, (run, start) in enumerate(zip(runs, starts, strict=True)):
        series = Series("clock", (), ()) if start is None else run.clock(start)
        if len(series):
            lines.append(Line(series, run.name if len(runs) > 1 else "", run_colour(index)))
    if not lines:
        return ""
    last = max(line.series.steps[-1] for line in lines)
    chart = Chart(lines, "steps done", _events_of(runs), from_zero=True, last_step=last, clock=known[0])
    labels = [(line.label, line.colour, f"{duration(line.series.steps[-1])} in all", False) for line in lines]
    return panel("Progress on the clock", "시간에 따른 진행", render(chart, "clock"), legend(labels))


def _events_of(runs: Sequence[RunRecord]) -> list[Event]:
    """Events are drawn for one run only: those of several runs on one axis could not be told apart."""
    return runs[0].marked_events() if len(runs) == 1 else []


def _last_step(runs: Sequence[RunRecord]) -> int:
    return max(run.last_step for run in runs)


def _score_table(runs: Sequence[RunRecord]) -> str:
    """Every evaluation of a run; for several runs the best step of each."""
    columns: dict[str, None] = {}
    for run in runs:
        for benchmark in run.benchmarks:
            columns.setdefault(benchmark)
    if not columns and not any(len(run.evaluation("avg")) for run in runs):
        return ""
    wanted = ["avg", *columns]
    if len(runs) > 1:
        rows = [[run.name, *_best_cells(run, wanted)] for run in runs]
        return cell_table("At the step of the best average", ["run", "step", *_score_titles(wanted)], rows, wide=True)
    run = runs[0]
    tables = {(name, metric): _by_step(run.evaluation(name, metric)) for name in wanted for metric in (NDCG, MRR)}
    best = {key: max(values.values()) for key, values in tables.items() if values}
    rows = []
    for step in sorted({step for values in tables.values() for step in values}):
        row = [f"{step:,}"]
        for key, values in tables.items():
            value = values.get(step)
            row.append("–" if value is None else f"{'*' if value == best[key] else ''}{value:.4f}")
        rows.append(row)
    return cell_table("Every evaluation", ["step", *_score_titles(wanted)], rows, wide=True, folded=len(rows) > 12)


def _score_titles(wanted: Sequence[str]) -> list[str]:
    sides = ["average" if name == "avg" else name for name in wanted]
    return [f"{side}\n{metric}" for side in sides for metric in ("nDCG@10", "MRR@10")]


def _by_step(series: Series) -> dict[int, float]:
    return dict(zip(series.steps, series.values, strict=True))


def _best_cells(run: RunRecord, wanted: Sequence[str]) -> list[str]:
    average = run.evaluation("avg")
    if not len(average):
        return ["–"] * (1 + 2 * len(wanted))
    step, _ = average.best()
    cells = [f"{step:,}"]
    for name in wanted:
        for metric in (NDCG, MRR):
            value = _by_step(run.evaluation(name, metric)).get(step)
            cells.append("–" if value is None else f"{value:.4f}")
    return cells


def _events_panel(runs: Sequence[RunRecord]) -> str:
    """Start, resumes, stops, incidents; checkpoints and evaluations are counted, not listed."""
    rows, counts = [], []
    for run in runs:
        for event in run.events:
            if event.kind in ("checkpoint", "evaluation"):
                continue
            when = datetime.fromtimestamp(event.time, UTC).strftime("%Y-%m-%d %H:%M:%S") if event.time else "–"
            colour = EVENT_COLOURS.get(event.kind, "#616e7c")
            kind = f'<b style="color:{colour}">{html.escape(event.kind.replace("_", " "))}</b>'
            details = "; ".join(f"{key}: {_plain(value)}" for key, value in event.details.items())
            rows.append([*([run.name] if len(runs) > 1 else []), when, f"{event.step:,}", kind, details])
        checkpoints = sum(event.kind == "checkpoint" for event in run.events)
        if checkpoints:
            of_run = f" ({run.name})" if len(runs) > 1 else ""
            counts.append(f"{checkpoints:,} checkpoint{'s' * (checkpoints > 1)} saved{of_run}")
        if run.superseded:
            counts.append(f"{run.superseded:,} logged lines left out: trained again after a resume")
    if not rows:
        return ""
    titles = [*(["run"] if len(runs) > 1 else []), "time (UTC)", "step", "event", "details"]
    return cell_table("", titles, rows, note="; ".join(counts), text_columns=True, html_column=titles.index("event"))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _spec_panel(runs: Sequence[RunRecord]) -> str:
    return key_table([(run.name, run.spec) for run in runs])


def _environment_panel(runs: Sequence[RunRecord]) -> str:
    return key_table([(run.name, run.environment) for run in runs])
