"""docs/demo.svg: what `anchor demo` showed in a terminal, drawn from the folder it left.

    python benchmarks/demo_picture.py demo docs/demo.svg

The training lines are some of the run's own log; the picture names no host and loads no font.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

WIDTH = 92
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px ui-monospace, 'SF Mono', 'D2Coding', monospace; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


def main(folder: Path, picture: Path) -> None:
    """Print the story of a demo into a recording console and save it."""
    found = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    recipe = found["recipe"]
    screen = Console(record=True, width=WIDTH, highlight=False, file=io.StringIO(), force_terminal=True)
    screen.print(f"[bold]$ anchor demo --seed {recipe['seed']}[/bold]")
    screen.print("1. making a world of facts, a tokenizer and a small random Qwen3")
    screen.print("2. preparing the training pairs")
    screen.print("3. evaluating the untrained model on held-out questions")
    screen.print(f"4. training {recipe['steps']} steps of {recipe['pairs_per_step']} pairs")
    for line in training_lines(folder / "run/logs/rank-0.log"):
        screen.print(line, markup=False, overflow="crop", no_wrap=True, style="cyan" if "nDCG" in line else None)
    screen.print("5. evaluating the trained model on the same questions")
    table = Table(title=f"held-out questions, {recipe['num_documents']} documents, nDCG@10", title_justify="left")
    for title in ("", "chance", "before", "after"):
        table.add_column(title, justify="right" if title else "left")
    for name in [*found["before"]["results"], "average"]:
        rows = ({**found[when]["results"], "average": found[when]["avg"]} for when in ("before", "after"))
        scores = [found["chance"]["ndcg@10"], *(row[name]["ndcg@10"] for row in rows)]
        table.add_row(name, *(f"{score:.3f}" for score in scores))
    screen.print(table)
    screen.save_svg(str(picture), title="anchor demo", code_format=SVG, unique_id="demo")


def training_lines(log: Path) -> list[str]:
    """Some lines of a run's log: seven steps evenly, and the evaluations; without rates, which are the machine's."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if re.match(r"(step|evaluation) ", line)]
    steps = [line for line in lines if line.startswith("step")]
    shown = set(steps[:: max(1, len(steps) // 7)][:7]) | {steps[-1]}
    shown |= {line for line in lines if line.startswith("evaluation")}
    return [re.sub(r"  [\d.,]+ pairs/s.*", "", line) for line in lines if line in shown]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
