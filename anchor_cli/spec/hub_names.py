"""Whether a spec names anything that must come from the Hugging Face Hub. Paths are looked at, nothing is asked."""

from __future__ import annotations

from pathlib import Path

from anchor_cli.spec.spec import RunSpec


def needs_hub(spec: RunSpec) -> bool:
    """Whether a run names anything that is not a file here: its model, its data, or a benchmark."""
    if spec.dataset_file_path.startswith("hf://") or not Path(spec.model_name_or_path).expanduser().exists():
        return True
    if not (spec.eval_steps or spec.eval_on_start):
        return False
    if spec.eval_data is None:
        return True
    return not all(Path(name).exists() or Path(name.partition(":")[2]).is_dir() for name in spec.eval_data)
