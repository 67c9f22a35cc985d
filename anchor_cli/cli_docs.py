"""The reference page of the commands, made from the commands.

python -m anchor_cli.cli_docs        writes docs/reference/cli.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from anchor_cli.cli import COMMANDS, EXAMPLES, app

PAGE = "docs/reference/cli.md"
COMPLETION = (
    "`anchor --install-completion` teaches the shell you are in (bash, zsh, fish) to complete commands and options; "
    "`anchor --show-completion` prints what it would install. Environment variables that are read:"
)
ENVIRONMENT = {
    "`ANCHOR_DEBUG=1`": "Tracebacks, and what DeepSpeed prints.",
    "`ANCHOR_HOME`": "Folder of the list of runs, by which names such as `checkpoint-2000` and the last run are found. "
    "Default: `~/.cache/anchor`.",
    "`ANCHOR_NANOBEIR`": "A snapshot of `anchor prepare nanobeir`, read in place of the Hub.",
    "`ANCHOR_HANG_TIMEOUT_S`": "Seconds without progress after which a run is ended. Default: 1800.",
    "`HOME`": "Without it, and without an account (a container's arbitrary uid), a folder of the user's own in `/tmp`.",
    "`NO_COLOR`": "Plain text on a terminal.",
    "`CUDA_VISIBLE_DEVICES`": "The GPUs that `anchor train` starts on and `anchor plan` plans for.",
    "`OMP_NUM_THREADS`": "CPU threads of each process that `anchor train` starts. Default: the cores, shared out.",
    "`RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`, `TORCHELASTIC_USE_AGENT_STORE`, "
    "`SLURM_*`": "Set by launchers: docs/how-to/multi-node.md.",
    "`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME`": "The Hub's key; its address; `1`: only the cache "
    "and folders; where the cache is.",
    "`WANDB_API_KEY`, `WANDB_BASE_URL`, `WANDB_PROJECT`, `WANDB_MODE`, `WANDB_DISABLED`": "Weights & Biases: its key, "
    "its address, the project (default `anchor`), `offline` or `disabled`; `true` switches it off.",
    "`NETRC`": "The file with W&B's key, where it is not `~/.netrc`.",
    "`CC`, `TORCH_EXTENSIONS_DIR`, `XDG_CACHE_HOME`": "Compiler and folders of kernels that are compiled on this host.",
    "`PYTORCH_ALLOC_CONF`, `PYTORCH_CUDA_ALLOC_CONF`": "torch's memory allocator. Default: `expandable_segments:True`.",
    "`DEEPSPEED_LOG_LEVEL`": "What DeepSpeed says. Default: `warning`.",
}
"""What the code reads from the environment (a test compares the names)."""


def page() -> str:
    """The page, Markdown: every command with its arguments and options, in the order of `anchor --help`."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# The commands",
        "",
        "Generated from the commands by `python -m anchor_cli.cli_docs`; a test keeps it current.",
        "",
        " ".join(str(group.epilog).split()),
    ]
    for heading, names in COMMANDS.items():
        lines += ["", f"## {heading}"]
        for name in names:
            lines += ["", *_command(name, group.get_command(None, name))]
    lines += ["", "## Completion and environment", "", COMPLETION, "", "| | |", "|---|---|"]
    lines += [f"| {_cell(names)} | {_cell(meaning)} |" for names, meaning in ENVIRONMENT.items()]
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any) -> list[str]:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [
        param
        for param in command.params
        if param.param_type_name == "option" and not param.hidden and param.name != "help"
    ]
    must = [f"{option.opts[0]} {_value(option)}" for option in options if option.required]
    words = ["anchor", name, *(_written(param) for param in arguments), *must, *(["[OPTIONS]"] if options else [])]
    paragraphs = [" ".join(part.split()) for part in str(command.help or "").split("\n\n")]
    lines = [f"### `anchor {name}`", "", *_spaced(paragraphs), "", "```text", " ".join(words), "```"]
    if arguments or options:
        lines += ["", "| | |", "|---|---|"]
    for param in arguments:
        lines.append(f"| `{_metavar(param)}` | {_meaning(param)} |")
    for param in options:
        value = "" if param.is_flag else f" {_value(param)}"
        spelled = ", ".join(f"`{word}{value}`" for word in [*param.opts, *param.secondary_opts])
        lines.append(f"| {_cell(spelled)} | {_meaning(param)} |")
    return [*lines, "", "```bash", *EXAMPLES[name], "```"]


def _spaced(paragraphs: list[str]) -> list[str]:
    return [line for paragraph in paragraphs for line in (paragraph, "")][:-1]


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _written(argument: Any) -> str:
    """As in the usage line of `--help`: `[WHAT]` may be left out, `WHAT...` may be repeated."""
    name = _metavar(argument) if argument.required else f"[{_metavar(argument)}]"
    return f"{name}..." if argument.nargs == -1 else name


def _value(option: Any) -> str:
    return str(option.metavar or _kind(option))


def _kind(param: Any) -> str:
    return {"int": "N", "float": "X", "Path": "PATH"}.get(
        param.bare_type().strip("<>").removesuffix("]").rpartition("[")[2], "TEXT"
    )


def _meaning(param: Any) -> str:
    meaning = " ".join(str(param.help or "").split())
    default = param.default
    if param.required and param.param_type_name == "option":
        return _cell(f"{meaning} Required.")
    if default is None or isinstance(default, bool) or default in ((), []) or callable(default) or "efault" in meaning:
        return _cell(meaning)
    return _cell(f"{meaning} Default: `{default}`.")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    path = Path(__file__).parents[1] / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    print(path)
