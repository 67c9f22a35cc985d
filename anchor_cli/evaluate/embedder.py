"""Texts to embeddings for retrieval: our packed encoder, alone or shared over ranks; foreign models by their library.

Legend: N texts, D embedding size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from anchor_cli.base.contract import FILE_NAME, TextContract, read_contract
from anchor_cli.base.errors import InputError
from anchor_cli.data.text import TextEncoder, contract_with, eos_of, load_tokenizer, tokenizer_fingerprint
from anchor_cli.data.tokenizer_fit import require_ids_within
from anchor_cli.evaluate.search import device_of
from anchor_cli.model.attention import choose_kernel
from anchor_cli.model.backbone import load_backbone
from anchor_cli.model.folder import read_config
from anchor_cli.model.fusing import prune
from anchor_cli.model.packed import pack_texts
from anchor_cli.model.reconstruction import ReconstructionModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Embeddings = npt.NDArray[np.float32]


class Embedder(Protocol):
    """What evaluation needs of a model: (N, D) float32 embeddings, not normalised, in the order of the texts."""

    name: str
    dimension: int

    def encode_queries(self, texts: Sequence[str], language: str) -> Embeddings: ...

    def encode_training_queries(self, texts: Sequence[str], prefix: str, language: str) -> Embeddings:
        """Queries of training rows, with what stands before their texts in training; other tools have their own."""
        ...

    def encode_documents(self, texts: Sequence[str], language: str) -> Embeddings: ...


class PackedEmbedder:
    """Encodes with our model: texts sorted by length, packed by token budget, no padding.

    With `group` the texts are shared out over all ranks (longest first, dealt round), every rank runs the same number
    of batches (ZeRO-3 needs that) and every rank gets all embeddings. `between` is called before each batch.

    `inference_mode` is for a model that is not trained in this process: it saves an eighth of the time of a single
    short text (measured), but what the model keeps or gathers meanwhile are tensors that autograd refuses.
    """

    def __init__(
        self,
        model: Callable[..., torch.Tensor],
        tokenizer: Tokenizer,
        contract: TextContract,
        *,
        name: str,
        dimension: int,
        device: torch.device,
        batch_tokens: int = 16384,
        batch_texts: int | None = None,
        group: dist.ProcessGroup | None = None,
        between: Callable[[], None] = lambda: None,
        inference_mode: bool = False,
    ) -> None:
        self.name = name
        self.dimension = dimension
        self._encode_packed = model
        self._contract = contract
        self._texts = TextEncoder(tokenizer, contract.text_template, contract.max_seq_length)
        self._device = device
        self._batch_tokens = batch_tokens
        self._batch_texts = batch_texts
        self._group = group
        self._between = between
        self._without_gradients = torch.inference_mode if inference_mode else torch.no_grad

    def encode_queries(self, texts: Sequence[str], language: str) -> Embeddings:
        """Query embeddings with the instruction of `language`. Raises InputError: none for it."""
        known = self._contract.instructions
        instruction = known.get(language, known.get("*"))
        if instruction is None:
            raise InputError(
                f"no query instruction for language {language!r}; known: {', '.join(sorted(known))}",
                hint="name the benchmark's language, e.g. --data ko:DIR",
            )
        return self.encode(texts, instruction)

    def encode_training_queries(self, texts: Sequence[str], prefix: str, language: str) -> Embeddings:
        return self.encode(texts, prefix or None)

    def encode_documents(self, texts: Sequence[str], language: str) -> Embeddings:
        """Document embeddings: no instruction in any language."""
        return self.encode(texts, None)

    def encode(self, texts: Sequence[str], instruction: str | None) -> Embeddings:
        """(N, D) embeddings of texts that share an instruction; the same on every rank."""
        world, rank = (dist.get_world_size(self._group), dist.get_rank(self._group)) if self._group else (1, 0)
        order = np.argsort([-len(text) for text in texts], kind="stable")
        mine = order[rank::world]
        vectors = torch.zeros(len(mine), self.dimension)
        encoded = self._texts.encode_batch([texts[i] for i in mine], instruction)
        batches = self._batches([len(text.ids) for text in encoded])
        rounds = torch.tensor([len(batches)])
        if self._group:
            dist.all_reduce(rounds, op=dist.ReduceOp.MAX, group=self._group)
        for index in range(int(rounds.item())):
            self._between()
            batch = batches[index] if index < len(batches) else np.array([], dtype=np.int64)
            chosen = [encoded[i] for i in batch] or encoded[:1] or self._texts.encode_batch(["a"], None)
            packed = pack_texts([text.ids for text in chosen]).to(self._device)
            starts = torch.tensor([text.content_start for text in chosen], device=self._device)
            with self._without_gradients():
                out = self._encode_packed(packed, starts)
            vectors[batch] = out[: len(batch)].float().cpu()
        if self._group:
            vectors = self._gather(vectors, len(texts), world)
        result = np.empty((len(texts), self.dimension), dtype=np.float32)
        result[np.concatenate([order[r::world] for r in range(world)])] = vectors.numpy()
        return result

    def _gather(self, vectors: torch.Tensor, num_texts: int, world: int) -> torch.Tensor:
        counts = [len(range(r, num_texts, world)) for r in range(world)]
        padded = torch.zeros(max(counts), self.dimension)
        padded[: len(vectors)] = vectors
        everyone = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(everyone, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(everyone, counts)])

    def _batches(self, lengths: Sequence[int]) -> list[npt.NDArray[np.int64]]:
        """Indices in order of falling length, cut so that a batch holds at most the token budget (or one text)."""
        order = np.argsort([-length for length in lengths], kind="stable")
        batches: list[npt.NDArray[np.int64]] = []
        start, tokens = 0, 0
        for place, index in enumerate(order):
            too_many = self._batch_texts is not None and place - start >= self._batch_texts
            if place > start and (tokens + lengths[index] > self._batch_tokens or too_many):
                batches.append(order[start:place])
                start, tokens = place, 0
            tokens += lengths[index]
        if start < len(order):
            batches.append(order[start:])
        return batches


class LibraryEmbedder:
    """A folder of another tool: sentence-transformers does the encoding, with the model's own prompts and pooling."""

    def __init__(self, path: str, batch_size: int = 32, device: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(
                f"{path}: is a sentence-transformers model, and the library is not installed",
                hint="pip install sentence-transformers",
            ) from error
        self._model = SentenceTransformer(path, device=device)
        self._batch_size = batch_size
        self.name = path
        self.dimension = int(self._model.get_embedding_dimension() or 0)

    def encode_queries(self, texts: Sequence[str], language: str) -> Embeddings:
        prompt = f"query_{language}"
        name = prompt if prompt in self._model.prompts else None
        return self._as_float32(self._model.encode_query(list(texts), batch_size=self._batch_size, prompt_name=name))

    def encode_training_queries(self, texts: Sequence[str], prefix: str, language: str) -> Embeddings:
        return self.encode_queries(texts, language)

    def encode_documents(self, texts: Sequence[str], language: str) -> Embeddings:
        return self._as_float32(self._model.encode_document(list(texts), batch_size=self._batch_size))

    @staticmethod
    def _as_float32(vectors: Any) -> Embeddings:
        return np.asarray(vectors, dtype=np.float32)


def contract_of(folder: str | Path, tokenizer: Tokenizer) -> TextContract:
    """The text contract of a model: its `anchor.json`, checked against its tokenizer, else the paper's defaults.

    Of a checkpoint of the research code the length is that of its `llm2vec_config.json`.

    Raises:
        InputError: the tokenizer beside `anchor.json` is not the one the model was trained with; a pooling of LLM2Vec's
            that is not [EOS]'s state.
    """
    if (Path(folder) / FILE_NAME).is_file():
        contract = read_contract(folder)
        if contract.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
            raise InputError(
                f"{folder}: its tokenizer is not the one the model was trained with",
                hint="put back the tokenizer.json that belongs to this checkpoint",
            )
        if eos_of(tokenizer, contract.text_template) != (contract.eos_token, contract.eos_token_id):
            raise InputError(
                f"{Path(folder) / FILE_NAME}: [EOS] {contract.eos_token!r} with id {contract.eos_token_id} is not what "
                f"closes its text_template",
                hint="put back the anchor.json that belongs to this checkpoint",
            )
        _require_config_of(Path(folder), contract)
        return contract
    return contract_with(tokenizer, **_length_of_llm2vec(Path(folder) / "llm2vec_config.json"))


def _length_of_llm2vec(path: Path) -> dict[str, Any]:
    """`max_seq_length` of a folder that LLM2Vec's code wrote. It pools [EOS] under the name of `last_token`, too."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        mode, length = config.get("pooling_mode", "eos_token"), config.get("max_length")
    except (ValueError, AttributeError):
        raise InputError(f"{path}: not a JSON object") from None
    if mode not in ("eos_token", "last_token"):
        says = f"{path}: pooling_mode {mode} of LLM2Vec, which is over other tokens (and its models attend both ways)"
        raise InputError(says, "anchor takes models whose embedding is [EOS]'s state")
    return {"max_seq_length": length} if isinstance(length, int) and length >= 5 else {}


def _require_config_of(folder: Path, contract: TextContract) -> None:
    """Refuse a config.json that says otherwise than the contract of attention or of the weights' number format."""
    if not (folder / "config.json").is_file():
        return
    config = read_config(folder)
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise InputError(
            f"{folder / 'config.json'}: attention in both directions; the model was trained with {contract.attention}",
            hint="put back the config.json that belongs to this checkpoint",
        )
    stored = config.get("dtype") or config.get("torch_dtype")
    if contract.dtype is not None and stored != contract.dtype:
        raise InputError(
            f"{folder / 'config.json'}: dtype {stored}, and {FILE_NAME} says {contract.dtype}",
            hint="the files of two checkpoints are mixed here; copy one of them whole",
        )


def load_embedder(
    path: str | Path,
    *,
    batch_tokens: int = 16384,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str = "auto",
    prepared: TextContract | None = None,
) -> Embedder:
    """A checkpoint, export or plain Hugging Face folder with our encoder; a sentence-transformers one with its own.

    `dtype` `auto`: bfloat16 on CUDA, float32 elsewhere. `prepared`: our encoder takes the template and the length of
    these prepared pairs in place of the model's.

    Raises:
        InputError: nothing there that can be loaded.
    """
    folder = Path(path)
    if folder.is_dir() and (folder / "modules.json").is_file() and not (folder / FILE_NAME).is_file():
        return LibraryEmbedder(str(path), device=device)
    place = torch.device(device_of(device))
    number = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if place.type == "cuda" else torch.float32
    tokenizer = load_tokenizer(path)
    contract = contract_of(path, tokenizer)
    if prepared is not None:
        of_texts = {"text_template": prepared.text_template, "max_seq_length": prepared.max_seq_length}
        contract = contract.model_copy(update=of_texts)
    language_model = load_backbone(path, dtype=number, max_seq_length=contract.max_seq_length)
    embedding: Any = language_model.get_input_embeddings()
    require_ids_within(tokenizer, embedding.weight.shape[0], path)
    kernel = choose_kernel(attn_implementation, place, number)
    prune(language_model, place)
    model = ReconstructionModel(language_model, kernel=kernel, pooling_mode=contract.pooling_mode).to(place).eval()
    return PackedEmbedder(
        model.encode,
        tokenizer,
        contract,
        name=str(path),
        dimension=int(language_model.config.hidden_size),
        device=place,
        batch_tokens=batch_tokens,
        inference_mode=True,
    )
