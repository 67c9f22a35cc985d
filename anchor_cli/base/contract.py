"""The text contract: what was promised about a text's way into the model, carried from data to checkpoint to export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from anchor_cli.base.errors import InputError
from anchor_cli.base.files import write_json

FILE_NAME = "anchor.json"
TEXT_TEMPLATE = "<|im_start|>user\n{text}<|im_end|>"
INSTRUCTION_KO = "주어진 질문에 대해 관련 문서를 검색하세요"
INSTRUCTION_EN = "Retrieve relevant documents for the given query"
NO_OTHERS = "*="
"""`--instruction` that leaves languages without an instruction of their own without any: their rows are rejected."""
PoolingMode = Literal["eos_token", "mean", "weighted_mean", "last_token"]


class TextContract(BaseModel):
    """Everything that decides which token ids a text becomes and which of its states is the embedding."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    text_template: str = TEXT_TEMPLATE
    """Text around `{text}`; what follows `{text}` is the closing special token, [EOS], and nothing else."""
    instructions: dict[str, str] = {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN}
    """Instruction of a query by language, used by evaluation and export."""
    training_instructions: dict[str, str] = {"*": INSTRUCTION_KO}
    """Instruction of a training row by its language; `*` is every language not named."""
    max_seq_length: int = 512
    """Longest text in tokens, template and [EOS] included; over-long content loses tokens at its end."""
    pooling_mode: PoolingMode = "eos_token"
    """State that is the embedding; the modes other than `eos_token` pool content tokens only."""
    eos_token: str = "<|im_end|>"
    """The closing special token, [EOS]."""
    eos_token_id: int = 151645
    """Its id."""
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer's canonical JSON without truncation, padding and post-processor."""
    attention: Literal["causal"] = "causal"
    """A token sees those before it in its own text, and no other."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the weights beside this file; None where there are none, as in prepared data."""

    @property
    def named_instructions(self) -> dict[str, str]:
        """`instructions` by the languages' names; Korean and English have that of `*` where they are not named."""
        anyone = self.instructions.get("*")
        filled = {} if anyone is None else {"ko": anyone, "en": anyone}
        return filled | {language: text for language, text in self.instructions.items() if language != "*"}

    @field_validator("text_template")
    @classmethod
    def _has_one_text(cls, template: str) -> str:
        return check_template(template)


def query_prefix(instruction: str | None) -> str:
    """What an instruction puts before a query: `{instruction}; `, or itself alone where it ends in white space."""
    if not instruction or instruction[-1].isspace():
        return instruction or ""
    return f"{instruction}; "


def with_line_breaks(text: str) -> str:
    r"""`\n` and `\t` as a shell leaves them inside single quotes, as the characters they mean."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def on_one_line(text: str) -> str:
    """A text to type in a shell: what `with_line_breaks` reads."""
    return text.replace("\n", "\\n").replace("\t", "\\t")


def check_template(template: str) -> str:
    """The template itself.

    Raises:
        ValueError: it does not hold `{text}` exactly once, or nothing follows it.
    """
    if template.count("{text}") != 1:
        raise ValueError("a template with {text} in it exactly once")
    if template.endswith("{text}"):
        raise ValueError("a template that ends in a special token right after {text}")
    return template


def write_contract(folder: str | Path, contract: TextContract) -> None:
    """Write `anchor.json` into `folder`."""
    write_json(Path(folder) / FILE_NAME, contract.model_dump())


def write_llm2vec_config(folder: str | Path, contract: TextContract) -> None:
    """Write `llm2vec_config.json` into `folder`: the contract as LLM2Vec-style code reads it."""
    write_json(
        Path(folder) / "llm2vec_config.json",
        {
            "pooling_mode": contract.pooling_mode,
            "max_length": contract.max_seq_length,
            "doc_max_length": contract.max_seq_length,
            "skip_instruction": contract.pooling_mode != "eos_token",
        },
    )


def read_contract(folder: str | Path) -> TextContract:
    """The contract of a prepared data set, checkpoint or export.

    Raises:
        InputError: `folder` has no `anchor.json`, or it is not one.
    """
    path = Path(folder) / FILE_NAME
    try:
        return TextContract.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found", f"is {folder} made by anchor prepare, train or export?") from None
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {key + ': ' if key else ''}{first['msg']}") from None


def differences(a: TextContract, b: TextContract) -> list[str]:
    """What `a` and `b` disagree on, one `key: a's value != b's value` a line; empty when they agree."""
    ours, theirs = a.model_dump(), b.model_dump()
    return [f"{key}: {ours[key]!r} != {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
