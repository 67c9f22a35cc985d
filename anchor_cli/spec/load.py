"""From a file and `--set` to a RunSpec, with the source of each value and one line for a mistake."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from anchor_cli.base.contract import with_line_breaks
from anchor_cli.base.errors import InputError, nearest
from anchor_cli.base.files import home_expanded
from anchor_cli.spec import aliases as compat
from anchor_cli.spec.deepspeed import shipped_folder
from anchor_cli.spec.docs import expected
from anchor_cli.spec.spec import RunSpec, derived_defaults

PATH_KEYS = (
    "model_name_or_path",
    "dataset_file_path",
    "output_dir",
    "deepspeed",
    "eval_data",
    "guide_model_name_or_path",
)
"""Keys that name files or folders; `~/` in them is the home folder."""


@dataclass(frozen=True)
class SpecReading:
    """A spec and the source of each value."""

    spec: RunSpec
    sources: dict[str, str]
    """For every key: `file`, `--set`, `default`, or `derived`, with another spelling in brackets."""
    ignored: list[str]
    """Keys of the research code that mean nothing here, in the file's order."""


def read_spec(path: str | Path, overrides: list[str]) -> SpecReading:
    """Read, translate, merge and validate.

    Raises:
        InputError: anything wrong with the file, an override, a key or a value.
    """
    ours: dict[str, Any] = {}
    sources = dict.fromkeys(RunSpec.model_fields, "default")
    ignored: list[str] = []
    layers = [("file", str(path), _read_json(_or_shipped(Path(path)))), ("--set", "--set", _parse_overrides(overrides))]
    for source, where, given in layers:
        layer, spelled, layer_ignored = compat.translate(given, where)
        _refuse_unknown(layer, where)
        ours |= layer
        sources |= {key: f"{source} ({spelled[key]})" if key in spelled else source for key in layer}
        ignored += layer_ignored
    ours |= {key: _with_home(ours[key]) for key in PATH_KEYS if key in ours}
    if sources["text_template"].startswith("--set") and isinstance(ours["text_template"], str):
        ours["text_template"] = with_line_breaks(ours["text_template"])
    sources |= dict.fromkeys(derived_defaults(ours), "derived")
    try:
        return SpecReading(RunSpec.model_validate(ours), sources, ignored)
    except ValidationError as error:
        raise _input_error(error, str(path), ours, sources) from None


def _or_shipped(path: Path) -> Path:
    """The path, or, where no file is there, the spec of that name that came with the package: `train_configs/…`."""
    if path.parts[:1] != ("train_configs",) or path.exists():
        return path
    shipped = shipped_folder("train_configs").joinpath(*path.parts[1:])
    return shipped if shipped.is_file() else path


def _with_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_home(each) for each in value]
    return home_expanded(value) if isinstance(value, str) else value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_twice, parse_constant=_no_constant
        )
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", _files_beside(path)) from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, expected a JSON file", _files_beside(path / "x")) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(given, dict):
        raise InputError(f"{path}: expected one JSON object, got {shown(given)}")
    given.pop("$schema", None)  # for editors
    return given


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)}: the key is there twice")
    return unique


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _files_beside(path: Path) -> str | None:
    beside = sorted(other.name for other in path.parent.glob("*.json")) if path.parent.is_dir() else []
    if not beside:
        return "anchor init writes one to start from"
    near = nearest(path.name, beside)
    return f"did you mean {path.parent / near}?" if near else f"there are: {', '.join(beside[:5])}"


def _parse_overrides(overrides: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {override}: expected key=value")
        given[key.strip()] = _value_of(key.strip(), text)
    return given


def _value_of(key: str, text: str) -> Any:
    """The value of `--set KEY=TEXT`: JSON; plain text needs no quotes, nor does a text key's 20240101 or true."""
    field = RunSpec.model_fields.get(compat.RENAMED.get(key, key))
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text
    if field is not None and not _fits(field, value) and _fits(field, text):
        return text
    return value


def _fits(field: FieldInfo, value: Any) -> bool:
    """Whether a key of the spec takes a value."""
    try:
        TypeAdapter(field.rebuild_annotation()).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _refuse_unknown(layer: dict[str, Any], where: str) -> None:
    for key in layer:
        if key not in RunSpec.model_fields:
            near = nearest(key, [*RunSpec.model_fields, *compat.ALIASES, *compat.REFUSED, *compat.IGNORED])
            hint = f"did you mean {near}?" if near else "anchor spec --keys lists all keys"
            raise InputError(f"{where}: {key}: unknown key", hint)


def _input_error(error: ValidationError, path: str, ours: dict[str, Any], sources: dict[str, str]) -> InputError:
    """The first problem in a line; the second line is its remedy, or the other keys that are wrong."""
    first = error.errors()[0]
    if first["type"] == "contradiction":
        problem, remedy = first["ctx"]["problem"], first["ctx"]["remedy"]
        overridden = [key for key in problem.split() if sources.get(key, "").startswith("--set")]
        return InputError(f"{path}{' with --set' if overridden else ''}: {problem}", remedy or None)
    key = str(first["loc"][0])
    others = list(dict.fromkeys(str(problem["loc"][0]) for problem in error.errors() if problem["loc"][0] != key))
    hint = f"also wrong: {', '.join(others)}" if others else None
    if first["type"] == "missing":
        return InputError(f"{path}: {key}: missing, expected {expected(key)}", hint)
    where = "--set" if sources[key].startswith("--set") else path
    spelled = sources[key].partition("(")[2].rstrip(")")
    shown_key = f"{key} (here {spelled})" if spelled else key
    wanted = str(first["ctx"]["error"]) if first["type"] == "value_error" else expected(key)
    return InputError(f"{where}: {shown_key}: got {shown(ours[key])}, expected {wanted}", hint)


def shown(value: Any) -> str:
    """A value as JSON, cut when long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def load_spec(path: str | Path, overrides: list[str] | None = None, *, announce: bool = True) -> RunSpec:
    """The validated spec of a file, with `key=value` overrides on top.

    `announce` says, in one line on stderr, which of the research code's keys were ignored.

    Raises:
        InputError: one line naming file, key, value and what was expected, and the nearest name of an unknown key.
    """
    reading = read_spec(path, overrides or [])
    if announce and reading.ignored:
        from anchor_cli.base.console import say

        say(f"{path}: ignored, they mean nothing here: {', '.join(reading.ignored)}")
    return reading.spec
