"""Summary and pictures of stage2_study.py: means over seeds with 95 % t-intervals, and paired differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# Two-sided 95 % quantiles of Student's t by degrees of freedom (R: qt(.975, n)).
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Run = dict[str, Any]


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % t-interval; None for the half-width of one value."""
    sample = np.array(values, dtype=float)
    if len(sample) < 2:
        return float(sample.mean()), None
    return float(sample.mean()), float(T_95[len(sample) - 1] * sample.std(ddof=1) / np.sqrt(len(sample)))


def curve(runs: list[Run], start: str, stage: str) -> dict[int, list[float]]:
    """nDCG@10 of every seed by step."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for point in run["curves"][start][stage]:
            by_step.setdefault(point["step"], []).append(point["ndcg"])
    return by_step


def summarise(runs: list[Run]) -> Run:
    """One part: per start and step the mean and interval, and the difference to `untrained`, paired by seed."""
    starts: Run = {}
    base = curve(runs, "untrained", "stage_two")
    for start in runs[0]["curves"]:
        two = curve(runs, start, "stage_two")
        starts[start] = {
            "stage_one": {step: interval(values) for step, values in curve(runs, start, "stage_one").items()},
            "stage_two": {step: interval(values) for step, values in two.items()},
            "minus_untrained": {
                step: interval([ours - theirs for ours, theirs in zip(values, base[step], strict=True)])
                for step, values in two.items()
            },
        }
    return {
        "seeds": [run["seed"] for run in runs],
        "rows": runs[0]["rows"],
        "settings": runs[0]["settings"],
        "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
        "starts": starts,
    }


def highest(part: Run) -> float:
    """Top of the axis: what the bands reach, and a little more, at most 1."""
    points = [point for curves in part["starts"].values() for stage in ("stage_one", "stage_two")
              for point in curves[stage].values()]  # fmt: skip
    return min(1.0, 1.1 * max(mean + (half or 0.0) for mean, half in points))


def draw(runs: list[Run], folder: Path) -> None:
    """Write summary.json, and `PART.svg`: Stage I on the left, Stage II on the right, bands are 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "anchor", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    summary = {}
    for part in dict.fromkeys(run["part"] for run in runs):
        summary[part] = summarise(sorted((run for run in runs if run["part"] == part), key=lambda run: run["seed"]))
        figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
        for panel, stage, title in zip(panels, ("stage_one", "stage_two"), ("Stage I", "Stage II"), strict=True):
            for index, (start, curves) in enumerate(summary[part]["starts"].items()):
                points = curves[stage]
                if not points:
                    continue
                steps = list(points)
                means, halves = (np.array(column, dtype=float) for column in zip(*points.values(), strict=True))
                panel.plot(steps, means, marker=".", color=f"C{index}", label=start)
                panel.fill_between(steps, means - halves, means + halves, color=f"C{index}", alpha=0.15, lw=0)
            num_seeds = len(summary[part]["seeds"])
            panel.set(title=f"{part}: {title}", xlabel=f"{title} step")
        label = f"nDCG@10, mean of {num_seeds} seeds, 95 % interval" if num_seeds > 1 else "nDCG@10, one seed"
        panels[0].set(ylabel=label, ylim=(0, highest(summary[part])))  # both share it
        panels[1].legend(fontsize=8, loc="best")
        figure.savefig(folder / f"{part}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{part}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
