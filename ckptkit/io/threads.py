"""Reading many tensors with a few threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Event, local
from typing import TypeVar

from ckptkit.io.cores import reading_threads
from ckptkit.io.crew import Crew
from ckptkit.io.reading import TensorReader

Task = TypeVar("Task")
Answer = TypeVar("Answer")
Progress = Callable[[int, int], None]


class Readers(local):
    """The readers of one thread: two, for tensors that are read side by side."""

    def __init__(self, everyone: list[TensorReader]) -> None:
        self.first = TensorReader()
        self.second = TensorReader()
        everyone += [self.first, self.second]


def read_all(
    tasks: Sequence[Task],
    work: Callable[[Readers, Task], Answer],
    size: Callable[[Task], int],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """The result of `work` for each task, in the order of the tasks, whatever the number of threads.

    Tasks are begun in their order: those that are neighbours in a file meet in its cache. The first error ends it all.

    Args:
        tasks: The tasks.
        work: Reads one.
        size: Bytes that a task reads, for the progress.
        threads: How many read; by default one for each core, at most 16.
        progress: Called in this thread with (bytes done, bytes in all).

    Raises:
        CkptkitError: What `work` raised.
    """
    count = threads or reading_threads()
    opened: list[TensorReader] = []
    readers, stopped = Readers(opened), Event()
    total, done = sum(map(size, tasks)), 0

    def run(task: Task) -> Answer | None:
        return None if stopped.is_set() else work(readers, task)

    answers: list[Answer] = []
    crew = Crew(min(count, len(tasks)), "ckptkit-read")
    try:
        for task, answer in zip(tasks, crew.map(run, tasks), strict=True):
            assert answer is not None
            answers.append(answer)
            done += size(task)
            if progress is not None:
                progress(done, total)
    finally:
        stopped.set()
        crew.close()
        for reader in opened:
            reader.close()
    return answers
