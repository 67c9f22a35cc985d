"""`{…}` fields of `experiment_id`: the name of a run's folder, made of what the run is."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchor_cli.base.errors import nearest

FIELDS = {
    "data": "`dataset_name`, or the name of the data's file or folder",
    "folder": "the last part of `dataset_file_path`",
    "model": "the last part of `model_name_or_path`",
    "gpus": "`global_batch_size` / (`per_device_train_batch_size` x `gradient_accumulation_steps`)",
    "warmup": "`warmup_ratio`, or `warmup_steps`",
}
"""Fields besides the keys of the spec themselves."""


def fill(pattern: str, values: Mapping[str, Any]) -> str:
    """The pattern with every field replaced by its value, fit for a folder's name; numbers without a needless `.0`.

    Raises:
        ValueError: a field that is none, or one without a value; the message is what is expected.
    """
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"{{field}}s with both braces ({error})") from None
    name = ""
    for text, field, _, _ in parts:
        name += text + ("" if field is None else _shown(_value(field, values)))
    return re.sub(r"[^\w.+=-]+", "-", name)


def _value(field: str, values: Mapping[str, Any]) -> Any:
    if field == "gpus":
        if not values["global_batch_size"]:
            raise ValueError("no {gpus} without global_batch_size, which says for how many GPUs the batch is meant")
        return values["global_batch_size"] // (
            values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
        )
    if field == "warmup":
        return values["warmup_steps"] if values["warmup_ratio"] is None else values["warmup_ratio"]
    if field in ("data", "folder"):
        stem = Path(values["dataset_file_path"]).name.split(".")[0] or "data"
        return (values["dataset_name"] or stem) if field == "data" else stem
    if field == "model":
        return Path(values["model_name_or_path"]).name or "model"
    if isinstance(values.get(field), str | int | float) and field != "experiment_id":
        return values[field]
    near = nearest(field, [*FIELDS, *values])
    raise ValueError(f"keys of the spec and {', '.join(FIELDS)} in braces, not {{{field}}}"
                     + (f" (did you mean {{{near}}}?)" if near and near != field else ""))  # fmt: skip


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
