"""Start-up: `anchor --help` beside `python -c "import typer, rich"`, and `anchor train` up to its first step.

    python benchmarks/startup.py [--repeats 15]
    python benchmarks/startup.py --train SPEC [--rows 2000 --rows 200000]

Processes take turns, so that a busy machine slows both alike; medians of wall time and of CPU time (user + system,
which a busy machine changes less) are printed with their ratios. `--train` runs SPEC for two steps in a fresh output
folder and says when, after the command was started, each part was done; with `--rows` the prepared data are grown to
that many rows first, since the cost must not grow with them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HELP = [str(Path(sys.executable).parent / "anchor"), "--help"]
IMPORTS = [sys.executable, "-c", "import typer, rich"]


def spent(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def compare_help(repeats: int) -> dict[str, float]:
    """Medians in seconds; `ratio` is the median of each round's ratio. The first round warms the file cache."""
    rounds = []
    for index in range(repeats + 1):
        turns = (HELP, IMPORTS) if index % 2 else (IMPORTS, HELP)
        rounds.append({id(command): spent(command) for command in turns})
    ours = [found[id(HELP)] for found in rounds[1:]]
    theirs = [found[id(IMPORTS)] for found in rounds[1:]]
    made = {}
    for index, kind in enumerate(("wall", "cpu")):
        made[f"anchor --help {kind}_s"] = statistics.median(o[index] for o in ours)
        made[f"import typer, rich {kind}_s"] = statistics.median(t[index] for t in theirs)
        made[f"{kind} ratio"] = statistics.median(o[index] / t[index] for o, t in zip(ours, theirs, strict=True))
    return made


def time_training(spec: Path, data: Path | None) -> dict[str, float]:
    """Seconds from starting `anchor train` to the first and the second logged step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [HELP[0], "train", str(spec), "--set", f"output_dir={folder}", "--set", "stop_after_n_steps=2",
                   "--set", "experiment_id=startup", "--set", "save_steps=0", "--set", "eval_steps=0"]  # fmt: skip
        command += ["--set", f"dataset_file_path={data}"] if data else []
        used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env={**os.environ, "ANCHOR_HOME": folder})
        lines = (Path(folder) / "startup" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["time"] - start for line in lines if "train/loss" in line]
        whole, now = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime
    return {"first_step_s": steps[0], "second_step_s": steps[1], "whole_s": whole, "cpu_s": cpu}


def grown(prepared: Path, num_rows: int, out: Path) -> Path:
    """The prepared folder with its rows repeated up to `num_rows`: text for a timing, not for training."""
    import pyarrow as pa

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from anchor_cli.data.pairs import MANIFEST

    manifest = json.loads((prepared / MANIFEST).read_text())
    shutil.copytree(prepared, out, ignore=shutil.ignore_patterns("*.arrow"))
    table = pa.concat_tables(
        pa.ipc.open_stream(pa.memory_map(str(prepared / file["name"]))).read_all() for file in manifest["files"]
    )
    name, written = "data-00000-of-00001.arrow", 0
    with pa.OSFile(str(out / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        while written < num_rows:
            piece = table.slice(0, min(table.num_rows, num_rows - written)).combine_chunks()
            writer.write_table(piece)
            written += piece.num_rows
    manifest["files"] = [{**manifest["files"][0], "name": name, "bytes": (out / name).stat().st_size}]
    manifest["num_rows"] = num_rows
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--train", type=Path, metavar="SPEC", help="a spec whose dataset_file_path is prepared data")
    parser.add_argument("--rows", type=int, action="append", help="grow the data to this many rows; may be repeated")
    args = parser.parse_args()
    if args.train is None:
        for name, value in compare_help(args.repeats).items():
            print(f"{name:28s}{value:7.3f}")
        return
    if not args.rows:
        print(json.dumps(time_training(args.train, None)))
        return
    prepared = Path(json.loads(args.train.read_text())["dataset_file_path"])
    for num_rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            data = grown(prepared, num_rows, Path(folder) / "data")
            print(f"{num_rows:>10,} rows  " + json.dumps(time_training(args.train, data)), flush=True)


if __name__ == "__main__":
    main()
