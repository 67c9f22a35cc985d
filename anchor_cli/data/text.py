"""Texts become token ids: the record form, the template, the tokenizer, truncation and the content mask.

One text is `{instruction}; {content}` (or `{content}`), stripped, put into the template and tokenised *once, whole*, so
BPE merges cross the boundary between instruction and content. Content tokens are those whose character offsets overlap
the content. Normalisation is the tokenizer's own; Qwen3's is Unicode NFC, so ids decode to the NFC form of the text.

Shapes: n tokens of one text, [EOS] included.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from anchor_cli.base.contract import TEXT_TEMPLATE, TextContract, check_template, query_prefix
from anchor_cli.base.errors import InputError, first_line
from anchor_cli.base.hub import go_offline_if_the_hub_is_silent, has_hub_form

SEPARATOR = "!@#$%^&*()"
"""Marks in a training record of LLM2Vec's form where content begins; it never reaches the tokenizer."""

BASE_TOKENIZER = "base_tokenizer"
"""Folder of an export with the tokenizer as it was in training; the export's own one closes texts for other tools."""

Int32Array = npt.NDArray[np.int32]


def split_record(text: str) -> tuple[str, str] | None:
    """(head, content) of a training record `{instruction}; !@#$%^&*(){content}` or `!@#$%^&*(){content}`; else None.

    The head is `{instruction}; `, or empty. Split is at the *first* separator, later ones are text; and so is one after
    anything that does not end in "; ".
    """
    head, separator, content = text.partition(SEPARATOR)
    return (head, content) if separator and (not head or head.endswith("; ")) else None


def content_of(text: str) -> str:
    """The content of a training record, or the text itself."""
    record = split_record(text)
    return text if record is None else record[1]


def canonical(text: str) -> str:
    """NFC, outer white space gone, every run of white space one space: what is left equal is the same text."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model folder lies: `base_tokenizer/` of an export, else the folder itself."""
    base = folder / BASE_TOKENIZER
    return base if (base / "tokenizer.json").is_file() else folder


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a folder, a `tokenizer.json` file or a Hub id, without truncation, padding, post-processor.

    Raises:
        InputError: there is none, or the file is not a tokenizer.
    """
    path = Path(model)
    if path.is_dir():
        path = tokenizer_folder(path) / "tokenizer.json"
        if not path.is_file():
            remedy = "transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…) writes one"
            raise InputError(f"{path}: not found", remedy)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else _from_hub(str(model))
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{path}: not a tokenizer: {first_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    return tokenizer


def _from_hub(model: str) -> Tokenizer:
    if not has_hub_form(model):
        remedy = "a model is a folder, a tokenizer.json or a Hub id such as Qwen/Qwen3-0.6B"
        raise InputError(f"{model}: not found", remedy)
    go_offline_if_the_hub_is_silent()
    from huggingface_hub import hf_hub_download

    try:
        return Tokenizer.from_file(hf_hub_download(model, "tokenizer.json"))
    except Exception as error:  # no network, no such model, no access: all the same to the user
        reason = first_line(error)
        raise InputError(
            f"{model}: no such folder, and not to be had from the Hub: {reason}",
            "give a folder that holds tokenizer.json, or check the network and HF_TOKEN",
        ) from None


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's canonical JSON without what does not change the ids we make of a text.

    Truncation, padding and post-processor are left out because they are never used; the decoder because it only
    works the other way round. `trim_offsets` of a byte-level pre-tokenizer is read by post-processors alone, and an
    absent prefix or suffix of BPE is the empty one: transformers writes both otherwise than Qwen's own file has them.
    """
    content = json.loads(tokenizer.to_str())
    for unused in ("truncation", "padding", "post_processor", "decoder", "version"):
        content.pop(unused, None)
    before = content.get("pre_tokenizer") or {}
    for step in before.get("pretokenizers", [before]):
        step.pop("trim_offsets", None)
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if content["model"].get(affix, "") is None:
            content["model"][affix] = ""
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def eos_of(tokenizer: Tokenizer, text_template: str) -> tuple[str, int]:
    """([EOS] string, its id): the one special token that closes the template right after `{text}`.

    Raises:
        InputError: the template is not `…{text}` and one special token of this tokenizer.
    """
    try:
        closing = check_template(text_template).split("{text}")[1]
    except ValueError as error:
        raise InputError(f"text_template {text_template!r}: {error}") from None
    special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if closing not in special:
        known = ", ".join(sorted(special)[:8]) or "none"
        raise InputError(
            f"text_template {text_template!r}: {closing!r} after {{text}} is not one special token of the tokenizer",
            f"special tokens here: {known}",
        )
    return closing, special[closing]


