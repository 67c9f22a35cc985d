"""A lock left by a killed compiler is told from one that is held."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anchor_cli.processes.extension_locks import MIN_AGE_S, clear_stale_locks, extension_locks, stale_extension_locks


def make_lock(folder: Path, age_s: float, now: float) -> Path:
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (now - age_s, now - age_s))
    return lock


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def test_old_and_unheld_is_stale_young_is_not(extensions: Path) -> None:
    now = 1_800_000_000.0
    old = make_lock(extensions / "py311_cpu" / "fused_adam", MIN_AGE_S + 1, now)
    young = make_lock(extensions / "py311_cpu" / "utils", MIN_AGE_S - 1, now)
    flat = make_lock(extensions / "cpu_adam", MIN_AGE_S * 9, now)
    assert extension_locks() == sorted([old, young, flat])
    assert stale_extension_locks(now=now) == sorted([old, flat])
    assert clear_stale_locks(now=now) == sorted([old, flat])
    assert young.exists() and not old.exists() and not flat.exists()
    assert clear_stale_locks(now=now) == []


def test_a_lock_that_a_live_process_has_open_is_never_stale(extensions: Path) -> None:
    """The holder is a real process that does what torch.utils.file_baton.FileBaton does; then it is killed."""
    folder = extensions / "fused_adam"
    folder.mkdir()
    lock = folder / "lock"
    script = "import os,sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        os.utime(lock, (1.0, 1.0))
        assert stale_extension_locks() == []
        assert clear_stale_locks() == [] and lock.exists()
    finally:
        holder.kill()
        holder.communicate()
    assert clear_stale_locks() == [lock] and not lock.exists()


def test_no_folder_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "absent"))
    assert extension_locks() == [] and stale_extension_locks() == []
