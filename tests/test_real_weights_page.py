"""docs/stage1-on-real-weights.md is what benchmarks/pretrained/study.py draws from the results that lie beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "pretrained"))
import study
import study_page

REPOSITORY = Path(__file__).parents[1]


def results() -> list[study.Result]:
    lines = (REPOSITORY / "docs/real-weights/results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_page_is_drawn_from_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(study_page, "DOCS", tmp_path)
    study_page.draw(results())
    want = (REPOSITORY / "docs/stage1-on-real-weights.md").read_text(encoding="utf-8")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == want


def test_the_defaults_are_those_of_the_best_start() -> None:
    """By the largest pass that is complete; else the page says something else than the spec."""
    from anchor_cli.spec.spec import RunSpec

    scores = study_page.ends(results(), study.named(study.PASSES, "full"))
    assert {arm: len(each) for arm, each in scores.items()} == {arm.name: 2 for arm in study.ARMS}
    best = max(study.ARMS, key=lambda arm: sum(scores[arm.name]))
    default = {key: RunSpec.model_fields[key].default for key in ("reconstruction_targets", "d2q_weight", "q2d_weight")}
    assert default == {"reconstruction_targets": best.targets, "d2q_weight": best.d2q, "q2d_weight": best.q2d}


def test_every_task_is_done_once_and_a_start_before_what_is_trained_from_it() -> None:
    keys = list(study.tasks())
    assert len({json.dumps(key) for key in keys}) == len(keys)
    for place, key in enumerate(keys):
        if key["stage"] == "II" and key["steps_one"]:
            assert key | {"stage": "I"} in keys[:place]
