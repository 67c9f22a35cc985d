"""`anchor demo`: the whole path on a laptop CPU in a few minutes, on data it makes itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anchor_cli.base.console import print_json
from anchor_cli.commands.options import AsJson, Device

if TYPE_CHECKING:
    from anchor_cli.demo.demo import Outcome


def demo(
    out: Annotated[Path, typer.Option(help="Folder to work in; an earlier demo in it is replaced.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the world, the weights and the order of rows.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 700,
    documents: Annotated[int, typer.Option(min=12, max=800, help="Documents of the world.")] = 400,
    stage2: Annotated[
        bool, typer.Option("--stage2", help="Go on: mine hard negatives, train Stage II on them, export that.")
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make a small Korean and English world, train on it, evaluate before and after, export. Some minutes on a CPU."""
    from anchor_cli.demo.demo import Recipe, run_demo
    from anchor_cli.processes.gpus import require_usable_gpus

    require_usable_gpus()
    recipe = Recipe(seed=seed, steps=steps, num_documents=documents, warmup_steps=max(1, min(50, steps // 5)))
    outcome = run_demo(out, recipe, stage_two=stage2)
    show(outcome, on_stderr=as_json)
    if as_json:
        print_json(outcome.as_dict())


def show(outcome: Outcome, *, on_stderr: bool) -> None:
    """The table of scores, the time it took, and what to type next."""
    from rich.console import Console
    from rich.table import Table

    screen = Console(stderr=on_stderr, highlight=False, soft_wrap=True)
    table = Table(title=f"held-out questions, {outcome.recipe.num_documents} documents, nDCG@10")
    table.add_column("")
    columns = {"before": outcome.before, "after": outcome.after}
    if outcome.stage_two:
        columns = {"before": outcome.before, "Stage I": outcome.after, "Stage II": outcome.stage_two.after}
    for title in ("chance", *columns):
        table.add_column(title, justify="right")
    for name in (*outcome.before["results"], "average"):
        rows = (scores["avg"] if name == "average" else scores["results"][name] for scores in columns.values())
        table.add_row(name, f"{outcome.chance:.3f}", *(f"{row['ndcg@10']:.3f}" for row in rows))
    screen.print(table)
    total = sum(outcome.seconds.values())
    training = outcome.seconds.get("train", 0.0) + outcome.seconds.get("train_stage2", 0.0)
    screen.print(f"{total:.0f} s in all, {training:.0f} s of them training. Files are in {outcome.folder}/")
    if two := outcome.stage_two:
        page = outcome.folder / "mined" / "mining.html"
        screen.print(f"{two.negatives:,} hard negatives for {two.rows:,} rows; to read: {page}")
    screen.print("\nWhat to type next:")
    for line in next_commands(outcome):
        screen.print(f"  {line}")


def next_commands(outcome: Outcome) -> list[str]:
    """Commands that work on what the demo left; first what puts `anchor` on the PATH, where it is not."""
    folder, activate = outcome.folder, Path(sys.executable).with_name("activate")
    last = outcome.stage_two.checkpoint if outcome.stage_two else outcome.checkpoint
    return [
        *([f"source {_near(activate)}"] if shutil.which("anchor") is None and activate.is_file() else []),
        f"anchor report {folder}/run{f' {folder}/stage2' if outcome.stage_two else ''}",
        f"anchor eval {last.name} --data {outcome.benchmarks[0]} --queries 5",
        f"anchor train {folder}/spec.json --set experiment_id=again --set learning_rate=1e-3",
        "anchor init spec.json    # a spec for your own pairs and Qwen/Qwen3-0.6B",
    ]


def _near(path: Path) -> Path:
    """Relative to the working directory where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
