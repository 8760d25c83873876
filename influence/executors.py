"""Where numbered work is done (shards built, models retrained): in this process, or in several.

Each number's work is independent of the others; for shards the store decides who was first.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from influence.errors import InfluenceError, OptionError, StoreError

Work = Callable[[int], Any]
"""Do the work of one number, as build and commit a shard; what it returns is told."""


_GRACE = 20  # seconds for a worker to put away what it has in hand


def run_here(work: Work, numbers: Sequence[int], done: Callable[[Any], Any]) -> None:
    """Do one after the other in this process; `done` is called with what each returns."""
    for number in numbers:
        done(work(number))


def run_processes(
    prepare: Callable[[int], Work], numbers: Sequence[int], workers: int, done: Callable[[Any], Any]
) -> None:
    """Do the work in fresh processes, every `workers`-th number in each.

    Args:
        prepare: Called in each process with the number of processes; must be picklable, and give the work.
        numbers: What to do.
        workers: Number of processes.
        done: Called in this process with what each returns, as it comes.

    Raises:
        InfluenceError: The first error of a worker, as it was raised there.
        StoreError: A worker died.
    """
    if workers < 1:
        raise OptionError(f"workers is {workers}; expected at least 1")
    context = multiprocessing.get_context("spawn")  # HDF5 and CUDA do not survive a fork
    processes = []
    for first in range(min(workers, len(numbers))):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(prepare, numbers[first::workers], workers, sender), daemon=True)
        with _interrupts_ignored():
            process.start()
        sender.close()
        processes.append((process, receiver))
    try:
        pending = {receiver: process for process, receiver in processes}
        while pending:
            for receiver in multiprocessing.connection.wait(list(pending)):
                try:
                    message = receiver.recv()
                except EOFError:
                    process = pending.pop(receiver)
                    process.join()
                    if process.exitcode != 0:
                        raise StoreError(
                            f"a worker ended with exit code {process.exitcode}; what it committed is kept: "
                            "run the same command again to go on"
                        ) from None
                    continue
                if isinstance(message, InfluenceError):
                    raise message
                done(message)
    finally:
        for process, _ in processes:
            process.terminate()
        for process, receiver in processes:
            process.join(_GRACE)
            process.kill()  # what is in hand took longer
            process.join()
            receiver.close()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: it goes to all at once, and this one ends the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _worker(prepare: Callable[[int], Work], numbers: Sequence[int], workers: int, sender: Any) -> None:
    signal.signal(signal.SIGTERM, _stop)  # an exception, so that temporary files are removed
    with contextlib.closing(sender), contextlib.suppress(BrokenPipeError):  # the builder that asked is gone
        try:
            run_here(prepare(workers), numbers, sender.send)
        except InfluenceError as error:
            sender.send(error)
