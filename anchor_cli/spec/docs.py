"""The spec's documentation, made from the spec: what a key expects, the JSON Schema, the reference page.

python -m anchor_cli.spec.docs        writes docs/spec.schema.json and docs/reference/spec.md
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from anchor_cli.spec import aliases as compat
from anchor_cli.spec.spec import RunSpec

SCHEMA_PATH = "docs/spec.schema.json"
REFERENCE_PATH = "docs/reference/spec.md"

GROUPS: dict[str, str] = {
    "model_name_or_path": "Model, data, place",
    "max_seq_length": "Text and method",
    "stage": "Stage II",
    "learning_rate": "Optimisation",
    "per_device_train_batch_size": "Batches",
    "precision": "Arithmetic",
    "eval_steps": "Evaluation",
    "save_steps": "Saving",
    "logging_steps": "Logging",
}
"""Heading of the group that starts at a key."""

_KINDS = {"number": "a number", "integer": "a whole number", "boolean": "true or false", "string": "text"}
_BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@functools.cache
def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a spec file; the research code's spellings are allowed, its ignored keys too."""
    made = RunSpec.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["title"] = "anchor run spec"
    ours = made["properties"]
    for prop in ours.values():
        prop.pop("title", None)
    foreign = {name: {**_bare(ours[key]), "description": f"Alias of {key}."} for name, key in compat.RENAMED.items()}
    for name in ("torch_dtype", "dtype", "bf16"):
        foreign[name] = {"description": "Alias of precision."}
    for name in sorted(compat.IGNORED):
        foreign[name] = {"description": "Ignored: means nothing here."}
    for name, (_, why) in sorted(compat.REFUSED.items()):
        foreign[name] = {"description": f"Refused where it would change the result: {why}."}
    made["properties"] = {"$schema": {"type": "string"}, **ours, **foreign}
    return made


def _bare(prop: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in prop.items() if key not in ("description", "default")}


def expected(key: str) -> str:
    """What a key expects, such as `a number above 0`, `one of text, content`, `a whole number of at least 1`."""
    return _expectation(schema()["properties"][key])


def _expectation(prop: dict[str, Any]) -> str:
    if "anyOf" in prop:
        return ", or ".join(_expectation(kind) for kind in prop["anyOf"])
    if "const" in prop:
        return json.dumps(prop["const"])
    if "enum" in prop:
        return f"one of {', '.join(prop['enum'])}"
    kind = prop.get("type")
    if kind == "null":
        return "null"
    if kind == "array":
        return f"a list, each {_expectation(prop['items'])}"
    if kind == "object":
        return "an object of texts"
    kind_text = _KINDS[str(kind)]
    if prop.get("minLength"):
        kind_text = "a text that is not empty"
    if prop.get("pattern"):
        kind_text = "a name for a folder, without slashes"
    bounds = [f"{relation} {shown_value(prop[name])}" for name, relation in _BOUNDS.items() if name in prop]
    return " ".join([kind_text, " and ".join(bounds)]).strip()


def shown_value(value: Any) -> str:
    """A value as JSON, a whole float without its `.0`."""
    whole = isinstance(value, float) and value == int(value)
    return json.dumps(int(value) if whole else value, ensure_ascii=False)


def reference() -> str:
    """The reference page, Markdown."""
    lines = [
        "# The run spec, key by key",
        "",
        "Generated from `anchor_cli/spec/spec.py` by `python -m anchor_cli.spec.docs`; a test keeps it current.",
        "",
        "One flat JSON object. An unknown key is an error with the nearest name. `anchor spec SPEC` prints the spec",
        "resolved, with where each value came from; `--set key=value` overrides a key (the value is read as JSON, else",
        'as text). A `"$schema"` that names `docs/spec.schema.json` lets editors complete and check the file.',
    ]
    for key, prop in RunSpec.model_json_schema()["properties"].items():
        if key in GROUPS:
            lines += ["", f"## {GROUPS[key]}", "", "| key | expects | default | meaning |", "|---|---|---|---|"]
        default = f"`{shown_value(prop['default'])}`" if "default" in prop else "**required**"
        cells = [f"`{key}`", _expectation(prop), default, " ".join(prop["description"].split())]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "## Spellings of the research code", "", "| spelling | is |", "|---|---|"]
    lines += [f"| `{name}` | `{key}` |" for name, key in compat.RENAMED.items()]
    lines += [f"| `{name}` | `precision` |" for name in ("torch_dtype", "dtype", "bf16")]
    lines += ["", "## Refused", "", "Each only with a value that would change the result; otherwise it is ignored.", ""]
    lines += ["| key | why |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, (_, why) in sorted(compat.REFUSED.items())]
    lines += ["", "## Ignored", "", "Named once, in one line, when a spec holds them:", ""]
    lines += [", ".join(f"`{name}`" for name in sorted(compat.IGNORED)) + ".", ""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Every generated file: its path in the repository and its text."""
    return {
        SCHEMA_PATH: json.dumps(schema(), ensure_ascii=False, indent=2) + "\n",
        REFERENCE_PATH: reference(),
    }


if __name__ == "__main__":
    for name, text in pages().items():
        path = Path(__file__).parents[2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
