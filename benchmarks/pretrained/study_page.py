"""docs/stage1-on-real-weights.md and its picture, from the results that are there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from make_models import SOURCES
from study import ARMS, DOCS, PASSES, SEEDS, Pass, Result, tasks

from anchor_cli.base.metric_names import COLLAPSED_FROM, MEAN_COSINE, NEAR_IDENTICAL

PAGE = DOCS.parent / "stage1-on-real-weights.md"


def draw(results: list[Result]) -> None:
    """Write the page, and a picture for every pass in which an arm was trained."""
    parts = [HEAD.read_text(encoding="utf-8").rstrip(), "", "## What has been run", "", *progress(results)]
    for sizes in PASSES:
        rows = sorted((row for row in results if row["pass"] == sizes.name), key=lambda row: row["seed"])
        if rows:
            parts += ["", f"## Pass `{sizes.name}`", "", describe(sizes, rows), "", *table(rows, sizes)]
        if any(row["steps_one"] and row["stage"] == "I" for row in rows):
            picture(rows, sizes)
            shown = "nDCG@10 and mean cosine along Stage I, nDCG@10 after Stage II"
            parts += ["", f"![{shown}, pass {sizes.name}](real-weights/{sizes.name}.svg)"]
    PAGE.write_text("\n".join([*parts, "", *verdict(results)]) + "\n", encoding="utf-8")


HEAD, TAIL = (Path(__file__).with_name(f"page_{part}.md") for part in ("head", "tail"))


def progress(results: list[Result]) -> Iterable[str]:
    yield "| pass | model | length | pairs a step | Stage I steps | Stage II steps | seeds | evaluations done |"
    yield "|---|---|---|---|---|---|---|---|"
    for sizes in PASSES:
        keys = [key for key in tasks() if key["pass"] == sizes.name]
        done = sum(any(key.items() <= row.items() for row in results) for key in keys)
        rounds = ", ".join(map(str, sizes.rounds))
        yield (
            f"| `{sizes.name}` | {SOURCES[sizes.model].folder} | {sizes.max_seq_length} | {sizes.pairs_per_step} "
            f"| {rounds} | {sizes.steps_two} | {len(SEEDS)} | {done} of {len(keys)} |"
        )
    yield ""
    yield "What is not in the tables below has not been run."


CPU = "cpu, float32"


def on(row: Result) -> str:
    """Where a result was trained; the first rows do not say it, and are of a CPU."""
    return f"{row['device']}, {row['precision']}" if "device" in row else CPU


def main_set(sizes: Pass) -> str:
    """Its name in the scores."""
    return sizes.main_set.replace(":", "/")


def describe(sizes: Pass, rows: list[Result]) -> str:
    places = "; ".join(dict.fromkeys(on(row) for row in rows))
    return (
        f"Learning rate {sizes.rate_one:g} in Stage I and {sizes.rate_two:g} in Stage II (linear, {sizes.warmup:.0%} "
        f"warm-up), temperature {sizes.temperature:g}, {places}, one schedule of {sizes.rounds[-1]} Stage I steps."
    )


def table(rows: list[Result], sizes: Pass) -> Iterable[str]:
    """A line for each (arm, Stage I steps, Stage II steps): means over the seeds that were run, and each seed's."""
    sets = sorted({name for row in rows for name in row["scores"]}, key=lambda name: name != main_set(sizes))
    shown = [name.split("/", 1)[1] for name in sets]
    columns = [f"nDCG@10 {name}" for name in shown]
    columns += ["mean cosine", "near-identical"]
    yield f"| start | Stage I steps | Stage II steps | seeds | loss | {' | '.join(columns)} |"
    yield "|---|---|---|---|---|" + "---|" * len(columns)
    for arm in ARMS:
        for steps in (0, *sizes.rounds):
            for stage, steps_two in sizes.steps_two_of.items():
                some = [
                    row for row in rows
                    if (row["arm"], row["steps_one"], row["stage"]) == (arm.name, steps, stage)
                ]  # fmt: skip
                if some:
                    yield line(arm.name, steps, steps_two, some, sets)


def line(arm: str, steps: int, steps_two: int, rows: list[Result], sets: list[str]) -> str:
    scores = [average(rows, name, "ndcg@10") for name in sets]
    losses = [list(row["loss"].values()) for row in rows if "loss" in row]
    loss = f"{mean(each[0] for each in losses):.2f} → {mean(each[-1] for each in losses):.2f}" if losses else ""
    health = [average(rows, sets[0], key) for key in (MEAN_COSINE, NEAR_IDENTICAL)]
    seeds = ", ".join(str(row["seed"]) for row in rows if row["seed"]) or "-"
    cells = [arm, str(steps), str(steps_two), seeds, loss, *scores, *health]
    return f"| {' | '.join(cells)} |"


