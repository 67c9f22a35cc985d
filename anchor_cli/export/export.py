"""`anchor export`: a checkpoint becomes one folder that every next tool loads right, or nothing at all.

    export/   config.json model*.safetensors generation_config.json      transformers: AutoModel, AutoModelForCausalLM
              tokenizer.json tokenizer_config.json                       strips, closes, truncates (export/tokenizer.py)
              base_tokenizer/                                            as in training: anchor, GGUF converters
              modules.json sentence_bert_config.json config_sentence_transformers.json 1_Pooling/ 2_Normalize/
              llm2vec_config.json anchor.json spec.json scores.json stage_II.json parity.json README.md

Everything is written beside its place, certified there, and renamed once.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor_cli.base.checkpoints import checkpoint_step, is_ours, list_checkpoints, verify_checkpoint
from anchor_cli.base.console import say, warn
from anchor_cli.base.contract import FILE_NAME as CONTRACT
from anchor_cli.base.contract import TextContract
from anchor_cli.base.errors import InputError, RunError
from anchor_cli.base.files import free_bytes, staged_folder, sweep_staged, words_for_disk_errors, write_json
from anchor_cli.base.runs import RunFolder, read_json_lines
from anchor_cli.data.text import load_tokenizer
from anchor_cli.evaluate.embedder import contract_of
from anchor_cli.export import files as files
from anchor_cli.export.card import licence_file, model_card
from anchor_cli.export.certify import FILE_NAME as PARITY
from anchor_cli.export.certify import certify
from anchor_cli.export.tokenizer import write_tokenizer
from anchor_cli.model.folder import read_config

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Numbers that weights can be written in, and their bytes."""
_ROOM_BYTES = 64 * 2**20  # assumption: two tokenizers and the small files of any model


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    checkpoint: Path
    dtype: str
    parity: dict[str, Any]
    stage: str = "I"
    """The stage of the run that the checkpoint is from."""

    def as_dict(self) -> dict[str, Any]:
        """The `--json` document."""
        checks = self.parity["checks"]
        return {
            "folder": str(self.folder),
            "checkpoint": str(self.checkpoint),
            "dtype": self.dtype,
            "certificate": {
                "passed": self.parity["passed"],
                "num_texts": self.parity["num_texts"],
                "lowest_cosine": min(check["lowest_cosine"] for check in checks),
                "checked": sorted({check["against"] for check in checks}),
                "not_checked": self.parity["not_checked"],
            },
        }


def export(
    checkpoint: Path,
    *,
    out: Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    force: bool = False,
    name: str | None = None,
) -> Export:
    """Write, certify and name the export of `checkpoint`.

    Args:
        out: its folder; default `{checkpoint}-stage2` beside the checkpoint.
        dtype: of the weights, a key of `DTYPES`; default as in the checkpoint.
        max_shard_size: largest weight file, such as `5GB`.
        force: replace an export that is already there; nothing else is ever replaced.
        name: what the model card calls it, such as its Hub id; default the folder's name.

    Raises:
        InputError: the checkpoint is damaged or no model; `out` exists; a wrong option.
        RunError: no room on the disk, or the certificate failed. Nothing is left behind.
    """
    final = (out or checkpoint.with_name(f"{checkpoint.name}-stage2")).absolute()
    _check_source(checkpoint)
    _check_target(final, checkpoint, force)
    contract = contract_of(checkpoint, load_tokenizer(checkpoint))
    stored = str(read_config(checkpoint).get("dtype") or read_config(checkpoint).get("torch_dtype") or "float32")
    chosen = dtype or stored
    if chosen not in DTYPES:
        raise InputError(f"--dtype {chosen}: expected one of {', '.join(DTYPES)}")
    contract = contract.model_copy(update={"dtype": chosen})
    _check_room(final, checkpoint, DTYPES[chosen] / DTYPES.get(stored, 4))
    _say_state_of_run(checkpoint)
    sweep_staged(final)
    with _words_for_errors(checkpoint, final), staged_folder(final, replace=force) as folder:
        state = files.read_training_state(checkpoint)
        dimension = _write_weights(checkpoint, folder, contract, max_shard_size)
        _write_rest(checkpoint, folder, final, contract, dimension, state)
        say("certifying: the same texts through anchor, transformers and sentence-transformers in a fresh process")
        parity = certify(folder, checkpoint, converted=chosen != stored)
        for line in parity["not_checked"]:
            warn(f"not certified: {line}")
        write_json(folder / PARITY, parity)
        _write_card(checkpoint, folder, name or final.name, contract, dimension, state, parity)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    return Export(final, checkpoint, chosen, parity, state.get("spec", {}).get("stage", "I"))


