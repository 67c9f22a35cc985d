"""The Hugging Face Hub: which names mean it, whether it is switched off, whether it answers.

A Hub that does not answer costs ten seconds, not the minutes of its library's retries.
"""

from __future__ import annotations

import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

from anchor_cli.base.console import warn
from anchor_cli.base.errors import InputError

_HUB_FORM = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_PREFIX = "hf://"
PATIENCE_S = 10.0
_REACH_S = 10.0  # how long the Hub may take to say that it is there


def has_hub_form(name: str) -> bool:
    """Whether `name` is written as a repository of the Hub: `OWNER/NAME`, or an old model's `NAME`."""
    return _HUB_FORM.fullmatch(name) is not None


def is_hub_id(name: str) -> bool:
    """Whether `name` can only mean a repository of the Hub: `OWNER/NAME`, and no folder `OWNER` is here.

    Below a folder that is here it is a mistyped path; a stranger's repository may have that very name.
    """
    return has_hub_form(name) and "/" in name and not Path(name).parent.exists()


def hub_set(source: str) -> str | None:
    """OWNER/NAME of a data set that is named as the Hub's, `hf://OWNER/NAME` or `hf://datasets/…`; else None.

    Pairs of the Hub are named only so: without `hf://`, a missing `data/pairs` would be a stranger's data set.

    Raises:
        InputError: what follows `hf://` is no name of a data set.
    """
    if not source.startswith(_PREFIX):
        return None
    name = source.removeprefix(_PREFIX).removeprefix("datasets/")
    if not has_hub_form(name):
        raise InputError(f"{source}: {name!r} is no data set of the Hub", f"expected {_PREFIX}OWNER/NAME")
    return name


def hub_hint(source: str) -> str | None:
    """How a data set of the Hub is named, for a path that is not here and could be meant as one."""
    return f"a data set of the Hub is named {_PREFIX}{source}" if has_hub_form(source) else None


def hub_is_off() -> bool:
    """Whether `HF_HUB_OFFLINE` is set: local folders and the cache only."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def hub_address() -> str:
    """`HF_ENDPOINT`, default https://huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_answer(address: str, patience_s: float) -> tuple[str | None, str]:
    """(Date header, or None when it cannot be reached; reason), by a HEAD request. Any HTTP status means reachable."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=patience_s) as answer:
            return answer.headers.get("Date") or "", ""
    except urllib.error.HTTPError as error:
        return error.headers.get("Date") or "", ""
    except (OSError, ValueError) as error:
        return None, str(getattr(error, "reason", error))


_answered: set[str] = set()


def go_offline_if_the_hub_is_silent() -> None:
    """Set `HF_HUB_OFFLINE` when the Hub does not answer: what is cached is used, the rest is an error.

    Called before anything is asked of the Hub: its libraries try each file for minutes. They read their environment
    when they are imported, so those that are imported already are set as well. An answer is remembered.
    """
    address = hub_address()
    if hub_is_off() or address in _answered:
        return
    if hub_answer(address, PATIENCE_S)[0] is not None:
        _answered.add(address)
        return
    warn(f"{address} does not answer within {PATIENCE_S:.0f} s; going on with what is cached (HF_HUB_OFFLINE=1)")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = True


_revisions: dict[str, str | None] = {}


def revision_of(hub_id: str) -> str | None:
    """The newest commit of a data set on the Hub, or None when the Hub cannot be asked; asked once a process."""
    hub_id = hub_set(hub_id) or hub_id
    if hub_id not in _revisions:
        from huggingface_hub import HfApi

        try:
            _revisions[hub_id] = HfApi().dataset_info(hub_id, timeout=_REACH_S).sha
        except Exception:  # no network, no such data set, no permission: loading says which
            _revisions[hub_id] = None
    return _revisions[hub_id]
