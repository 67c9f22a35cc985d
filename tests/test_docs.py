"""The documentation against the program: commands parse, links resolve, specs load, messages exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from anchor_cli.spec.spec import RunSpec

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
HAND_WRITTEN = [page for page in PAGES if "reference" not in page.parts]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[list[str]]:
    """Arguments of every `anchor …` in a page's shell blocks, however it is started (torchrun, srun, docker …)."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                starts = place == 0 or words[0] in ("srun", "torchrun", "deepspeed", "docker")
                named = word in ("anchor", "anchor_cli") and words[place - 1] not in ("-t", "clone", "cd")
                if starts and named and place < len(words) - 1:
                    found.append(words[place + 1 :])
                    break
    return found


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    from anchor_cli.cli import COMMANDS, app

    group: Any = typer.main.get_command(app)
    known = {name for names in COMMANDS.values() for name in names}
    for arguments in command_lines(page):
        if arguments[0] == "." or arguments[0].startswith("-"):
            continue
        name, rest = arguments[0], [word for word in arguments[1:] if word not in ("…", "|")]
        assert name in known, f"{page.name}: anchor {' '.join(arguments)}"
        command = group.get_command(None, name)
        try:
            command.make_context(f"anchor {name}", rest, resilient_parsing=False)
        except Exception as error:
            raise AssertionError(f"{page.name}: anchor {' '.join(arguments)}: {error}") from error


def test_commands_are_found() -> None:
    """The finder itself: what it takes for a command line."""
    found = [" ".join(words) for words in command_lines(ROOT / "docs/how-to/multi-node.md")]
    assert found == ["train run.json"] * 3  # torchrun, deepspeed, srun


def anchors_of(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = [re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"(https?:|#|mailto:)", link):
            target, _, heading = link.partition("#")
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} -> {link}"
            assert not heading or heading in anchors_of(page.parent / target), f"{page.relative_to(ROOT)} -> {link}"


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_json_is_json_and_spec_keys_are_keys(page: Path) -> None:
    for block in blocks(page, "json"):
        value = json.loads(block)
        if not {"anchor", "positive", "query", "document"} & set(value):  # a training row
            assert set(value) <= set(RunSpec.model_fields), sorted(set(value) - set(RunSpec.model_fields))


def messages_of_the_program() -> str:
    """All strings of the package but docstrings; what is put into an f-string stands as `…`."""
    texts: list[str] = []
    for path in sorted((ROOT / "anchor_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring, or a string that describes an attribute
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_of_troubleshooting_are_those_of_the_program() -> None:
    """Every message in the tables' first column, cut at its `…` and numbers, is a text that the program can print."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = [
        part.strip(" :?")
        for row in re.findall(r"^\| (.+?) \|", page, flags=re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", row)
        for part in re.split(r"…|\bN\b|\d[\d.]*", message)
    ]
    messages = [message for message in messages if len(message) >= 6]
    printed = messages_of_the_program()
    assert [message for message in messages if message not in printed] == []
    assert len(messages) > 25
    assert "All strings of the package" not in printed and "The training loop of one rank" not in printed  # docstrings


def headings(page: Path) -> list[int]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.MULTILINE)]


KOREAN = [("README.md", "README.ko.md"), ("docs/tutorial.md", "docs/tutorial.ko.md")]


@pytest.mark.parametrize(("english", "korean"), KOREAN)
def test_the_korean_page_keeps_step(english: str, korean: str) -> None:
    """Same headings by level, same commands and code, same lists, same links (but for each other)."""
    ours, theirs = ROOT / korean, ROOT / english
    assert headings(ours) == headings(theirs)

    def commands(page: Path) -> list[list[str]]:
        return [[shlex.join(shlex.split(line, comments=True)) for line in block.splitlines()]
                for block in blocks(page, "bash")]  # fmt: skip

    assert commands(ours) == commands(theirs)
    for language in ("json", "python"):
        assert blocks(ours, language) == blocks(theirs, language)

    def parts(page: Path) -> list[str]:
        """Headings, blocks, list items, pictures and lines of a file tree, in their order."""
        return re.findall(r"^(#+ |```\w*|- |!\[|    )", page.read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert parts(ours) == parts(theirs)

    def links(page: Path) -> set[str]:
        named = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        return {link.split("#")[0].replace(".ko.md", ".md") for link in named} - {Path(english).name, ""}

    assert links(ours) == links(theirs)

    def named_commands(page: Path) -> set[str]:
        return set(re.findall(r"`((?:anchor|make|pip) [^`\n]+)`", page.read_text(encoding="utf-8")))

    assert named_commands(ours) == named_commands(theirs)
    assert len(re.findall(r"[가-힣]", ours.read_text(encoding="utf-8"))) > 500


def test_keys_of_the_research_code_are_what_the_page_says() -> None:
    """Its table of spec keys: the same here, another name, ignored, refused."""
    from anchor_cli.spec import aliases

    page = (ROOT / "docs/how-to/from-research-code.md").read_text(encoding="utf-8")
    table = page.split("## Keys of a spec")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|$", table, flags=re.MULTILINE)
    assert len(rows) == 8
    renamed = aliases.RENAMED | dict.fromkeys(("torch_dtype", "dtype", "bf16"), "precision")
    for keys, here in rows:
        for key in re.findall(r"`(\w+)`", keys):
            if here == "the same":
                assert key in RunSpec.model_fields, key
            elif here.startswith("`"):
                assert renamed[key] == here.strip("`"), key
            else:
                assert key in (aliases.IGNORED if here == "ignored" else aliases.REFUSED), key
