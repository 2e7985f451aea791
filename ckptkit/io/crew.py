"""A few threads that work off one queue, or as many of them as the system has to give."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")


def start_threads(works: Iterable[Callable[[], None]], name: str) -> list[threading.Thread]:
    """Starts a thread for each function, as long as the system has threads to give.

    A limit on processes (ulimit -u, a container's) may leave fewer, or none.

    Args:
        works: The functions to run.
        name: Start of the threads' names.

    Returns:
        The threads that run, in the order of their functions.
    """
    started: list[threading.Thread] = []
    for number, work in enumerate(works):
        thread = threading.Thread(target=work, name=f"{name}-{number}")
        try:
            thread.start()
        except RuntimeError:
            break
        started.append(thread)
    return started


class Crew:
    """Threads that take work from one queue. Where there are none, whoever hands work in does it."""

    def __init__(self, count: int, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = start_threads([self._work] * count, name)

    def submit(self, work: Callable[[], None]) -> None:
        """Has `work` done, which raises nothing."""
        if self._threads:
            self._queue.put(work)
        else:
            work()

    def map(self, work: Callable[[Task], Answer], tasks: Iterable[Task]) -> Iterator[Answer]:
        """The result of `work` for each task, in their order. An error of `work` is raised at its turn."""
        if not self._threads:
            yield from map(work, tasks)
            return
        answers: list[Future[Answer]] = []
        for task in tasks:
            answers.append(Future())
            self._queue.put(_answering(answers[-1], work, task))
        for answer in answers:
            yield answer.result()

    def close(self) -> None:
        """Waits until all work is done."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
            del work  # it may hold memory, and the next may be long in coming


def _answering(answer: Future[Answer], work: Callable[[Task], Answer], task: Task) -> Callable[[], None]:
    def run() -> None:
        try:
            answer.set_result(work(task))
        except BaseException as error:
            answer.set_exception(error)

    return run


def attend(
    works: Sequence[Callable[[], None]],
    mailbox: SimpleQueue[int | None],
    progress: Callable[[int], None],
    stop: Callable[[], None],
) -> None:
    """Does some work in threads of its own, and tells in this one how far it is, until all have ended.

    Args:
        works: What each thread does; an error must not leave it.
        mailbox: Each puts the bytes that it finished here, and None when it ends.
        progress: Called with those bytes.
        stop: Called where this thread is interrupted: the others are to end.
    """
    workers: list[threading.Thread] = []
    try:
        workers = start_threads(works, "ckptkit")
        if not workers:
            works[0]()  # the system allows no further thread, so this one does the work
        running = len(workers) or 1
        while running:
            message = mailbox.get()
            if message is None:
                running -= 1
            else:
                progress(message)
    except BaseException:
        stop()
        raise
    finally:
        for worker in workers:
            worker.join()
