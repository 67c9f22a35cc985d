"""Checkpoints that are whole or absent.

    checkpoint-{N}/   model.safetensors config.json tokenizer.json tokenizer_config.json llm2vec_config.json anchor.json
                      training_state.json optimizer-XXXXX-of-XXXXX.safetensors manifest.json (sizes and SHA-256 of all)

Everything is written into `.checkpoint-{N}.partial` beside its place, flushed to the disk, and committed by one rename.
All formats are JSON and safetensors: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from anchor_cli.words.contract import TextContract, write_contract
from anchor_cli.words.errors import InputError
from anchor_cli.words.files import fsync_folder, fsync_tree, sha256_file, write_json
from anchor_cli.words.run_folder import TRAINING_STATE, checkpoint_step, list_checkpoints

MANIFEST = "manifest.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def verify_checkpoint(folder: Path, *, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, a phrase each; empty: it is whole. `hashes=False` compares sizes only."""
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    problems = []
    for name, known in manifest.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != known["size"]:
                problems.append(f"{name} has {size:,} bytes instead of {known['size']:,}")
            elif hashes and sha256_file(path) != known["sha256"]:
                problems.append(f"{name} was changed after it was written (checksum differs)")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def newest_whole(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    damaged: list[str] = []
    for folder in reversed(list_checkpoints(run_folder)):
        problems = verify_checkpoint(folder)
        if not problems:
            return folder, damaged
        damaged.append(f"{folder}: damaged: {'; '.join(problems)}")
    return None, damaged


def read_state(folder: Path) -> dict[str, Any]:
    """`training_state.json` of a checkpoint. Raises InputError."""
    try:
        state: dict[str, Any] = json.loads((folder / TRAINING_STATE).read_text(encoding="utf-8"))
        return state
    except (OSError, ValueError) as error:
        message = f"{folder / TRAINING_STATE}: cannot be read ({error})"
        raise InputError(message, hint="is this a checkpoint of anchor train?") from None


def partial_folder(run_folder: Path, step: int) -> Path:
    """Where checkpoint-{step} is put together: the same place for all ranks."""
    return run_folder / f".checkpoint-{step}.partial"


def sweep_partials(run_folder: Path) -> None:
    """Remove what an interrupted save left behind."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.removed"):
        for folder in run_folder.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def write_model_files(folder: Path, engine: Any, source: str, contract: TextContract) -> None:
    """Model, config, tokenizer and text contract into `folder`. Rank 0 writes; under ZeRO-3 every rank takes part.

    The config says nothing of our attention: any tool loads the folder as the stock model it is.
    """
    state = _full_state_dict(engine)
    if engine.global_rank != 0:
        return
    language_model = engine.module.language_model
    language_model.config.use_cache = True
    try:
        language_model.save_pretrained(folder, state_dict=state, max_shard_size="1TB")
    finally:
        language_model.config.use_cache = False
    copy_tokenizer(source, folder)
    write_contract(folder, contract)
    write_json(
        folder / "llm2vec_config.json",
        {
            "pooling_mode": contract.pooling_mode,
            "max_length": contract.max_seq_length,
            "doc_max_length": contract.max_seq_length,
            "skip_instruction": contract.pooling_mode != "eos_token",
        },
    )


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
    """The tokenizer's files as they are; for a Hub id, those in the Hub's cache."""
    if Path(source).is_dir():
        for name in _TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, folder / name)
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def commit(partial: Path, final: Path) -> None:
    """Manifest, flush, one rename, flush. After it the checkpoint exists, before it it does not."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(partial)): {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in files
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


def prune(run_folder: Path, limit: int | None, best_step: int | None) -> list[Path]:
    """Remove the oldest checkpoints beyond `limit`, never the best nor the newest whole one. Returns what went."""
    if limit is None:
        return []
    found = list_checkpoints(run_folder)
    whole = [path for path in found if not verify_checkpoint(path, hashes=False)]
    protected = {path for path in found if best_step is not None and checkpoint_step(path) == best_step}
    protected |= set(whole[-1:])
    removable = [path for path in found if path not in protected]
    gone = removable[: max(0, len(found) - limit)]
    for path in gone:
        trash = path.with_name(f".{path.name}.removed")
        os.rename(path, trash)  # gone at once under its name, then emptied
        shutil.rmtree(trash, ignore_errors=True)
    return gone


def needed_bytes(num_parameters: int, bytes_per_weight: int) -> int:
    """Bytes of one checkpoint: model weights, fp32 weights and two moments, and 32 MB for the rest (tokenizer)."""
    return num_parameters * (bytes_per_weight + 12) + 32 * 2**20