def average(rows: list[Result], name: str, key: str) -> str:
    """The mean, and what it is the mean of where that differs."""
    values = [row["scores"][name][key] for row in rows if name in row["scores"]]
    each = [f"{value:.3f}" for value in values]
    return f"{mean(values):.3f}" + (f" ({', '.join(each)})" if len(set(each)) > 1 else "") if values else ""


def picture(rows: list[Result], sizes: Pass) -> None:
    """nDCG@10 and mean cosine along Stage I, a line an arm; nDCG@10 after Stage II; everywhere a point a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "anchor", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    untrained = next(row for row in rows if row["arm"] == ARMS[0].name and row["stage"] == "I")
    titles = {"ndcg@10": "nDCG@10", MEAN_COSINE: "mean cosine of two documents"}
    for panel, (key, title) in zip(panels[:2], titles.items(), strict=True):
        before = untrained["scores"][main_set(sizes)][key]
        for index, arm in enumerate(ARMS[1:]):
            points: dict[int, list[float]] = {0: [before]}
            for row in rows:
                if (row["arm"], row["stage"]) == (arm.name, "I"):
                    points.setdefault(row["steps_one"], []).append(row["scores"][main_set(sizes)][key])
            if len(points) > 1:
                steps = sorted(points)
                panel.plot(steps, [mean(points[step]) for step in steps], color=f"C{index}", label=arm.name)
                for step in steps:
                    panel.plot([step] * len(points[step]), points[step], ".", color=f"C{index}")
        if key == MEAN_COSINE:
            panel.axhline(COLLAPSED_FROM[MEAN_COSINE], color="black", linestyle=":", label="warned of above")
        panel.set(title=title, xlabel="Stage I step")
        panel.legend(fontsize=8)
    after = ends(rows, sizes)
    if values := control(rows, sizes):
        after[f"untrained,\n{sizes.steps_two_alone} steps"] = values
    for index, (start, values) in enumerate(after.items()):
        color = f"C{index - 1}" if 0 < index < len(ARMS) else "black"  # as in the other panels
        panels[2].plot([start] * len(values), values, "o", color=color)
    panels[2].set(title=f"nDCG@10 after {sizes.steps_two} steps of Stage II", ylim=(0, None))
    panels[2].tick_params(axis="x", labelsize=7)
    figure.savefig(DOCS / f"{sizes.name}.svg", metadata={"Date": None})
    plt.close(figure)


def verdict(results: list[Result]) -> Iterable[str]:
    """What the passes that are complete say, in numbers; what follows from it is written by hand: page_tail.md."""
    yield "## What follows for the defaults"
    yield ""
    for sizes in PASSES:
        scores = ends(results, sizes)
        if all(len(each) >= 2 for each in scores.values()):
            order = sorted(scores, key=lambda arm: -mean(scores[arm]))
            listed = ", ".join(f"`{arm}` {mean(scores[arm]):.3f}" for arm in order)
            apart = max(max(each) - min(each) for each in scores.values())
            yield (
                f"* Pass `{sizes.name}`, nDCG@10 on {sizes.main_set.split(':')[1]} after Stage II, means over seeds: "
                f"{listed}. Two seeds of one start differ by {apart:.3f} at most."
            )
        if scores_alone := control(results, sizes):
            yield (
                f"* Its control, `{ARMS[0].name}` with {sizes.steps_two_alone} steps of Stage II: "
                f"{mean(scores_alone):.3f} ({', '.join(f'{score:.3f}' for score in scores_alone)})."
            )
    yield ""
    yield TAIL.read_text(encoding="utf-8").rstrip()


def ends(results: list[Result], sizes: Pass) -> dict[str, list[float]]:
    """nDCG@10 after Stage II, from the longest Stage I, by arm: a number a seed."""
    last = {arm.name: sizes.stage_two_after[-1] if arm.targets else 0 for arm in ARMS}
    found: dict[str, list[float]] = {arm: [] for arm in last}
    for row in results:
        if (row["pass"], row["stage"]) == (sizes.name, "II") and row["steps_one"] == last[row["arm"]]:
            found[row["arm"]].append(main_score(row, sizes))
    return found


def control(results: list[Result], sizes: Pass) -> list[float]:
    """nDCG@10 of Stage II alone with the steps of both stages, a number a seed."""
    return [main_score(row, sizes) for row in results if (row["pass"], row["stage"]) == (sizes.name, "II alone")]


def main_score(row: Result, sizes: Pass) -> float:
    return float(row["scores"][main_set(sizes)]["ndcg@10"])
