"""Checkpoints that are whole or absent.

    checkpoint-{N}/   model.safetensors config.json tokenizer.json tokenizer_config.json llm2vec_config.json anchor.json
                      training_state.json optimizer-XXXXX-of-XXXXX.safetensors manifest.json (sizes and SHA-256 of all)

Everything is written into `.checkpoint-{N}.partial` beside its place, flushed to the disk, and committed by one rename.
All formats are JSON and safetensors: nothing is ever unpickled.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from anchor_cli.base.checkpoints import (
    MANIFEST,
    best_checkpoint,
    checkpoint_bytes,
    list_checkpoints,
    verify_checkpoint,
)
from anchor_cli.base.contract import TextContract
from anchor_cli.base.files import free_bytes, fsync_folder, fsync_tree, in_units, sha256_file, write_json
from anchor_cli.data.text import tokenizer_folder
from anchor_cli.model.folder import save_model

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def partial_folder(run_folder: Path, step: int) -> Path:
    """Where checkpoint-{step} is put together: the same place for all ranks."""
    return run_folder / f".checkpoint-{step}.partial"


def sweep_partials(run_folder: Path) -> None:
    """Remove what an interrupted save left behind."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.removed"):
        for folder in run_folder.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def write_model_files(folder: Path, engine: Any, source: str, contract: TextContract) -> None:
    """Model, config, tokenizer and text contract into `folder`. Rank 0 writes; under ZeRO-3 every rank takes part."""
    state = _full_state_dict(engine)
    if engine.global_rank == 0:
        save_model(folder, engine.module.language_model, contract, state_dict=state)
        copy_tokenizer(source, folder)


def _full_state_dict(engine: Any) -> dict[str, Any]:
    """The language model's weights on the CPU; partitioned ones (ZeRO-3) are gathered one parameter at a time."""
    model = engine.module.language_model
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return {name: t.detach() for name, t in model.state_dict().items()}
    import deepspeed

    full: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if engine.global_rank == 0:
                full[name] = parameter.detach().cpu().clone()
    return full


def copy_tokenizer(source: str, folder: Path) -> None:
    """The tokenizer's files byte by byte, those of a Hub id from the Hub's cache.

    Never through `AutoTokenizer.save_pretrained`: transformers 5 rebuilds a known class from code and writes another
    `tokenizer.json`, which the contract's fingerprint would then have to be the same for.
    """
    for name in _TOKENIZER_FILES:
        found = _tokenizer_file(source, name)
        if found is not None:
            shutil.copyfile(found, folder / name)


@cache
def _tokenizer_file(source: str, name: str) -> Path | None:
    """Asked once a process, at its start (`needed_bytes`): a network that fails later in the night changes nothing."""
    if Path(source).is_dir():
        of_texts = "token" in name or "chat" in name
        path = (tokenizer_folder(Path(source)) if of_texts else Path(source)) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:  # LocalEntryNotFoundError, offline and not in the cache, is one of them
        return None


def commit(partial: Path, final: Path) -> None:
    """Manifest, flush, one rename, flush. After it the checkpoint exists, before it it does not."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=8) as pool:
        hashes = list(pool.map(sha256_file, files))
    manifest = {
        str(path.relative_to(partial)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    write_json(partial / MANIFEST, {"files": manifest})
    for path in files:
        path.chmod(0o644)  # safetensors writes 0600; a checkpoint is read by others' tools
    fsync_tree(partial)
    old = final.with_name(f".{final.name}.removed")
    if final.exists():  # the same step saved before: damaged, or by a run that was continued from further back
        os.rename(final, old)
    os.rename(partial, final)
    fsync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(run_folder: Path, limit: int | None, *, hashes: bool = False) -> list[Path]:
    """Remove the oldest checkpoints beyond `limit`. Returns what went.

    Never the best by `eval/avg/ndcg@10` (of those that were evaluated), nor the newest whole one (`hashes=False`: whole
    by size; the one just written is). Damaged ones go first.
    """
    found = list_checkpoints(run_folder)
    gone = removable(run_folder, found, limit, hashes=hashes)
    for path in gone:
        trash = path.with_name(f".{path.name}.removed")
        os.rename(path, trash)  # gone at once under its name, then emptied
        shutil.rmtree(trash, ignore_errors=True)
    return gone


def removable(run_folder: Path, found: list[Path], limit: int | None, *, hashes: bool) -> list[Path]:
    """What `prune` removes of `found` (oldest first)."""
    if limit is None or len(found) <= limit:
        return []
    whole = [path for path in found if not verify_checkpoint(path, hashes=hashes)]
    protected = {best_checkpoint(run_folder), *whole[-1:]}
    damaged_first = sorted(found, key=lambda path: path in whole)
    return [path for path in damaged_first if path not in protected][: len(found) - limit]


def needed_bytes(num_parameters: int, bytes_per_weight: int, source: str) -> int:
    """Bytes of one checkpoint: model weights, fp32 weights and two moments, the tokenizer's files, 256 KB of JSON."""
    found = [_tokenizer_file(source, name) for name in _TOKENIZER_FILES]
    tokenizer = sum(path.stat().st_size for path in found if path is not None)
    return checkpoint_bytes(num_parameters, bytes_per_weight, tokenizer + 2**18)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises OSError when the disk of `folder` has less than `num_bytes` free."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise OSError(f"{in_units(num_bytes)} needed, {in_units(free)} free on the disk of {folder}")
