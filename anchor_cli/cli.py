"""The command line: commands in the order in which they are used, and the one place that turns failures into messages.

A command is a plain function `NAME` in `anchor_cli/commands/NAME.py`, with `Annotated` options. Its module imports only
typer, the standard library and `anchor_cli/base` at its top, so that `--help` costs nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from anchor_cli import __version__
from anchor_cli.base.errors import AnchorError, first_line, nearest
from anchor_cli.base.files import home_expanded
from anchor_cli.base.streams import flush_results, prepare_home, prepare_streams

COMMANDS = {
    "Start": {
        "demo": "the whole path on a small made-up world, some minutes on a CPU",
        "doctor": "check this host: versions, GPUs, kernels, disk, network",
        "init": "write a spec to start from",
    },
    "Prepare": {
        "prepare": "pairs from anywhere -> a checked, tokenised training set",
        "spec": "check a spec and say where each value comes from",
        "plan": "what a run will do: steps, tokens, memory, time, disk",
    },
    "Train": {
        "train": "train on all local GPUs or the CPU; the same command resumes",
        "report": "a run's curves and scores as one HTML page",
        "checkpoints": "list, verify or prune the checkpoints of a run",
        "verify-resume": "prove on this host that resuming is exact",
        "replay": "run one step again and name the rows that broke it",
    },
    "Use": {
        "eval": "nDCG@10 and MRR@10 on NanoBEIR or any BEIR folder",
        "mine": "hard negatives for Stage II by a model's own ranking",
        "search": "the documents nearest to a question, with scores",
        "export": "a checkpoint -> a folder that other tools and Stage II load",
    },
}
"""Headings of `anchor --help`, the commands below them and what each is for, in a few words."""

EXAMPLES = {
    "mine": (
        "anchor mine data/pairs --model checkpoint-2000 --out data/mined",
        "anchor mine data/pairs --model export --out data/mined --num-negatives 4",
    ),
    "demo": ("anchor demo", "anchor demo --steps 100 --out /tmp/demo"),
    "doctor": ("anchor doctor", "anchor doctor run.json --gradients"),
    "init": (
        "anchor init run.json --data data/pairs",
        "anchor init small.json --data pairs.jsonl --force",
    ),
    "prepare": (
        "anchor prepare pairs.jsonl --out data/pairs",
        "anchor prepare 'raw/*.parquet' --out data/pairs --exclude nanobeir",
    ),
    "spec": ("anchor spec run.json", "anchor spec run.json --set learning_rate=1e-4 --json"),
    "plan": ("anchor plan run.json", "anchor plan run.json --gpu h100-nvl --num-gpus 2 --rows 1862922"),
    "train": ("anchor train run.json", "anchor train run.json --set stop_after_n_steps=2000 --nproc-per-node 2"),
    "report": ("anchor report", "anchor report output/first output/second --out both.html"),
    "checkpoints": ("anchor checkpoints list", "anchor checkpoints prune output/first --keep 3 --dry-run"),
    "verify-resume": ("anchor verify-resume run.json", "anchor verify-resume run.json --steps 20 --nproc-per-node 2"),
    "replay": ("anchor replay output/first --step 1234", "anchor replay output/first --step 1234 --json"),
    "eval": ("anchor eval checkpoint-2000", "anchor eval checkpoint-1000 checkpoint-2000 --data ko:data/beir --json"),
    "search": (
        'anchor search checkpoint-2000 data/beir "복지 급여는 어디서 신청하나요?"',
        'anchor search output/kure pairs.jsonl "배송은 얼마나 걸리나요?" --top-k 5',
    ),
    "export": ("anchor export --stage2", "anchor export checkpoint-2000 --stage2 --out models/kure-stage1"),
}
"""Two command lines for the end of each command's `--help`."""


class _InOrderOfUse(TyperGroup):
    """Imports only the command that is run, and writes its help in plain text.

    Rich's panels and the imports of every command would each cost as much again as everything else in `--help`
    (measured: benchmarks/startup.py).
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in COMMANDS.values() for name in names]

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in self.list_commands(ctx):
            return None
        function = name.replace("-", "_")
        only = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        only.command(name, epilog=_listed(EXAMPLES[name]))(
            getattr(importlib.import_module(f"anchor_cli.commands.{function}"), function)
        )
        return typer.main.get_command(only)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl(list(commands.items()))


def _listed(examples: Sequence[str]) -> str:
    """An epilog whose lines stay lines: a paragraph that starts with \\b is not filled."""
    return "\b\n" + "\n".join(["Examples:", *(f"  {line}" for line in examples)])


app = typer.Typer(
    name="anchor",
    cls=_InOrderOfUse,
    help="Train text-embedding language models by Anchor Embedding (arXiv 2509.03020): bidirectional reconstruction "
    "(Stage I), then contrastive training (Stage II). Made for KURE, a Korean and English retrieval model, and usable "
    "for any pairs.",
    epilog="Exit codes: 0 done, 1 failed while running, 2 wrong usage, spec or input, 75 stopped after saving. "
    "ANCHOR_DEBUG=1 shows tracebacks.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"anchor {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _anchor(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; every failure is one or two plain lines on stderr."""
    prepare_streams()
    arguments = [home_expanded(each) for each in (sys.argv[1:] if arguments is None else arguments)]
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="anchor", standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into an exit
            raise KeyboardInterrupt
        flush_results()
        return code if isinstance(code, int) else 0
    except AnchorError as error:
        return _fail(error.message, error.hint, error.exit_code, error)
    except typer.TyperException as error:  # wrong usage; its base class alone is public
        return _fail(*_usage(error), 2, error)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", None, 130, None)
    except BrokenPipeError:  # the reader of stdout has gone, as in `anchor spec … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        first = first_line(error)
        return _fail(f"{type(error).__name__}: {first}", "ANCHOR_DEBUG=1 shows where", 1, error)


def _usage(error: typer.TyperException) -> tuple[str, str | None]:
    message = error.format_message()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "anchor"
    if message.startswith("No such command"):
        name = message.split("'")[1]
        near = nearest(name, [known for names in COMMANDS.values() for known in names])
        return f"{name}: no such command", f"did you mean anchor {near}?" if near else "anchor --help lists them"
    return " ".join(message.split()), f"{path} --help explains"


def _fail(message: str, hint: str | None, code: int, error: BaseException | None) -> int:
    if error is not None and os.environ.get("ANCHOR_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    from anchor_cli.base.console import console

    out = console()
    with contextlib.suppress(OSError):  # stderr is full or gone: the exit code is what is left
        out.print(f"anchor: {message}", style="bold red" if code == 1 or code == 2 else None)
        if hint:
            out.print(f"  {hint}")
    return code


def _keep_stdout_for_results() -> None:
    """transformers imports accelerate, that imports DeepSpeed, and DeepSpeed logs to stdout where there is no GPU."""
    import logging

    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def _let_memory_segments_grow() -> None:
    """torch's allocator for sizes that change with every micro-batch, before torch is imported; the user's own stands.

    Measured by others only (PyTorch's CUDA notes, "Optimizing memory usage"); unmeasured here.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def main() -> None:
    """Entry point of the `anchor` command. DeepSpeed's launcher adds an argument that is in its environment, too."""
    prepare_home()
    _let_memory_segments_grow()
    _keep_stdout_for_results()
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    sys.exit(run())


if __name__ == "__main__":
    main()