def contract_with(tokenizer: Tokenizer, *, text_template: str = TEXT_TEMPLATE, **values: Any) -> TextContract:
    """The contract of texts that `tokenizer` tokenises: its [EOS] and fingerprint, and `values` for the other keys.

    Raises:
        InputError: the template does not end in one special token of this tokenizer.
    """
    eos_token, eos_token_id = eos_of(tokenizer, text_template)
    return TextContract(
        text_template=text_template,
        eos_token=eos_token,
        eos_token_id=eos_token_id,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        **values,
    )


@dataclass(frozen=True)
class TokenisedText:
    """One text as the model sees it."""

    ids: Int32Array
    """(n,), the last one is [EOS]."""
    content_start: int
    """Content tokens are `ids[content_start : n - 1]`."""
    num_tokens: int
    """Tokens before truncation, [EOS] included."""


class TextEncoder:
    """Contents in, token ids with their content mask out. See the module's docstring for the rules."""

    def __init__(self, tokenizer: Tokenizer, text_template: str, max_seq_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.eos_token, self.eos_token_id = eos_of(tokenizer, text_template)
        self._prefix = text_template.split("{text}")[0]

    def encode_batch(self, contents: Sequence[str], instruction: str | None) -> list[TokenisedText]:
        """Tokenise contents that share an instruction.

        Raises:
            InputError: template and instruction leave no room for content in `max_seq_length` tokens.
        """
        texts = self.try_encode_batch(contents, instruction)
        for content, text in zip(contents, texts, strict=True):
            if text is None:
                raise InputError(
                    f"no room for content: template and instruction {instruction!r} fill the "
                    f"{self.max_seq_length} tokens of max_seq_length (text {content[:40]!r})",
                    "raise max_seq_length or shorten the instruction",
                )
        return [text for text in texts if text is not None]

    def try_encode_batch(self, contents: Sequence[str], instruction: str | None) -> list[TokenisedText | None]:
        """As `encode_batch`, with None where there is no room for any content."""
        head = query_prefix(instruction)
        texts = [head + content for content in contents]
        stripped = [text.strip() for text in texts]
        templated = [f"{self._prefix}{text}{self.eos_token}" for text in stripped]
        encodings = self.tokenizer.encode_batch(templated, add_special_tokens=False)
        tokenised: list[TokenisedText | None] = []
        for text, short, encoding in zip(texts, stripped, encodings, strict=True):
            num_stripped_left = len(text) - len(text.lstrip()) if text[:1].isspace() else 0
            begin = max(len(head) - num_stripped_left, 0)  # of the content, in the stripped text
            tokenised.append(self._tokenised(encoding, len(self._prefix) + begin, len(self._prefix) + len(short)))
        return tokenised

    def _tokenised(self, encoding: Encoding, begin: int, end: int) -> TokenisedText | None:
        ids = np.array(encoding.ids, dtype=np.int32)  # (num_tokens,)
        if not len(ids) or ids[-1] != self.eos_token_id:
            raise InputError(f"the tokenizer does not end a text in {self.eos_token!r}", "text_template must end in it")
        num_tokens = len(ids)
        content_start = _first_content_token(encoding, begin, end) if begin < end else num_tokens - 1
        if num_tokens > self.max_seq_length:
            ids = np.append(ids[: self.max_seq_length - 1], np.int32(self.eos_token_id))
        if content_start > len(ids) - 1 or (content_start == len(ids) - 1 and num_tokens > len(ids)):
            return None
        return TokenisedText(ids, content_start, num_tokens)


def _first_content_token(encoding: Encoding, begin: int, end: int) -> int:
    """Index of the first token that overlaps characters begin..end; all later ones but [EOS] do too."""
    token = encoding.char_to_token(begin)
    if token is not None:
        return int(token)
    for index, (left, right) in enumerate(encoding.offsets):  # a normaliser dropped that very character
        if right > begin and left < end and right > left:
            return index
    return len(encoding.ids) - 1  # nothing of the content was left
