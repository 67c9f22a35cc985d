"""Which instruction the rows have: counts, and notes on their own ones and on a language under another's."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO
from anchor_cli.base.language import language_of
from anchor_cli.data.prepare.work import Use
from anchor_cli.data.text import SEPARATOR

FORMS = {
    "plain": "plain texts",
    "half": f"rows with {SEPARATOR} in query or document only",
    "record": f"records {{instruction}}; {SEPARATOR}{{query}} with {SEPARATOR}{{document}}",
}
_MOST_INSTRUCTIONS = 1000  # that are counted by themselves, so that memory does not grow with rows
_MOST_SHOWN = 5
_OTHERS = "(further instructions)"


@dataclass
class InstructionTally:
    """Counts of kept rows by language, instruction and form."""

    uses: Counter[Use] = field(default_factory=Counter)
    forms: dict[str, Counter[str]] = field(default_factory=dict)
    """By file."""

    def add(self, source: str, uses: list[Use]) -> None:
        """Count rows of the file `source`."""
        for use, num in Counter(uses).items():
            full = len(self.uses) >= _MOST_INSTRUCTIONS and use not in self.uses
            self.uses[use._replace(instruction=_OTHERS) if full else use] += num
            self.forms.setdefault(source, Counter())[use.form] += num

    @property
    def by_form(self) -> dict[str, int]:
        """Rows of each form that there is."""
        total = sum(self.forms.values(), Counter[str]())
        return {form: total[form] for form in FORMS if total[form]}

    @property
    def by_instruction(self) -> dict[str, int]:
        """Rows of each instruction, most first."""
        total = Counter[str]()
        for use, num in self.uses.items():
            total[use.instruction] += num
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def notes(self) -> Iterator[str]:
        """Lines for the person: the rows' own instructions, mixed files, and a language under another's instruction."""
        forms = self.by_form
        if set(forms) - {"plain"}:
            records = sum(num for form, num in forms.items() if form != "plain")
            yield (
                f"{records:,} rows are records with {SEPARATOR}: what stands before it is their instruction, "
                "instead of the run's (--separator-as-text reads it as text)"
            )
            yield from self._instructions()
            for source, counts in self.forms.items():
                if len(counts) > 1:
                    parts = [f"{counts[form]:,} {what}" for form, what in FORMS.items() if counts[form]]
                    yield f"{source}: mixed: {', '.join(parts)}"
        yield from self._unlike_their_language()

    def _instructions(self) -> Iterator[str]:
        counts = list(self.by_instruction.items())
        for instruction, num in counts[:_MOST_SHOWN]:
            yield f"  {num:,} rows: {instruction or '(no instruction)'}"
        if counts[_MOST_SHOWN:]:
            yield f"  {sum(num for _, num in counts[_MOST_SHOWN:]):,} rows: {len(counts) - _MOST_SHOWN} more"

    def _unlike_their_language(self) -> Iterator[str]:
        unlike: Counter[tuple[str, str]] = Counter()
        for use, num in self.uses.items():
            if use.form == "plain" and use.instruction and (use.language == "ko") != _is_korean(use.instruction):
                unlike[use.language, use.instruction] += num
        for (language, instruction), num in sorted(unlike.items(), key=lambda item: -item[1])[:_MOST_SHOWN]:
            option = shlex.quote(f"{language}={_USUAL.get(language, 'TEXT')}")
            yield (
                f"{num:,} rows of language {language} have the {'Korean' if _is_korean(instruction) else 'English'} "
                f"instruction; for their own pass --instruction {option}, or set instructions in the spec"
            )


_USUAL: Mapping[str, str] = {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN}


def _is_korean(instruction: str) -> bool:
    return language_of(instruction) == "ko"
