"""A tokenizer of some thousand tokens in the form of Qwen's: byte-level BPE, each word of a list is one token.

Any text can be tokenised (unknown words fall apart into bytes), and the special tokens are the ones of the training
template. The pre-tokenizer is Qwen2's own, word for word, because transformers 5 rebuilds it from code when a folder's
model type is qwen3 (transformers/models/qwen2/tokenization_qwen2.py) and both ways of loading must agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX (Apache-2.0)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MAX_VOCABULARY = 1 << 16


def train_small_tokenizer(words: Iterable[str], texts: Iterable[str] = ()) -> Tokenizer:
    """Train a tokenizer that makes one token of each word, with and without a space before it.

    Words are learned alone, never in a sentence, so no token spans a word and the particle after it.

    Args:
        words: the vocabulary; punctuation at a word's end becomes a token of its own.
        texts: more text whose words become tokens, such as instructions.

    Returns:
        A tokenizer with ids from 0, special tokens first; about 4 tokens are made for each word.
    """
    words = [*words, *(word for text in texts for word in text.split())]
    # Syllables first: their merges come before every longer one, so a word's tokens do not depend on its neighbour.
    syllables = sorted({letter for word in words for letter in word if not letter.isascii()})
    corpus = [*syllables * (2 * len(words)), *words, *(f" {word}" for word in words), "\n"]
    return _train(corpus, _MAX_VOCABULARY)


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens on running text: Qwen's kind of tokenizer, small."""
    return _train(texts, vocab_size)


def _train(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def write_small_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and a `tokenizer_config.json` that transformers and sentence-transformers load."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 1 << 17,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
