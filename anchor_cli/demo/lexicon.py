"""The words of the demo world: who keeps what where, and how the two languages say it.

A language is four word lists and its sentence patterns. A pattern names the parts of a fact in braces. The Korean
patterns use particles of one form only (의, 에, 에게), so that a word and what follows it are independent.
"""

from __future__ import annotations

from dataclasses import dataclass

QUESTION_FORMS = 6


@dataclass(frozen=True)
class Lexicon:
    """One language of the world. Every combination drawn from the lists is a possible fact."""

    language: str
    jobs: tuple[str, ...]
    towns: tuple[str, ...]
    materials: tuple[str, ...]
    things: tuple[str, ...]
    document: str  # the sentence that tells the whole fact
    questions: tuple[str, ...]  # QUESTION_FORMS patterns; each names at least three parts of a fact


ENGLISH = Lexicon(
    language="en",
    jobs=tuple("baker barber brewer cook doctor farmer judge miller painter poet sailor tailor".split()),
    towns=tuple("Ashford Brampton Carlisle Dorking Frome Harwich Kendal Ludlow Marlow Oakham Tenby Whitby".split()),
    materials=tuple("brass clay copper glass leather marble paper pewter silk silver stone wooden".split()),
    things=tuple("bell bottle box clock comb cup drum flute kite lamp mirror ring".split()),
    document="The {job} of {town} keeps a {material} {thing}.",
    questions=(
        "What {material} thing does the {job} of {town} keep?",
        "Who in {town} keeps a {material} {thing}?",
        "Where does the {job} with a {material} {thing} live?",
        "Does the {job} of {town} keep a {thing}?",
        "Is the {material} {thing} in {town} with the {job}?",
        "Where in {town} is the {job} with the {thing}?",
    ),
)

KOREAN = Lexicon(
    language="ko",
    jobs=tuple("간호사 교사 기자 농부 목수 사서 선장 시인 약사 어부 의사 화가".split()),
    towns=tuple("강릉 경주 군산 남원 담양 목포 속초 안동 여수 전주 진주 통영".split()),
    materials=tuple("가죽 구리 나무 놋쇠 대나무 도자기 돌 비단 수정 옥 유리 종이".split()),
    things=tuple("거울 그릇 단추 등잔 모자 바구니 반지 벼루 부채 상자 시계 피리".split()),
    # The first word is the same everywhere, so that no part of a fact stands without a space before it: in byte-level
    # BPE a word with and without a space are two tokens.
    document="지금도 {town}의 {job}에게 {material} {thing} 하나가 있다.",
    questions=(
        "{town}의 {job}에게 있는 {material} 물건은 무엇인가요?",
        "{town}의 누구에게 {material} {thing} 하나가 있나요?",
        "{material} {thing} 하나가 있는 {job}의 마을은 어디인가요?",
        "{town}의 {job}에게 {thing} 하나가 있나요?",
        "{town}에 있는 {material} {thing} 하나가 {job}의 것인가요?",
        "{town}에서 {thing} 하나가 있는 {job}의 집은 어디인가요?",
    ),
)

LEXICONS = (KOREAN, ENGLISH)
