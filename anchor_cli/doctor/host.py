"""Checks of the machine around the GPUs: memory, limits, disk, network, clock, W&B."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

from anchor_cli.base.check import Check
from anchor_cli.base.files import existing_parent
from anchor_cli.base.hub import hub_address, hub_answer, hub_is_off
from anchor_cli.doctor.needs import Needs
from anchor_cli.train.metrics_log import has_wandb_key

GB = 1e9
MIN_SHARED_MEMORY_GB = 1.0
"""Below this NCCL and data workers may run out (assumption); Docker's default is 0.064 GB."""
MIN_FILES = 4096
"""Open files; a run needs some hundreds, W&B and many ranks more (assumption)."""
WANTED_FREE_GB, LEAST_FREE_GB = 50.0, 5.0
"""A checkpoint of 0.6 B parameters is about 8.3 GB: bf16 weights 1.2, fp32 weights and two moments 7.2 (arithmetic)."""
SLOW_DISK_MB_S = 200.0
"""Below this a checkpoint of 0.6 B parameters takes more than 40 s to write (arithmetic)."""
PROBE_MB = 64
MAX_SKEW_S = 60.0


def memory(_: Needs) -> Iterator[Check]:
    import psutil

    total = psutil.virtual_memory()
    limit = _cgroup_limit()
    usable = min(total.available, limit) if limit else total.available
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    message = f"{usable / GB:.0f} GB of {total.total / GB:.0f} GB free, {cores} CPU cores"
    if limit and limit < total.total:
        message += f", container limit {limit / GB:.0f} GB"
    if usable < 4 * GB:
        yield Check("memory", "warn", message, "close other programs, or give the container more memory")
    else:
        yield Check("memory", "ok", message)


def _cgroup_limit() -> int | None:
    """Bytes this container may use (cgroup v2, v1), or None."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def shared_memory(_: Needs, folder: Path = Path("/dev/shm")) -> Iterator[Check]:
    """NCCL between GPUs of one host and data workers use /dev/shm; Docker gives it 64 MB."""
    if not folder.is_dir():
        yield Check("shared memory", "warn", f"no {folder} on this system", "run on Linux for more than one GPU")
        return
    total = shutil.disk_usage(folder).total
    message = f"{folder} {total / GB:.3g} GB"
    if total < MIN_SHARED_MEMORY_GB * GB:
        cause = ": Docker's default; NCCL fails with more than one GPU" if total <= 70e6 else ": little"
        yield Check("shared memory", "warn", message + cause, "docker run --shm-size=16g (or --ipc=host)")
    else:
        yield Check("shared memory", "ok", message)


def file_descriptors(_: Needs) -> Iterator[Check]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    message = f"{soft:,} open files allowed" if soft != resource.RLIM_INFINITY else "unlimited"
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        more = "ulimit -n 65536" if hard == resource.RLIM_INFINITY or hard >= 65536 else "ask for a higher hard limit"
        yield Check("file descriptors", "warn", message, f"{more} (docker run --ulimit nofile=65536)")
    else:
        yield Check("file descriptors", "ok", message)
    if Path("/dev/infiniband").is_dir():
        locked, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if locked != resource.RLIM_INFINITY:
            yield Check("locked memory", "warn", f"{locked / GB:.3g} GB may be locked; InfiniBand needs it unlimited",
                        "ulimit -l unlimited (docker run --ulimit memlock=-1)")  # fmt: skip
        else:
            yield Check("locked memory", "ok", "unlimited, as InfiniBand needs it")


def disk(needs: Needs) -> Iterator[Check]:
    """Free space where the run will write, and how fast it can write there (flushed to the disk)."""
    place = existing_parent(needs.output_dir)
    free = shutil.disk_usage(place).free / GB
    message = f"{free:,.0f} GB free for {needs.output_dir}"
    advice = "clear the disk, set output_dir elsewhere, or save_total_limit lower; anchor plan says what a run needs"
    if free < LEAST_FREE_GB:
        yield Check("disk", "fail", message, advice)
    elif free < WANTED_FREE_GB:
        yield Check("disk", "warn", message, advice)
    else:
        yield Check("disk", "ok", message)
    if free < 1:
        return
    if not os.access(place, os.W_OK):
        yield Check("disk write", "fail", f"{place} cannot be written to", "set output_dir elsewhere, or its owner")
        return
    yield disk_speed(place, write_speed(place))


def disk_speed(folder: Path, mb_per_s: float) -> Check:
    message = f"{mb_per_s:,.0f} MB/s into {folder}"
    if mb_per_s >= SLOW_DISK_MB_S:
        return Check("disk write", "ok", message)
    seconds = 8300 / mb_per_s
    return Check("disk write", "warn", f"{message}: a checkpoint of 0.6B parameters takes {seconds:.0f} s",
                 "a local SSD, or save_steps larger")  # fmt: skip


def write_speed(folder: Path, num_mb: int = PROBE_MB) -> float:
    """MB/s of writing and flushing `num_mb` of random bytes to a file in `folder`, removed afterwards."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".anchor-doctor-") as file:
        start = time.perf_counter()
        for _ in range(num_mb):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_mb * len(block) / 1e6 / max(time.perf_counter() - start, 1e-9)


HUB_TIMEOUT_S = 5.0


def hub(_: Needs) -> Iterator[Check]:
    if hub_is_off():
        yield Check("Hub", "ok", "HF_HUB_OFFLINE is set: local folders and the cache only")
        return
    address = hub_address()
    date, reason = hub_answer(address, HUB_TIMEOUT_S)
    token = bool(os.environ.get("HF_TOKEN")) or (Path.home() / ".cache/huggingface/token").is_file()
    if date is None:
        yield Check("Hub", "warn", f"{address} is out of reach ({reason})",
                    "give local folders for model, data and eval_data: docs/how-to/air-gapped.md")  # fmt: skip
    else:
        who = "a token is present" if token else "no token (public data only)"
        yield Check("Hub", "ok", f"{address} answers, {who}")


def clock(_: Needs) -> Iterator[Check]:
    """This host's clock against the Hub's Date header, or, without network, against the disk's time stamps."""
    remedy = "turn on time synchronisation (timedatectl set-ntp true)"
    date = None if hub_is_off() else hub_answer(hub_address(), HUB_TIMEOUT_S)[0]
    if date:
        skew = time.time() - parsedate_to_datetime(date).timestamp()
        against = "the Hub's"
    else:
        with tempfile.NamedTemporaryFile(dir=existing_parent(Path.cwd())) as file:
            skew = time.time() - os.stat(file.name).st_mtime
        against = "the disk's (no network to compare with)"
    if abs(skew) > MAX_SKEW_S:
        yield Check("clock", "warn", f"{skew:+,.0f} s from {against}", remedy)
    else:
        yield Check("clock", "ok", f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, {skew:+.1f} s from {against}")


def wandb(needs: Needs) -> Iterator[Check]:
    """Whether a key is there; never the key."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        yield Check("W&B", "ok", "off by WANDB_DISABLED")
        return
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        yield Check("W&B", "ok", f"{mode} by WANDB_MODE")
        return
    if has_wandb_key():
        yield Check("W&B", "ok", "a key is present")
    elif "wandb" in needs.report_to:
        yield Check("W&B", "warn", "no key: report_to wandb will run offline", "wandb login, or report_to: none")
    else:
        yield Check("W&B", "ok", "no key; not asked for")
