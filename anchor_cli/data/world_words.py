"""The words of the demo world: who lives where, what they keep, and how the two languages say it.

A language is a set of word lists and sentence patterns. A pattern names the parts of a fact in braces; a Korean part
may carry a particle pair, `{job:은/는}`, of which the right one is chosen by the word's last sound.
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
    documents: tuple[str, ...]  # sentence patterns of a document; each tells the whole fact
    questions: tuple[str, ...]  # QUESTION_FORMS patterns; each names enough of a fact to single it out


ENGLISH = Lexicon(
    language="en",
    jobs=tuple(
        "baker barber brewer carpenter clerk cobbler cook doctor farmer fisher florist gardener grocer hunter judge "
        "librarian mason miller nurse painter pilot poet sailor tailor teacher".split()
    ),
    towns=tuple(
        "Ashford Bexley Brampton Buxton Carlisle Corby Dorking Dunster Fowey Frome Glossop Harwich Hexham Kendal "
        "Ludlow Malton Marlow Morpeth Oakham Penrith Redcar Settle Stroud Tenby Thirsk Totnes Wells Whitby".split()
    ),
    materials=tuple(
        "bamboo brass bronze clay copper cotton crystal felt glass leather linen marble paper pewter silk silver "
        "stone tin wax wooden".split()
    ),
    things=tuple(
        "basket bell blanket bottle bowl box brush button candle chair chess clock comb cup doll drum fan flute hat "
        "kettle kite knife lamp lock map mask mirror needle pen pipe plate purse ring ruler saddle scarf spoon stamp "
        "trumpet vase".split()
    ),
    documents=("The {job} of {town} keeps a {material} {thing}.",),
    questions=(
        "What {material} thing does the {job} of {town} keep?",
        "Who keeps a {material} {thing} in {town}?",
        "Where does the {job} with a {material} {thing} live?",
        "Does the {job} of {town} keep a {thing}?",
        "Is the {material} {thing} in {town} with the {job}?",
        "What does the {job} of {town} keep?",
    ),
)

KOREAN = Lexicon(
    language="ko",
    jobs=tuple(
        "간호사 경찰 교사 기자 농부 대장장이 도예가 목수 무용수 미용사 사서 사진사 상인 선장 시인 약사 어부 요리사 "
        "우체부 의사 재단사 정원사 제빵사 화가 훈장".split()
    ),
    towns=tuple(
        "강릉 거제 경주 고창 공주 구례 군산 김해 나주 남원 단양 담양 목포 무주 밀양 보령 부안 상주 속초 순천 안동 "
        "양평 여수 영월 전주 진주 태백 통영".split()
    ),
    materials=tuple(
        "가죽 구리 나무 놋쇠 대나무 도자기 돌 모시 무명 백동 비단 삼베 수정 양털 옥 유리 은 종이 주석 흙".split()
    ),
    things=tuple(
        "가면 거울 그릇 깃발 나침반 단추 등잔 모자 물레 바구니 바늘 반지 방울 벼루 병풍 부채 북 붓 비녀 빗 상자 "
        "소반 시계 신발 연 열쇠 인형 자물쇠 장갑 장기판 접시 종 주전자 지갑 지도 지팡이 찻잔 촛대 피리 화살".split()
    ),
    documents=("{town}의 {job:은/는} {material} {thing:을/를} 두었다.",),
    questions=(
        "{town}의 {job:은/는} 어떤 {material} 물건을 두었나요?",
        "{town}에서 {material} {thing:을/를} 둔 사람은 누구인가요?",
        "{material} {thing:을/를} 둔 {job:은/는} 어디에 사나요?",
        "{town}의 {job:이/가} {thing:을/를} 두었나요?",
        "{town}의 {material} {thing:은/는} {job:이/가} 두었나요?",
        "{town}의 {job:은/는} 무엇을 두었나요?",
    ),
)

LEXICONS = (KOREAN, ENGLISH)


def ends_in_consonant(word: str) -> bool:
    """True when the last syllable of a Korean word has a final consonant (Unicode: (code - 0xAC00) % 28 != 0)."""
    offset = ord(word[-1]) - 0xAC00
    return 0 <= offset < 11172 and offset % 28 != 0
