"""What a run is made of, settled by rank 0 before anything heavy: data, folder, what it continues from."""

from __future__ import annotations

import json
from typing import Any

from anchor_cli.base.checkpoints import newest_whole, read_state
from anchor_cli.base.console import warn
from anchor_cli.base.errors import InputError
from anchor_cli.spec.spec import NOT_OF_THE_RESULT, RunSpec

_PATHS = frozenset({"model_name_or_path", "dataset_file_path"})  # moved folders are harmless; data has a fingerprint
_BATCH = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"})


def resume_point(spec: RunSpec, data_fingerprint: str) -> dict[str, Any]:
    """What this experiment continues from: {"checkpoint": path or None, "state": its training state or None}.

    The newest whole checkpoint is taken; newer damaged ones are named. A changed spec or data set is refused.

    Raises:
        InputError: the differences that matter, one after the other.
    """
    checkpoint, damaged = newest_whole(spec.run_folder)
    for line in damaged:
        warn(line)
    if checkpoint is None:
        if damaged:
            warn("no whole checkpoint is left; training starts from the beginning")
        return {"checkpoint": None, "state": None}
    state = read_state(checkpoint)
    found = differences_that_matter(state["spec"], spec.model_dump(), state["global_batch_size"])
    if state["data_fingerprint"] != data_fingerprint:
        found.append("the training data are not the ones it began with")
    if found:
        raise InputError(
            f"{checkpoint}: this experiment began with another spec: {'; '.join(found)}",
            hint="put the values back, or give the new run its own experiment_id",
        )
    return {"checkpoint": str(checkpoint), "state": state}


def differences_that_matter(old: dict[str, Any], new: dict[str, Any], global_batch_size: int) -> list[str]:
    """`key: old -> new` for every key the result depends on. The global batch stays what the run began with."""
    found = []
    for key in new:
        if key in NOT_OF_THE_RESULT | _PATHS | _BATCH:
            continue
        before = old.get(key, RunSpec.model_fields[key].default)  # a key that was not there yet had its default
        if before != new[key]:
            was, is_now = (json.dumps(value, ensure_ascii=False) for value in (before, new[key]))
            found.append(f"{key}: {was} -> {is_now}")
    if new["global_batch_size"] is not None and new["global_batch_size"] != global_batch_size:
        found.append(f"global_batch_size: {global_batch_size} -> {new['global_batch_size']}")
    if new["global_batch_size"] is None:
        old_product = old["per_device_train_batch_size"] * old["gradient_accumulation_steps"]
        product = new["per_device_train_batch_size"] * new["gradient_accumulation_steps"]
        if old["global_batch_size"] is None and product != old_product:
            found.append(f"per_device_train_batch_size x gradient_accumulation_steps: {old_product} -> {product}")
    return found
