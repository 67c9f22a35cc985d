"""The picture of the rooms is that of the imports as they are, and the budget of modules a room is kept."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    location = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    sys.modules["rooms"] = module
    location.loader.exec_module(module)
    return module


def test_the_picture_is_current(rooms: ModuleType) -> None:
    assert rooms.PICTURE.read_text(encoding="utf-8") == rooms.picture(), "run: make docs"


def test_arrows_point_down(rooms: ModuleType) -> None:
    """What the picture shows, counted apart from import-linter."""
    floor = {room: number for number, names in enumerate(reversed(rooms.floors()), start=1) for room in names}
    assert len(floor) == 14 and rooms.imports()
    assert not [(source, target) for source, target in rooms.imports() if floor[source] <= floor[target]]


def test_no_folder_has_more_than_sixteen_modules() -> None:
    """Its `__init__.py`, which says what the room is for, is not counted."""
    modules = [path for path in (ROOT / "anchor_cli").rglob("*.py") if path.name != "__init__.py"]
    crowded = {folder: num for folder, num in Counter(path.parent for path in modules).items() if num > 16}
    assert not crowded
