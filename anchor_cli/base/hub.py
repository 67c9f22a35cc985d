"""The Hugging Face Hub: which names mean it, whether it is switched off, whether it answers.

A Hub that does not answer costs ten seconds, not the minutes of its library's retries.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request

from anchor_cli.base.console import warn

PATIENCE_S = 10.0
_REACH_S = 10.0  # how long the Hub may take to say that it is there


def answers(endpoint: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether anything at all comes back from the Hub's address in time."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=patience_s):
            return True
    except urllib.error.HTTPError:
        return True  # any HTTP status means reachable
    except (OSError, ValueError):
        return False


def use_the_cache_when_the_hub_is_silent() -> None:
    """Go offline when the Hub does not answer: what is cached is used, the rest is an error.

    Called before huggingface_hub is imported, which reads its environment once.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not answers(endpoint):
        warn(f"{endpoint} does not answer within {PATIENCE_S:.0f} s; going on with what is cached (HF_HUB_OFFLINE=1)")
        os.environ["HF_HUB_OFFLINE"] = "1"


_revisions: dict[str, str | None] = {}


def revision_of(hub_id: str) -> str | None:
    """The newest commit of a data set on the Hub, or None when the Hub cannot be asked; asked once a process."""
    if hub_id not in _revisions:
        from huggingface_hub import HfApi

        try:
            _revisions[hub_id] = HfApi().dataset_info(hub_id, timeout=_REACH_S).sha
        except Exception:  # no network, no such data set, no permission: loading says which
            _revisions[hub_id] = None
    return _revisions[hub_id]
