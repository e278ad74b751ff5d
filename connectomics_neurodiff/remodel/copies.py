"""Several masks of one volume at a time, each in a process of its own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from ..memory import available_main_bytes
from ..provenance import remove_unfinished

logger = logging.getLogger("connectomics_neurodiff")

Item = TypeVar("Item")
Result = TypeVar("Result")

#: What remodelling takes at its peak, with the source (docs/remodelling.md), and what a process takes by itself.
BYTES_PER_VOXEL, BYTES_PER_PROCESS = 36, 300 << 20
_TERMINATED = 128 + signal.SIGTERM
#: In a worker: what it does with each item.
_work: Callable[[Any], Any] | None = None


def workers_that_fit(voxels: int, jobs: int, asked: int = 0) -> int:
    """Processes for so many masks of a volume: as many as asked for (0: as there are cores), as far as memory allows.

    Parameters
    ----------
    voxels : int
        Of the volume.
    jobs : int
        Masks to make.
    asked : int
        Processes wanted, >= 0.

    Returns
    -------
    int
        At least 1.
    """
    wanted = min(asked or _cores(), jobs)
    fit = int(available_main_bytes() // (BYTES_PER_VOXEL * voxels + BYTES_PER_PROCESS))
    if asked and fit < wanted:
        logger.warning("Memory is enough for %d of %d processes.", max(fit, 1), wanted)
    return max(1, min(wanted, fit))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Items with their results, as they are done; with one worker in this process, one after another.

    Parameters
    ----------
    function : callable
        Can be pickled, and so can what it returns. It is sent once to each process, with all that it holds.
    items : sequence
        Its arguments; hashable.
    workers : int
        Processes. They are started anew rather than forked: threads of this one would be missing in them.

    Raises
    ------
    MemoryError
        If a process ended by itself: the system kills them when memory runs out.
    """
    if workers == 1 or len(items) < 2:
        for item in items:
            yield item, function(item)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (function,))
    try:
        with _interruption_held_back():
            jobs = {pool.submit(_answer, item): item for item in items}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as error:
        raise MemoryError(f"one of {workers} processes was killed; ask for fewer") from error
    except BaseException:
        # After an interruption or an error, what is under way is given up; each process removes its half-written file.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interruption_held_back() -> Iterator[None]:
    """Keep Ctrl-C until the end of the block, and for good from the processes started in it: they inherit the mask."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    # The mask alone does not hold it back: another thread may receive it, and this one then answers.
    held: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGINT, lambda *given: held.append(given))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if held and callable(handler):
        handler(*held[0])


def _answer(item: Any) -> Any:
    """Result of a job, by the function that this process was given at its start: it is not sent with every job."""
    assert _work is not None
    return _work(item)


def _start_worker(function: Callable[[Any], Any]) -> None:
    """One thread, and an end that cleans up: Ctrl-C reaches all processes, but it is for the first one to answer."""
    import cv2

    global _work
    _work = function
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _leave)


def _leave(*_: Any) -> None:
    # Not by an exception: Python prints and drops one that a handler raises inside a finaliser or the callback of a
    # weak reference, the pool takes one for the result of a job, and the process would go on.
    remove_unfinished()
    os._exit(_TERMINATED)


def _leave_with_parent() -> None:
    """End when the first process was killed: nobody else would tell this one, and it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
