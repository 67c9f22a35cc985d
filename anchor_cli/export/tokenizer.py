"""The tokenizer of an export: what every other tool makes of `prompt + text` is what anchor makes of it.

Our rule (docs/method.md) strips the text, puts it into the template and tokenises the whole string once. Other tools
tokenise `prompt + text` and know nothing of stripping or of what closes the text. So an export's `tokenizer.json` does:

* a normaliser, before the tokenizer's own, strips white space as Python's `str.strip` does (behind the template's head
  and at the end) and takes off an [EOS] the text already ends in, so that tools which write the template themselves
  (LLM2Vec and its forks) do not close it twice;
* a post-processor appends [EOS], which truncation therefore keeps;
* special tokens are found in the normalised string. Found before it, as usual, they would cut the string into pieces,
  and a normaliser cannot tell the end of a piece from the end of the text.

The untouched tokenizer lies in `base_tokenizer/`: anchor itself and GGUF converters use it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from anchor_cli.base.contract import TextContract
from anchor_cli.base.files import write_json
from anchor_cli.data.text import BASE_TOKENIZER, tokenizer_folder

WHITE_SPACE = "".join(chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace())
"""What `str.strip` removes: 29 characters, as literals, because regex engines disagree on `\\s`."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_tokenizer(source: Path, folder: Path, contract: TextContract) -> None:
    """A tokenizer that closes, strips and truncates by itself, and the untouched one in `base_tokenizer/`."""
    base = tokenizer_folder(source)
    (folder / BASE_TOKENIZER).mkdir()
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / BASE_TOKENIZER / name)
    original = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    exported = json.loads(Tokenizer.from_str(json.dumps(closing_tokenizer(original, contract))).to_str())
    exported["model"] = with_joined_merges(exported["model"])
    write_json(folder / "tokenizer.json", exported)
    config_file = base / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    write_json(folder / "tokenizer_config.json", tokenizer_config(config, original, contract))


def closes_texts(contract: TextContract) -> bool:
    """Whether the exported tokenizer appends [EOS]: in `eos_token` mode, where its state is the embedding.

    The other modes pool content tokens, to which a causal model's [EOS] adds nothing.
    """
    return contract.pooling_mode == "eos_token"


def longest_text(contract: TextContract) -> int:
    """Tokens that other tools may keep: `max_seq_length`, less the [EOS] that is not appended."""
    return contract.max_seq_length - (0 if closes_texts(contract) else 1)


def closing_tokenizer(original: dict[str, Any], contract: TextContract) -> dict[str, Any]:
    """`tokenizer.json` as an export has it, from the original one."""
    steps = [_replace(pattern, content) for pattern, content in _strip_rules(contract)]
    own = original.get("normalizer")
    own_steps = own["normalizers"] if own and own["type"] == "Sequence" else [own] if own else []
    exported = dict(original)
    exported["normalizer"] = {"type": "Sequence", "normalizers": steps + own_steps}
    exported["added_tokens"] = [token | {"normalized": True} for token in original["added_tokens"]]
    exported["post_processor"] = _closing_processor(original.get("post_processor"), contract)
    exported["truncation"] = {
        "direction": "Right",
        "max_length": longest_text(contract),
        "strategy": "LongestFirst",
        "stride": 0,
    }
    exported["padding"] = None
    return exported


def with_joined_merges(model: dict[str, Any]) -> dict[str, Any]:
    """Merges as `"a b"`, which every version of tokenizers reads; `["a", "b"]` is refused by those before 0.20.

    Left as they are where a token holds a blank: such a merge has no joined form.
    """
    merges = model.get("merges")
    if not merges or any(" " in token for pair in merges for token in pair):
        return model
    return model | {"merges": [" ".join(pair) for pair in merges]}


def _strip_rules(contract: TextContract) -> list[tuple[str, str]]:
    """(regex, replacement), in their order; `\\A` and `\\z` are the ends of the whole string."""
    head = contract.text_template.split("{text}")[0]
    bare_head = head.rstrip()
    space = f"[{WHITE_SPACE}]+"
    rules = [
        # Not a string that is [EOS] alone: the tokenizer looks for special tokens by their normalised form.
        (rf"(?<=.|\n){re.escape(contract.eos_token)}\z", ""),
        (rf"{space}\z", ""),
    ]
    if bare_head != head:  # the rule above took off the end of a template without text
        rules.append((rf"\A{re.escape(bare_head)}\z", head))
    rules.append((rf"\A{re.escape(head)}{space}", head))
    return rules


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _closing_processor(original: dict[str, Any] | None, contract: TextContract) -> dict[str, Any] | None:
    """The original's offsets (ByteLevel), none of the tokens it adds (templates are whole), and [EOS] at the end."""
    own = original["processors"] if original and original["type"] == "Sequence" else [original] if original else []
    kept = [step for step in own if step["type"] == "ByteLevel"]
    if closes_texts(contract):
        eos = {"SpecialToken": {"id": contract.eos_token, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        ids = {"id": contract.eos_token, "ids": [contract.eos_token_id], "tokens": [contract.eos_token]}
        template = {
            "type": "TemplateProcessing",
            "single": [first, eos],
            "pair": [first, second, eos],
            "special_tokens": {contract.eos_token: ids},
        }
        kept.append(template)
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else {"type": "Sequence", "processors": kept}


def tokenizer_config(original: dict[str, Any], tokenizer: dict[str, Any], contract: TextContract) -> dict[str, Any]:
    """`tokenizer_config.json` of the export: the generic class, because model-specific ones rebuild their normaliser.

    No chat template: sentence-transformers from 6.0 on would put every text through it. It stays in `base_tokenizer/`.
    No `add_bos_token`/`add_eos_token`: transformers 5 would make its own post-processor of them.
    """
    known = {token["content"]: token for token in tokenizer["added_tokens"]}

    def special(token: str) -> dict[str, Any]:  # as text it would be added anew with normalized=False
        flags = {name: known[token][name] for name in ("lstrip", "rstrip", "single_word", "special")}
        return {"__type": "AddedToken", "content": token, "normalized": True} | flags

    pad = _content(original.get("pad_token"))
    unknown = _content(original.get("unk_token")) or ""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special(contract.eos_token),
        "pad_token": special(pad if pad and pad in known else contract.eos_token),
        "model_max_length": longest_text(contract),
        "padding_side": "left",
        "truncation_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if unknown in known:
        config["unk_token"] = special(unknown)
    return config


def _content(token: Any) -> str | None:
    """A special token of a tokenizer_config.json, which writes it as text or as an object."""
    return str(token["content"]) if isinstance(token, dict) else token
