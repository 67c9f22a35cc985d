"""Every causal architecture that the installed transformers knows, small and random: ours against the stock model.

python tests/architecture_sweep.py     runs it and writes its table into docs/how-to/another-base-model.md
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from stock_reference import our_results, save_random_model, stock_results
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from anchor_cli.base.errors import InputError
from anchor_cli.model.backbone import CAN_PRUNE, load_backbone
from anchor_cli.model.exactness import shrunk_config
from anchor_cli.model.pooling import prune_last_layer

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "another-base-model.md"
BEGIN, END = "<!-- the sweep's table begins -->\n", "<!-- the sweep's table ends -->\n"
EQUAL = "embedding and loss equal the stock model's"
EMBEDDING_ONLY = "embedding equal; training refuses it: "
REFUSED = "refused: "
NOT_BUILT = "no small model could be built here"
WRONG = "WRONG: "
SECONDS = 120
MOST_PARAMETERS = 60_000_000
TOLERANCE = 1e-4


class TooLong(BaseException):
    """Not an Exception, so that no library takes it for one of its own."""


def _too_long(*_: Any) -> None:
    raise TooLong


def result_of(name: str, folder: Path) -> str:
    """What becomes of one architecture, as a line of the table says it."""
    stock = _build(name, folder)
    if stock is None:
        return NOT_BUILT
    want, want_loss = stock
    try:
        model = load_backbone(folder, dtype=torch.float32, reconstructs=True)
    except InputError as refusal:
        return _embedding_only(folder, refusal, want)
    for pruned in (False, True):
        if pruned and not (getattr(model, CAN_PRUNE) and prune_last_layer(model)):
            break
        got, loss = our_results(model)
        if not (_equal(got, want) and abs(loss - want_loss) <= TOLERANCE * abs(want_loss)):
            where = ", last layer pruned" if pruned else ""
            return f"{WRONG}embedding off by {_distance(got, want):.1e}, loss {loss:.5f} where {want_loss:.5f}{where}"
    return EQUAL


def _embedding_only(folder: Path, refusal: InputError, want: torch.Tensor) -> str:
    reason = re.sub(r" by [\d.]+%", "", refusal.message.partition(") ")[2] or refusal.message)
    reason = reason.removesuffix(", which anchor does not compute").replace("cannot be run without padding: ", "")
    reason = reason.removeprefix("has ")
    try:
        model = load_backbone(folder, dtype=torch.float32)
    except InputError:
        return REFUSED + reason
    got, _ = our_results(model)
    return EMBEDDING_ONLY + reason if _equal(got, want) else f"{WRONG}embedding off by {_distance(got, want):.1e}"


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def _equal(got: torch.Tensor, want: torch.Tensor) -> bool:
    return _distance(got, want) <= TOLERANCE


def _build(name: str, folder: Path) -> tuple[torch.Tensor, float] | None:
    """A small model, saved, and what the stock forward pass makes of it as transformers itself reads it back."""
    for narrow in (True, False):
        try:
            config = shrunk_config(AutoConfig.for_model(name), narrow=narrow)
            with torch.device("meta"):
                sizes = AutoModelForCausalLM.from_config(shrunk_config(config, narrow=narrow))
            if sum(parameter.numel() for parameter in sizes.parameters()) > MOST_PARAMETERS:
                continue
            return stock_results(save_random_model(folder, config))
        except Exception:
            continue
    return None


def sweep(names: Iterable[str]) -> dict[str, str]:
    """{architecture: result}; one that takes too long counts as not built."""
    logging.set_verbosity(logging.CRITICAL)
    before = signal.signal(signal.SIGALRM, _too_long)
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            signal.alarm(SECONDS)
            try:
                results[name] = result_of(name, Path(folder))
            except TooLong:
                results[name] = NOT_BUILT
            except Exception as error:  # neither equal nor refused in words
                results[name] = f"{WRONG}{type(error).__name__}: {error}"
            finally:
                signal.alarm(0)
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGALRM, before)
    return results


def table(results: dict[str, str]) -> str:
    """Markdown: a line per result, its architectures in order."""
    order = sorted(set(results.values()), key=lambda line: (line == NOT_BUILT, line != EQUAL, line))
    rows = [f"| {line} | {', '.join(sorted(n for n in results if results[n] == line))} |" for line in order]
    return "\n".join(["| result | architectures (`model_type`) |", "|---|---|", *rows, ""])


def architectures() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def main() -> None:
    torch.set_num_threads(1)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(sweep(sys.argv[1:] or architectures())) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
