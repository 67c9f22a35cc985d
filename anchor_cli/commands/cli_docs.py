"""The reference page of the commands, made from the commands.

python -m anchor_cli.commands.cli_docs        writes docs/reference/cli.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from anchor_cli.commands.cli import COMMANDS, app

PAGE = "docs/reference/cli.md"


def page() -> str:
    """The page, Markdown: every command with its arguments and options, in the order of `anchor --help`."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# The commands",
        "",
        "Generated from the commands by `python -m anchor_cli.commands.cli_docs`; a test keeps it current.",
        "",
        " ".join(str(group.epilog).split()),
    ]
    for heading, names in COMMANDS.items():
        lines += ["", f"## {heading}"]
        for name in names:
            lines += ["", *_command(name, group.get_command(None, name))]
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any) -> list[str]:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [
        param
        for param in command.params
        if param.param_type_name == "option" and not param.hidden and param.name != "help"
    ]
    words = ["anchor", name, *(_metavar(param) for param in arguments), *(["[OPTIONS]"] if options else [])]
    paragraphs = [" ".join(part.split()) for part in str(command.help or "").split("\n\n")]
    lines = [f"### `anchor {name}`", "", *_spaced(paragraphs), "", "```text", " ".join(words), "```"]
    if arguments or options:
        lines += ["", "| | |", "|---|---|"]
    for param in arguments:
        lines.append(f"| `{_metavar(param)}` | {_said(param)} |")
    for param in options:
        value = "" if param.is_flag else f" {param.metavar or _kind(param)}"
        spelled = ", ".join(f"`{word}{value}`" for word in [*param.opts, *param.secondary_opts])
        lines.append(f"| {_cell(spelled)} | {_said(param)} |")
    return lines


def _spaced(paragraphs: list[str]) -> list[str]:
    return [line for paragraph in paragraphs for line in (paragraph, "")][:-1]


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _kind(param: Any) -> str:
    return {"int": "N", "float": "X", "Path": "PATH"}.get(
        param.bare_type().strip("<>").removesuffix("]").rpartition("[")[2], "TEXT"
    )


def _said(param: Any) -> str:
    said = " ".join(str(param.help or "").split())
    default = param.default
    if default in (None, False, (), []) or callable(default) or "efault" in said:
        return _cell(said)
    return _cell(f"{said} Default: `{default}`.")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    path = Path(__file__).parents[2] / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    print(path)
