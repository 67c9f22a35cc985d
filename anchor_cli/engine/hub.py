"""A Hub that does not answer costs ten seconds, not the minutes of its library's retries."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from anchor_cli.words.console import warn
from anchor_cli.words.spec import RunSpec

PATIENCE_S = 10.0


def needs_hub(spec: RunSpec) -> bool:
    """Whether a run names anything that is not a file here: its model, or a benchmark."""
    if not Path(spec.model_name_or_path).expanduser().exists():
        return True
    if not (spec.eval_steps or spec.eval_on_start):
        return False
    if spec.eval_data is None:
        return True
    return not all(Path(name).exists() or Path(name.partition(":")[2]).is_dir() for name in spec.eval_data)


def answers(endpoint: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether anything at all comes back from the Hub's address in time."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=patience_s):
            return True
    except urllib.error.HTTPError:
        return True  # an answer, if a rude one
    except (OSError, ValueError):
        return False


def use_the_cache_when_the_hub_is_silent(spec: RunSpec) -> None:
    """Go offline when a Hub that the run would ask does not answer: what is cached is used, the rest is an error.

    Called before huggingface_hub is imported, which reads its environment once.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on") or not needs_hub(spec):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not answers(endpoint):
        warn(f"{endpoint} does not answer within {PATIENCE_S:.0f} s; going on with what is cached (HF_HUB_OFFLINE=1)")
        os.environ["HF_HUB_OFFLINE"] = "1"
