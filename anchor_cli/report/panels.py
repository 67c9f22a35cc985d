"""The charts of the run report: which there are, in what order, with which lines and legends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from anchor_cli.base import metric_names as names
from anchor_cli.report.charts import Chart, Line, svg
from anchor_cli.report.read import NDCG, Event, RunRecord, Series
from anchor_cli.report.render import COLOURS, duration, number

_NATS = {"I": "cross-entropy, nats per target token", "II": "contrastive loss, nats per query"}
_BLACK = "#1f2933"


class Legend(NamedTuple):
    """One line of a chart: its name (may be empty), colour, a remark."""

    label: str
    colour: str
    remark: str
    bold: bool


@dataclass(frozen=True)
class Panel:
    """A chart with its titles, its legend and a note below."""

    title: str
    korean: str
    svg: Markup
    legend: list[Legend]
    note: str = ""
    wide: bool = False


def run_colour(index: int) -> str:
    """The colour that stands for run `index` all over the page."""
    return COLOURS[index % len(COLOURS)]


def retrieval_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """One run: every evaluation set and the average in one chart. Several: a chart of the averages and one a set."""
    if len(runs) == 1:
        run = runs[0]
        lines = [Line(run.evaluation(name), name, run_colour(place)) for place, name in enumerate(run.benchmarks)]
        lines.append(Line(run.evaluation("avg"), "average", _BLACK, bold=True))
        panels = [_score_panel(runs, lines, "nDCG@10 by evaluation set", "평가 세트별 nDCG@10", "ndcg", wide=True)]
    else:
        panels = [
            _score_panel(runs, _of_each(runs, names.eval_key(name, NDCG), bold=True), title, korean, f"ndcg{at}")
            for at, (name, title, korean) in enumerate(
                [
                    ("avg", "nDCG@10, average over sets", "세트 평균 nDCG@10"),
                    *((name, f"nDCG@10 · {name}", "") for name in all_benchmarks(runs)),
                ]
            )
        ]
    return [panel for panel in panels if panel]


def training_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Losses, learning rate, gradient norm, throughput, memory, progress on the clock, embedding health."""
    limits = {run.spec.get("max_grad_norm") for run in runs}
    limit = limits.pop() if len(limits) == 1 else None
    clipped = (float(limit), f"clipped at {limit:g}") if isinstance(limit, int | float) and limit > 0 else None
    panels = [
        *_loss_panels(runs),
        *_contrast_panels(runs),
        _metric_panel(runs, names.LEARNING_RATE, "Learning rate", "학습률", "learning rate", from_zero=True),
        _metric_panel(
            runs, names.GRAD_NORM, "Gradient norm", "기울기 크기", "L2 norm before clipping, log scale",
            log=True, smooth=True, reference=clipped,
        ),
        *(
            _metric_panel(runs, key, title, korean, unit, from_zero=True, scale=scale)
            for key, title, korean, unit, scale in (
                (names.PAIRS_PER_S, "Pairs per second", "초당 쌍", "pairs / s, all processes", 1.0),
                (names.TOKENS_PER_S, "Tokens per second", "초당 토큰", "tokens / s, all processes", 1.0),
                (names.MFU, "Model FLOPs utilisation", "연산 활용률", "% of peak", 100.0),
                (names.PEAK_MEMORY_GB, "Peak memory", "최대 메모리", "GB, one process", 1.0),
            )
        ),
        _clock_panel(runs),
        _health_panel(runs),
    ]  # fmt: skip
    return [panel for panel in panels if panel]


