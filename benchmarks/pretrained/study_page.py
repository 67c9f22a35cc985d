"""docs/stage1-on-real-weights.md and its picture, from the results that are there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from study import ARMS, DOCS, PASSES, SEEDS, Pass, Result, tasks

from anchor_cli.base.metric_names import COLLAPSED_FROM, MEAN_COSINE, NEAR_IDENTICAL

PAGE = DOCS.parent / "stage1-on-real-weights.md"
XQUAD = "en/xquad-held-out"


def draw(results: list[Result]) -> None:
    """Write the page, and a picture for every pass in which an arm was trained."""
    parts = [HEAD.read_text(encoding="utf-8").rstrip(), "", "## What has been run", "", *progress(results)]
    for sizes in PASSES:
        rows = [row for row in results if row["pass"] == sizes.name]
        if rows:
            parts += ["", f"## Pass `{sizes.name}`", "", describe(sizes), "", *table(rows, sizes)]
        if any(row["steps_one"] and row["stage"] == "I" for row in rows):
            picture(rows, sizes)
            parts += ["", f"![nDCG@10 and mean cosine along Stage I, pass {sizes.name}](real-weights/{sizes.name}.svg)"]
    PAGE.write_text("\n".join([*parts, "", *verdict(results)]) + "\n", encoding="utf-8")


HEAD = Path(__file__).with_name("page_head.md")


def progress(results: list[Result]) -> Iterable[str]:
    yield "| pass | length | pairs a step | Stage I steps | Stage II steps | seeds | evaluations done |"
    yield "|---|---|---|---|---|---|---|"
    for sizes in PASSES:
        keys = [key for key, _ in tasks() if key["pass"] == sizes.name]
        done = sum(any(key.items() <= row.items() for row in results) for key in keys)
        rounds = ", ".join(map(str, sizes.rounds))
        yield (
            f"| `{sizes.name}` | {sizes.max_seq_length} | {sizes.pairs_per_step} | {rounds} | {sizes.steps_two} "
            f"| {len(SEEDS[sizes.name])} | {done} of {len(keys)} |"
        )
    hours = sum(row["seconds"] for row in results) / 3600
    yield ""
    yield f"{hours:.1f} hours of one shared core so far. What is not in the tables below has not been run."


def describe(sizes: Pass) -> str:
    return (
        f"Learning rate {sizes.rate_one:g} in Stage I and {sizes.rate_two:g} in Stage II (linear, {sizes.warmup:.0%} "
        f"warm-up), temperature {sizes.temperature:g}, float32, one schedule of {sizes.rounds[-1]} Stage I steps."
    )


def table(rows: list[Result], sizes: Pass) -> Iterable[str]:
    """A line for each (arm, Stage I steps, Stage II steps): means over the seeds that were run, and each seed's."""
    sets = sorted({name for row in rows for name in row["scores"]}, key=lambda name: name != XQUAD)
    shown = [name.removeprefix("en/") for name in sets]
    columns = [f"nDCG@10 {name}" for name in shown]
    columns += ["mean cosine", "near-identical"]
    yield f"| start | Stage I steps | Stage II steps | seeds | loss | {' | '.join(columns)} |"
    yield "|---|---|---|---|---|" + "---|" * len(columns)
    for arm in ARMS:
        for steps in (0, *sizes.rounds):
            for stage in ("I", "II"):
                some = [
                    row for row in rows
                    if (row["arm"], row["steps_one"], row["stage"]) == (arm.name, steps, stage)
                ]  # fmt: skip
                if some:
                    yield line(arm.name, steps, sizes.steps_two if stage == "II" else 0, some, sets)


