"""The texts an export is certified on: both languages, short and long, truncated, empty-ish, odd Unicode."""

from __future__ import annotations

from dataclasses import dataclass

from anchor_cli.base.contract import TextContract
from anchor_cli.data.text import TextEncoder
from anchor_cli.export.files import prompts

ODD = (
    "a",
    "수",
    "12 34",
    "  leading and trailing blanks \t\n",
    "\u3000이상한 공백\xa0\u2003\x1c",
    "두 줄\r\n\r\n  들여쓴 줄\n",
    "한국어".encode().decode() + " \u1112\u1161\u11ab\u1100\u1173\u11af e\u0301 o\u0308",  # decomposed: NFC joins it
    "👩‍👩‍👧‍👦 🇰🇷 ❤️ 👍🏽",
    "\u200bzero\u200dwidth\ufeff",
    "ｆｕｌｌ ｗｉｄｔｈ ①②③ ㎏ ﬁ",
    "مرحبا بالعالم — שלום",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠮷野家 漢字 ひらがな",
    "a\u0301\u0302\u0303\u0304\u0305 z\u0351\u036b\u0343",
    "tab\tand\x00nul\x07bell",
    "!@#$%^&*() separator !@#$%^&*() twice",
    "before <|im_start|> and <|im_end|> after",
    "<think>\n\n</think> <tool_call> {text}",
    "https://example.com/a?b=c&d=%EA%B0%80#f",
)
EMPTY = ("", " ", "\n\t\u3000")
SENTENCES = {
    "ko": (
        "수달은 어디에 사나요?",
        "서소문본관 합동소방훈련 중 전시동 광장에서는 무슨 훈련을 진행했어",
        "복지 급여는 주민센터에서 신청할 수 있으며, 신청 후 30일 안에 결과를 알려 준다.",
    ),
    "en": (
        "Where do otters live?",
        "what's the difference between a query and a document",
        "You can apply for the benefit at the community centre; the answer comes within 30 days.",
    ),
}


@dataclass(frozen=True)
class Group:
    """Texts that share a prompt."""

    prompt_name: str
    """Name in `config_sentence_transformers.json`."""
    prompt: str
    """What the other tools put before the text."""
    instruction: str | None
    """What ours is given; None: documents."""
    texts: list[str]


def groups(contract: TextContract, encoder: TextEncoder) -> list[Group]:
    """The fixed texts as documents, and as queries of every language of the contract.

    Long ones, which cost most, are documents of all languages and queries of their own language only.
    """
    named = prompts(contract)
    kinds: list[tuple[str, str | None]] = [("document", None)]
    kinds += [(f"query_{language}", text or None) for language, text in contract.named_instructions.items()]
    groups_of_texts = []
    for name, instruction in kinds:
        texts = [text for sentences in SENTENCES.values() for text in sentences] + list(ODD)
        if contract.pooling_mode in ("eos_token", "last_token"):  # the others have nothing to pool in an empty text
            texts += EMPTY
        language = name.removeprefix("query_")
        own = [language if language in SENTENCES else next(iter(SENTENCES))]
        for long in SENTENCES if instruction is None else own:
            texts += around_the_limit(encoder, instruction, SENTENCES[long][-1])
        groups_of_texts.append(Group(name, named[name], instruction, texts))
    return groups_of_texts


def around_the_limit(encoder: TextEncoder, instruction: str | None, sentence: str) -> list[str]:
    """Texts of one token less than fits, of just what fits, of one and of many more; fewer where steps are larger."""
    limit = encoder.max_seq_length
    words, lengths = sentence.split(), dict[int, str]()
    text = words[0]
    for index in range(1, 4 * limit):
        (tokenised,) = encoder.encode_batch([text], instruction)
        lengths.setdefault(tokenised.num_tokens, text)
        if tokenised.num_tokens > limit + 8:
            break
        near = tokenised.num_tokens > limit - 12
        text += " a" if near else f" {words[index % len(words)]}"
    wanted = [lengths[num] for num in (limit - 1, limit, limit + 1) if num in lengths]
    return [*wanted, f"{text} {sentence}" * 2]