def all_benchmarks(runs: Sequence[RunRecord]) -> list[str]:
    """The evaluation sets of all runs, each once, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.benchmarks))


def _of_each(runs: Sequence[RunRecord], key: str, *, bold: bool = False) -> list[Line]:
    """One metric of every run."""
    return [Line(run.series(key), run.name, run_colour(index), bold=bold) for index, run in enumerate(runs)]


def _score_panel(
    runs: Sequence[RunRecord], lines: list[Line], title: str, korean: str, name: str, wide: bool = False
) -> Panel | None:
    lines = [line for line in lines if len(line.series)]
    if not lines:
        return None
    chart = Chart(lines, "nDCG@10, 0 to 1", _marks(runs), mark_best=True, last_step=_last_step(runs), wide=wide)
    best = [(line, *line.series.best()) for line in lines]
    legend = [
        Legend(line.label, line.colour, f"best {value:.3f} at step {step:,}", line.bold) for line, step, value in best
    ]
    return Panel(title, korean, svg(chart, name), legend, "★ marks the best", wide)


def _loss_unit(runs: Sequence[RunRecord]) -> str:
    stages = {run.stage for run in runs}
    return _NATS[stages.pop()] if len(stages) == 1 else "nats per target token, per query in Stage II"


def _loss_panels(runs: Sequence[RunRecord]) -> list[Panel | None]:
    if len(runs) > 1:
        return [
            _metric_panel(runs, key, title, korean, unit, smooth=True)
            for key, title, korean, unit in (
                (names.LOSS, "Loss", "손실", _loss_unit(runs)),
                (names.D2Q_LOSS, "D2Q loss", "문서에서 질문 복원", _NATS["I"]),
                (names.Q2D_LOSS, "Q2D loss", "질문에서 문서 복원", _NATS["I"]),
            )
        ]
    run = runs[0]

    def weighted(label: str, weight: float | None) -> str:
        return label if weight is None else f"{label} (× {weight:g})"

    d2q = weighted("D2Q: query from its document", run.spec.get("d2q_weight"))
    q2d = weighted("Q2D: document from its query", run.spec.get("q2d_weight"))
    lines = [
        Line(run.series(names.D2Q_LOSS), d2q, COLOURS[0]),
        Line(run.series(names.Q2D_LOSS), q2d, COLOURS[1]),
        Line(run.series(names.LOSS), "loss", _BLACK, bold=True),
    ]
    return [_panel(runs, lines, "Loss", "손실", _loss_unit(runs), "loss", smooth=True)]


def _contrast_panels(runs: Sequence[RunRecord]) -> list[Panel | None]:
    """Stage II: what the positive is up against. Of several runs the accuracies and dropped shares alone."""
    panels = [
        _metric_panel(
            runs, names.ACCURACY, "Accuracy of the positive in its block", "정답 문서 정확도", "share", smooth=True
        ),
        _metric_panel(
            runs, names.DROPPED_SHARE, "Dropped candidates", "제외된 후보", "share of candidates", smooth=True
        ),
    ]
    if len(runs) == 1:
        run = runs[0]
        lines = [
            Line(run.series(names.POSITIVE_SIMILARITY), "positives", COLOURS[0]),
            Line(run.series(names.HARD_NEGATIVE_SIMILARITY), "own negatives", COLOURS[1]),
            Line(run.series(names.IN_BATCH_NEGATIVE_SIMILARITY), "in-batch negatives", COLOURS[2]),
        ]
        panels.insert(
            1, _panel(runs, lines, "Similarity to the query", "질문과의 유사도", "cosine", "similarity", smooth=True)
        )
    return panels


def _metric_panel(
    runs: Sequence[RunRecord], key: str, title: str, korean: str, unit: str, **options: Any
) -> Panel | None:
    lines = _of_each(runs, key) if len(runs) > 1 else [Line(runs[0].series(key), "", COLOURS[0])]
    return _panel(runs, lines, title, korean, unit, key.replace("/", "-"), **options)


def _panel(
    runs: Sequence[RunRecord], lines: list[Line], title: str, korean: str, unit: str, name: str, **options: Any
) -> Panel | None:
    lines = [line for line in lines if len(line.series)]
    if not lines:
        return None
    chart = Chart(lines, unit, _marks(runs), last_step=_last_step(runs), **options)
    legend = [
        Legend(line.label, line.colour, f"last {number(line.series.values[-1] * chart.scale)}", line.bold)
        for line in lines
    ]
    smoothed = chart.smooth and any(len(line.series) > 60 for line in lines)
    note = f"faint: as logged; bold: running {'median' if chart.log else 'mean'}" if smoothed else ""
    return Panel(title, korean, svg(chart, name), legend, note)


def _health_panel(runs: Sequence[RunRecord]) -> Panel | None:
    """Mean cosine of document pairs: near 1 means that all texts lie in one direction (collapse)."""
    if len(runs) == 1:
        run = runs[0]
        lines = [
            Line(run.evaluation(name, names.MEAN_COSINE), name, run_colour(place))
            for place, name in enumerate(run.benchmarks)
        ]
    else:
        lines = [
            Line(run.evaluation(name, names.MEAN_COSINE), f"{run.name}: {name}", run_colour(index))
            for index, run in enumerate(runs)
            for name in run.benchmarks[:1]
        ]
    limit = names.COLLAPSED_FROM[names.MEAN_COSINE]
    return _panel(
        runs, lines, "Embedding health", "임베딩 상태", "mean cosine of two documents", "health",
        reference=(limit, f"collapsed above {limit:g}"),
    )  # fmt: skip


def _clock_panel(runs: Sequence[RunRecord]) -> Panel | None:
    """Steps against the clock: pauses, slow stretches and work done twice are what it shows."""
    starts = [run.start_time() for run in runs]
    lines = [
        Line(run.clock(start) if start is not None else Series("clock", (), ()), run.name, run_colour(index))
        for index, (run, start) in enumerate(zip(runs, starts, strict=True))
    ]
    lines = [line for line in lines if len(line.series)]
    if not lines:
        return None
    last = max(line.series.steps[-1] for line in lines)
    first = next(start for start in starts if start is not None)
    chart = Chart(lines, "steps done", _marks(runs), from_zero=True, last_step=last, clock=first)
    legend = [
        Legend(line.label if len(runs) > 1 else "", line.colour, f"{duration(line.series.steps[-1])} in all", False)
        for line in lines
    ]
    return Panel("Progress on the clock", "시간에 따른 진행", svg(chart, "clock"), legend)


def _marks(runs: Sequence[RunRecord]) -> list[Event]:
    """Events are drawn for one run only: those of several runs on one axis could not be told apart."""
    return runs[0].marked_events() if len(runs) == 1 else []


def _last_step(runs: Sequence[RunRecord]) -> int:
    return max(run.last_step for run in runs)