def line(arm: str, steps: int, steps_two: int, rows: list[Result], sets: list[str]) -> str:
    scores = [average(rows, name, "ndcg@10") for name in sets]
    losses = [list(row["loss"].values()) for row in rows if "loss" in row]
    loss = f"{mean(each[0] for each in losses):.2f} → {mean(each[-1] for each in losses):.2f}" if losses else ""
    health = [average(rows, XQUAD, key) for key in (MEAN_COSINE, NEAR_IDENTICAL)]
    seeds = ", ".join(str(row["seed"]) for row in rows if row["seed"]) or "-"
    cells = [arm, str(steps), str(steps_two), seeds, loss, *scores, *health]
    return f"| {' | '.join(cells)} |"


def average(rows: list[Result], name: str, key: str) -> str:
    """The mean, and what it is the mean of where that differs."""
    values = [row["scores"][name][key] for row in rows if name in row["scores"]]
    each = [f"{value:.3f}" for value in values]
    return f"{mean(values):.3f}" + (f" ({', '.join(each)})" if len(set(each)) > 1 else "") if values else ""


def picture(rows: list[Result], sizes: Pass) -> None:
    """Left nDCG@10, right mean cosine, along Stage I; a line an arm, a point a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "anchor", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    untrained = next(row for row in rows if row["arm"] == ARMS[0].name and row["stage"] == "I")
    titles = {"ndcg@10": "nDCG@10", MEAN_COSINE: "mean cosine of two documents"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        start = untrained["scores"][XQUAD][key]
        for index, arm in enumerate(ARMS[1:]):
            points: dict[int, list[float]] = {0: [start]}
            for row in rows:
                if (row["arm"], row["stage"]) == (arm.name, "I"):
                    points.setdefault(row["steps_one"], []).append(row["scores"][XQUAD][key])
            if len(points) > 1:
                steps = sorted(points)
                panel.plot(steps, [mean(points[step]) for step in steps], color=f"C{index}", label=arm.name)
                for step in steps:
                    panel.plot([step] * len(points[step]), points[step], ".", color=f"C{index}")
        if key == MEAN_COSINE:
            panel.axhline(COLLAPSED_FROM[MEAN_COSINE], color="black", linestyle=":", label="warned of above")
        panel.set(title=title, xlabel="Stage I step")
        panel.legend(fontsize=8)
    figure.savefig(DOCS / f"{sizes.name}.svg", metadata={"Date": None})
    plt.close(figure)


def verdict(results: list[Result]) -> Iterable[str]:
    """What the results say about the defaults: nothing before the largest pass has Stage II of every arm, two seeds."""
    yield "## What follows for the defaults"
    yield ""
    finished = [sizes for sizes in PASSES if all(len(each) >= 2 for each in ends(results, sizes).values())]
    if finished:
        scores = ends(results, finished[-1])
        means = {arm: mean(each) for arm, each in scores.items()}
        apart = max(max(each) - min(each) for each in scores.values())
        best, untrained = max(means, key=lambda arm: means[arm]), ARMS[0].name
        yield (
            f"After Stage II of pass `{finished[-1].name}`, nDCG@10 on xquad-held-out, means over seeds: "
            f"`{best}` {means[best]:.3f}, the best; untrained {means[untrained]:.3f}. "
            f"Two seeds of one start differ by {apart:.3f} at most."
        )
        yield ""
    if finished[-1:] == [PASSES[-1]]:
        return
    yield "`reconstruction_targets: text` and the weights 0.8 / 0.2 stay: they are the paper's, and what has been run"
    yield "here is too short to speak against them."
    yield f"Pass `{PASSES[-1].name}` with two seeds decides it; it has not been completed."


def ends(results: list[Result], sizes: Pass) -> dict[str, list[float]]:
    """nDCG@10 after Stage II, from the longest Stage I, by arm: a number a seed."""
    last = {arm.name: sizes.stage_two_after[-1] if arm.targets else 0 for arm in ARMS}
    rows = [row for row in results if (row["pass"], row["stage"]) == (sizes.name, "II")]
    return {
        arm: [row["scores"][XQUAD]["ndcg@10"] for row in rows if (row["arm"], row["steps_one"]) == (arm, steps)]
        for arm, steps in last.items()
    }
