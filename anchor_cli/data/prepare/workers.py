"""Worker processes for `prepare`: tasks go out in order and prepared rows come back in the same order.

Memory: two parts a process, and one, are on their way at most. Workers end by themselves when their parent is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pyarrow as pa

from anchor_cli.base.errors import RunError
from anchor_cli.data.prepare.rows import RowMaker
from anchor_cli.data.prepare.work import Prepared, Task, Work


def in_order(tasks: Iterator[Task], work: Work, num_proc: int) -> Iterator[tuple[Prepared, float]]:
    """(`RowMaker` of a task, its seconds), in this process or in `num_proc` others; a few parts are on their way."""
    if num_proc <= 1:
        with _one_thread_each():
            make = RowMaker(work)
            yield from (_timed(make, task) for task in tasks)
        return
    pool = ProcessPoolExecutor(num_proc, get_context("spawn"), _start_worker, (work, os.getpid()))
    underway: deque[Future[tuple[Prepared, float]]] = deque()
    try:
        with _one_thread_each():
            for task in tasks:
                underway.append(pool.submit(_do, task))
                if len(underway) > 2 * num_proc + 1:
                    yield underway.popleft().result()
            while underway:
                yield underway.popleft().result()
    except BrokenProcessPool:
        remedy = "lower --num-proc or --max-characters"
        raise RunError("a worker process died, as when memory runs out", remedy) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read by the library at every batch, inherited by workers
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _timed(make: Callable[[Task], Prepared], task: Task) -> tuple[Prepared, float]:
    started = time.monotonic()
    return make(task), time.monotonic() - started


_maker: Callable[[Task], Prepared]


def _start_worker(work: Work, parent: int) -> None:
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    pa.set_cpu_count(1)
    _maker = RowMaker(work)


def _end_with(parent: int) -> None:
    """End this worker when its parent was killed, and cannot end it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _do(task: Task) -> tuple[Prepared, float]:
    return _timed(_maker, task)
