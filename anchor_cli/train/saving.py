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

from safetensors import SafetensorError

from anchor_cli.base.checkpoints import (
    MANIFEST,
    TRAINING_STATE,
    checkpoint_bytes,
    list_checkpoints,
    prune,
)
from anchor_cli.base.console import warn
from anchor_cli.base.contract import TextContract
from anchor_cli.base.errors import InputError
from anchor_cli.base.files import free_bytes, fsync_folder, fsync_tree, in_units, sha256_file, write_json
from anchor_cli.data.text import tokenizer_folder
from anchor_cli.model.folder import save_model
from anchor_cli.spec.schedule import interval_steps
from anchor_cli.train.metrics_log import MetricsLog
from anchor_cli.train.optimizer_state import save_optimizer_state
from anchor_cli.train.run import Run

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Checkpoints:
    """When a run saves, what stands, and what a full disk costs: a checkpoint, not the run. All ranks save together."""

    def __init__(self, run: Run, log: MetricsLog | None) -> None:
        self._run = run
        self._log = log  # of rank 0
        self._every = interval_steps(run.spec.save_steps, run.total_steps)
        self.saved_step: int | None = run.first_step if run.checkpoint else None
        self._tried_step = self.saved_step
        self._retry_step: int | None = None  # after a save that failed

    @property
    def newest(self) -> Path | None:
        """The checkpoint that was written last, or the run continued from."""
        return None if self.saved_step is None else self._run.files.checkpoint(self.saved_step)

    def due(self, step: int) -> bool:
        """Every save_steps and at the end, each once; again a while after a save that failed."""
        on_schedule = self._every and step % self._every == 0 and step > 0
        due = on_schedule or step in (self._run.last_step, self._retry_step)
        return bool(due) and step not in (self.saved_step, self._tried_step)

    def save(self, step: int) -> bool:
        """True when checkpoint-{step} stands; False when the disk could not hold it (a warning; tried again later)."""
        run, log = self._run, self._log
        self._tried_step = step
        try:
            save(run, step, log)
        except OSError as error:
            self._retry_step = step + max(1, (self._every or run.total_steps) // 10)
            if log:
                log.event("checkpoint_failed", step, reason=str(error))
                kept = f"{self.newest.name} stays" if self.newest else "there is none yet"
                again = f"; next try at step {self._retry_step}" if self._retry_step <= run.last_step else ""
                warn(f"checkpoint-{step} could not be written ({error}); {kept}{again}")
            return False
        self._retry_step, self.saved_step = None, step
        if log:
            log.event("checkpoint", step)
            try:
                prune(run.folder, run.spec.save_total_limit, saved=self.newest)
            except OSError as error:  # the new one stands: not a reason to lose the run
                warn(f"older checkpoints could not be removed ({error}); the next save tries again")
        return True


def require_room(run: Run) -> None:
    """Before the first step: room for one checkpoint; a warning when there is none for all this run will keep.

    Raises:
        InputError: not even one fits.
    """
    one, every = bytes_of_one(run), interval_steps(run.spec.save_steps, run.total_steps)
    planned = 1 + ((run.last_step - run.first_step - 1) // every if every else 0)
    limit = run.spec.save_total_limit
    count = planned if limit is None else min(planned, max(1, limit + 1 - len(list_checkpoints(run.folder))))
    free = free_bytes(run.folder)
    if free < one and run.first_step < run.last_step:
        raise InputError(
            f"{run.folder}: {in_units(free)} free, but one checkpoint needs {in_units(one)}",
            hint="free some space, or set output_dir to another disk",
        )
    if free < count * one:
        warn(
            f"{run.folder}: {in_units(free)} free, but the {count} checkpoints of {in_units(one)} to come"
            f" need {in_units(count * one)}; set save_total_limit or free some space"
        )


def save(run: Run, step: int, log: MetricsLog | None) -> None:
    """Write checkpoint-{step}; every rank calls it. It appears whole, by one rename, or not at all.

    Raises:
        OSError: on every rank, when any rank could not write; what was written is removed.
    """
    partial = run.folder / f".checkpoint-{step}.partial"  # the same place for all ranks
    metrics_bytes = 0

    def begin() -> None:
        nonlocal metrics_bytes
        sweep_partials(run.folder)
        require_space(run.folder, bytes_of_one(run))
        partial.mkdir()
        metrics_bytes = log.flushed_bytes() if log else 0

    def write_model() -> None:
        write_model_files(partial, run.engine, run.spec.model_name_or_path, run.contract)

    def write_optimizer() -> None:
        if run.updates_before(step):
            save_optimizer_state(run.engine, partial, run.ranks.rank, run.ranks.world_size)

    def finish() -> None:
        write_json(partial / TRAINING_STATE, run.training_state(step, metrics_bytes))
        commit(partial, run.files.checkpoint(step))

    for part, by_all in ((begin, False), (write_model, True), (write_optimizer, True), (finish, False)):
        problem: str | None = None
        try:
            if by_all or run.is_first:
                part()
        except (OSError, SafetensorError) as error:
            problem = str(error) or type(error).__name__
        if problem := run.ranks.first_text(problem):
            if run.is_first:
                sweep_partials(run.folder)
            raise OSError(problem)


def bytes_of_one(run: Run) -> int:
    """Bytes of one checkpoint of this run: tensors, the tokenizer's files, 256 KB of JSON."""
    weights = sum(int(getattr(p, "ds_numel", p.numel())) for p in run.model.parameters())
    tokenizer = sum(len(_tokenizer_file(run.spec.model_name_or_path, name) or b"") for name in _TOKENIZER_FILES)
    return checkpoint_bytes(weights, 2 if run.spec.precision == "bfloat16" else 4, tokenizer + 2**18)


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
        content = _tokenizer_file(source, name)
        if content is not None:
            (folder / name).write_bytes(content)


@cache
def _tokenizer_file(source: str, name: str) -> bytes | None:
    """Read once a process, at its start (`bytes_of_one`): a network that fails later, or a model's folder that goes,
    such as a checkpoint of Stage I that its own run rotates away, changes nothing."""
    if Path(source).is_dir():
        of_texts = "token" in name or "chat" in name
        path = (tokenizer_folder(Path(source)) if of_texts else Path(source)) / name
        return path.read_bytes() if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source, name)).read_bytes()
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


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises OSError when the disk of `folder` has less than `num_bytes` free."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise OSError(f"{in_units(num_bytes)} needed, {in_units(free)} free on the disk of {folder}")