def _check_source(checkpoint: Path) -> None:
    ours = is_ours(checkpoint)
    if ours and (problems := verify_checkpoint(checkpoint)):
        whole = [path.name for path in list_checkpoints(checkpoint.parent) if not verify_checkpoint(path, hashes=False)]
        others = ", ".join(name for name in whole if name != checkpoint.name)
        hint = f"whole ones in this run: {others}" if others else "the run has no other whole checkpoint"
        raise InputError(f"{checkpoint}: damaged: {'; '.join(problems)}", hint)
    if not (checkpoint / "config.json").is_file():
        inside = ", ".join(path.name for path in list_checkpoints(checkpoint))
        hint = f"name one of its checkpoints: {inside}" if inside else "expected a checkpoint or a Hugging Face folder"
        raise InputError(f"{checkpoint}: not a model: no config.json", hint)
    if not ours and not (checkpoint / CONTRACT).is_file():
        say(f"{checkpoint}: not a checkpoint of anchor train; exported with the default template and instructions")


def _check_target(final: Path, checkpoint: Path, force: bool) -> None:
    if final == checkpoint.absolute() or final in checkpoint.absolute().parents:
        raise InputError(f"--out {final}: the checkpoint itself lies there", "choose another folder")
    if not final.exists():
        return
    if not final.is_dir():
        raise InputError(f"--out {final}: is a file, expected a folder that is not there yet")
    is_export = (final / PARITY).is_file() and (final / CONTRACT).is_file()
    if not is_export and any(final.iterdir()):
        raise InputError(f"--out {final}: exists and is no export, so it is never replaced", "choose another folder")
    if not force:
        raise InputError(f"--out {final}: exists already", "--force replaces it, or choose another folder with --out")


def _check_room(final: Path, checkpoint: Path, growth: float) -> None:
    shards = [path for path in checkpoint.glob("*.safetensors") if not path.name.startswith("optimizer")]
    weights = sum(path.stat().st_size for path in shards)
    needed, free = int(weights * growth) + _ROOM_BYTES, free_bytes(final)
    if free < needed:
        raise RunError(
            f"{final.parent}: the export needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on that disk",
            "make room, or choose another disk with --out",
        )


def _say_state_of_run(checkpoint: Path) -> None:
    """Exporting from a run that goes on is fine: a checkpoint has its name only when whole."""
    run, step = checkpoint.parent, checkpoint_step(checkpoint)
    events = read_json_lines(RunFolder(run).events)
    if step is not None and events and events[-1].get("event") not in ("stop", "end"):
        say(f"{run.name} has not ended: this is its step {step}, later ones may be better")


@contextlib.contextmanager
def _words_for_errors(checkpoint: Path, final: Path) -> Iterator[None]:
    """A checkpoint that went away meanwhile, and what the disk refuses, in one line each."""
    with words_for_disk_errors(final, "exported", "make room or use --out"):
        try:
            yield
        except OSError as error:
            if checkpoint.is_dir() or error.errno == errno.ENOSPC:
                raise
            raise RunError(
                f"{checkpoint}: was removed while it was being exported (save_total_limit of the run?)",
                "export a newer checkpoint",
            ) from error


def _write_weights(checkpoint: Path, folder: Path, contract: TextContract, max_shard_size: str) -> int:
    """Weights, configs and contract. Returns the embedding's dimension."""
    import torch

    from anchor_cli.model.backbone import load_backbone
    from anchor_cli.model.folder import save_model

    model = load_backbone(checkpoint, dtype=getattr(torch, str(contract.dtype)))
    try:
        save_model(folder, model, contract, max_shard_size=max_shard_size)
    except ValueError as error:
        raise InputError(f"--max-shard-size {max_shard_size}: {error}", "such as 5GB or 500MB") from error
    return int(model.config.hidden_size)


def _write_rest(
    checkpoint: Path, folder: Path, final: Path, contract: TextContract, dimension: int, state: dict[str, Any]
) -> None:
    write_tokenizer(checkpoint, folder, contract)
    space = load_tokenizer(checkpoint).encode(" ", add_special_tokens=False).ids
    files.write_library_files(folder, contract, dimension, space[:1])
    if state:
        write_json(folder / "spec.json", state["spec"])
    write_json(folder / "scores.json", files.scores_of(checkpoint, state))
    write_json(folder / "stage_II.json", files.stage_two_config(str(final), contract, state))


def _write_card(
    checkpoint: Path,
    folder: Path,
    name: str,
    contract: TextContract,
    dimension: int,
    state: dict[str, Any],
    parity: dict[str, Any],
) -> None:
    licence = licence_file(state)
    if licence is not None:
        shutil.copyfile(licence, folder / "LICENSE")
    card = model_card(
        name,
        contract,
        dimension=dimension,
        state=state,
        scores=files.scores_of(checkpoint, state),
        counts=files.data_counts(state),
        parity=parity,
        has_licence_file=licence is not None,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
