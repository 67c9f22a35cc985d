"""Putting an export on the Hugging Face Hub: private unless asked otherwise, the token from the environment only."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from anchor_cli.base.errors import InputError, RunError, first_line
from anchor_cli.base.hub import hub_is_off
from anchor_cli.export.card import is_local

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKEN = "HF_TOKEN"


def check_push(repo: str) -> None:
    """What would stop a push, said before the export is made.

    Raises:
        InputError: not NAMESPACE/NAME, no token in the environment, or the Hub is switched off.
    """
    if not _REPO.fullmatch(repo):
        raise InputError(f"--push-to-hub {repo}: expected NAMESPACE/NAME, such as my-team/kure-stage1")
    if not os.environ.get(_TOKEN):
        raise InputError(f"--push-to-hub {repo}: no token", f"set {_TOKEN} in the environment; it is written nowhere")
    if hub_is_off():
        raise InputError(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set", "unset it to push")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Create the repository if it is not there and upload `folder` in one commit. Returns its address.

    In the uploaded `stage_II.json` the model is the repository; it and `spec.json` go without local paths.

    Raises:
        RunError: the Hub refused or could not be reached; the local export stays.
        InputError: the repository exists and is public, and a private one was asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ[_TOKEN])
    try:
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        if private and not api.repo_info(repo).private:
            raise InputError(f"--push-to-hub {repo}: exists and is public", "--public pushes there all the same")
        operations = [
            CommitOperationAdd(str(path.relative_to(folder)), _without_paths(path, repo))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        api.create_commit(repo, operations, commit_message="Export of anchor")
    except InputError:
        raise
    except Exception as error:  # the library raises its own, requests' and httpx' kinds
        first = first_line(error).replace(os.environ[_TOKEN], "***")
        raise RunError(f"--push-to-hub {repo}: {first}", f"the export itself is whole: {folder}") from error
    return address


def _without_paths(path: Path, repo: str) -> str | bytes:
    """A file to upload: its path, or the bytes of a JSON file without this machine's paths."""
    if path.name not in ("stage_II.json", "spec.json"):
        return str(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in ("dataset_file_path", "output_dir", "deepspeed", "eval_data"):
        content.pop(key, None)
    base = str(content.get("model_name_or_path", ""))
    base = repo if path.name == "stage_II.json" else Path(base).name if is_local(base) else base
    content["model_name_or_path"] = base
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
