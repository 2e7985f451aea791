"""A destination in a store: nothing of a model is visible before all of it is uploaded, and what makes it one is last.

These lie beside a destination `NAME` during a run, and after a killed one (`ckptkit.io.stores.journal`):

    .NAME.ckptkit-lock          an object that says whose the destination is
    .NAME.ckptkit-partial/      the journal

The parts of a file are uploaded to its own key, where a store shows nothing before the upload is completed. When all
parts of all files are there, the uploads are completed, file by file; the file by which readers know a checkpoint is
last. A store has no step for several objects, so a reader may see files of a checkpoint that is not whole; and where an
old one is replaced, files of both.

An object of ours has the digest of its plan beside it. So a run that was killed between two files is resumed there.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ckptkit.errors import CkptkitError, InputError, StorageError, UsageError
from ckptkit.io import faults
from ckptkit.io.checksums import Sum
from ckptkit.io.commit import resumable
from ckptkit.io.crew import Crew
from ckptkit.io.engine import Stop
from ckptkit.io.plan import Plan, source_files
from ckptkit.io.source import Fingerprint, Seen, TouchedError, fingerprints
from ckptkit.io.stores.address import Address, is_address, parse
from ckptkit.io.stores.client import Bucket, Stored, UploadGoneError
from ckptkit.io.stores.journal import Begun, StoreJournal, Sums
from ckptkit.io.stores.lock import Lock
from ckptkit.io.stores.mirror import mirror_around
from ckptkit.io.stores.parts import Sizes, count_of, lay_out_parts
from ckptkit.io.stores.team import RANKS, Leader, numbers_of, shares, terms_of, upload_share
from ckptkit.io.stores.uploading import Present, Uploaded
from ckptkit.io.team import Moved, Outcome
from ckptkit.io.world import ALONE, World

Answer = TypeVar("Answer")

_MARK = "ckptkit-plan"
_MOST = 1_000_000
"""Objects below a destination, or beside it."""
_CALLS = 8
"""Calls at a time."""
_PIECE = 16 << 20
_LONGEST_KEY = 1024


class StoreDestination:
    """A folder of a store to be made from a plan; the counterpart of `ckptkit.io.commit.Destination`.

    Attributes:
        address: The destination.
        free: None: a store has no limit.
        notes: What the user is to know about the run, once it is over.
    """

    free: None = None

    def __init__(
        self,
        address: Address,
        plan: Plan,
        *,
        sources: Iterable[str | Path] = (),
        seen: Iterable[Seen] = (),
        overwrite: bool = False,
        resume: bool = False,
        sizes: Sizes | None = None,
    ) -> None:
        """Checks the plan and the place; changes nothing.

        Args:
            address: The destination: nothing is below it, or anything with `overwrite`.
            plan: Its content.
            sources: Directories, files or addresses that the user named as input.
            seen: Fingerprints of the sources from before they were read.
            overwrite: Replace what is there.
            resume: Continue a killed run by part.
            sizes: Sizes of parts, by default those of the environment.

        Raises:
            UsageError: The destination is in use for something else, or overlaps a source.
            InputError: A source is gone, or the plan names an impossible file.
            UnsupportedError: A cast that does not exist, or a file that is too large for a store.
            StorageError: The store does not answer, or not with what is asked for.
        """
        plan.check()
        if address.scheme != "s3":
            raise UsageError("only s3://BUCKET/PREFIX can be written", where=address, hint="copy the output there")
        self.address = address
        self.notes: list[str] = []
        self._plan = plan
        self._seen = tuple(seen)
        self._overwrite = overwrite
        self._resume = resume
        self._check_overlap(sources)
        self._check_keys()
        self._layout = lay_out_parts(plan.files, sizes or Sizes.of_environment())
        self._bucket = Bucket(address)
        self._stop = Stop()
        self._bucket.stopped = self._stop.is_set
        self._lock = Lock(self._bucket, self._beside("lock"), str(address))
        self._fingerprints: tuple[Fingerprint, ...] = ()
        self._digest = ""
        self._uploads: dict[int, Begun] = {}
        self._tags: dict[int, dict[int, str]] = {}
        self._complete: set[int] = set()
        self._sums: dict[int, Sums] = {}
        self._leader: Leader | None = None
        self._begun = self._moving = self._completing = self._in_place = False
        self._found: Mapping[int, Present] = {}
        self._parts = 0
        self._counting = threading.Lock()
        self._old = self._below()
        self._check_place(self._old)

    @property
    def memory(self) -> int:
        """Bytes of the parts that may be in memory at a time."""
        return self._layout.memory

    @property
    def resume_hint(self) -> str | None:
        """A hint for the user of a stopped run, or None if the run left nothing."""
        if (stands := self._what_stands()) is not None:
            return stands
        if not self._begun:
            return None
        return (
            f"the store keeps the uploaded parts (and charges for them): run again with --resume to continue; a run"
            f" without it, or aborting the uploads below {self.address}/, removes them"
        )

    def write(
        self,
        *,
        threads: int | None = None,
        hash: bool = False,
        progress: Callable[[int, int], None] | None = None,
        check: Callable[[], None] | None = None,
        world: World = ALONE,
    ) -> Outcome:
        """Carries out the plan and completes the output.

        Args:
            threads: Threads that move bytes; others upload.
            hash: Also compute the SHA-256 of every file, which is read back from the store for that.
            progress: Called with (bytes done, bytes in all).
            check: Called when all parts are uploaded and nothing is visible; an error stops that.
            world: The processes that carry out the plan; this one is rank 0. The others call `take_part`.

        Raises:
            UsageError: Another run writes to this destination, or another program has filled it meanwhile.
            InputError: A source is gone, damaged or changed, or two tensors that must be equal differ.
            StorageError: The store answers with an error, or not at all.
        """
        done, counting = 0, threading.Lock()

        def count(size: int) -> None:
            nonlocal done
            with counting:
                done += size
            if progress is not None:
                progress(done, self._plan.nbytes)

        with resumable(lambda: self.resume_hint), self._locked():
            self._prepare()
            if world.size > 1:
                terms = terms_of(self._digest, self._layout, hash)
                self._leader = Leader(self._bucket, f"{self._partial}/{RANKS}", world, terms, self._stop)
                self._leader.gather()
            self._moving = True
            left = [index for index in range(len(self._plan.files)) if index not in self._complete]
            count(sum(self._plan.files[index].size for index in self._complete))
            uploaded = self._upload(left, threads, count, world)
            if check is not None:
                check()
            self._commit(uploaded.held)
            if self._leader is not None:
                self._leader.end(None)
            self._clean_up()
            hashes = self._hashes() if hash else {}
        moved = Moved(
            0, socket.gethostname(), uploaded.written + sum(map(len, uploaded.held.values())), uploaded.seconds
        )
        others = self._leader.moved if self._leader is not None else []
        return Outcome(hashes, sorted([moved, *others], key=lambda one: one.rank) if left else [])

    # before bytes move

    def _check_overlap(self, sources: Iterable[str | Path]) -> None:
        around = {item: mirror_around(item) for item in {*map(str, sources), *self._plan.sources()}}
        read = {item if mirror is None else str(mirror.store.address) for item, mirror in around.items()}
        for source in sorted(item for item in read if is_address(item)):
            other = parse(source)
            if (other.scheme, other.place) != (self.address.scheme, self.address.place):
                continue
            ours, theirs = (PurePosixPath(item.prefix) for item in (self.address, other))
            if ours == theirs or ours in theirs.parents:
                raise UsageError("the destination holds the source", where=self.address, hint="choose another prefix")
            if theirs in ours.parents:
                what = f"the destination lies inside the source {other}"
                raise UsageError(what, where=self.address, hint="choose another prefix")

    def _check_keys(self) -> None:
        for file in self._plan.files:
            if len(self._key(file.path).encode()) > _LONGEST_KEY:
                hint = "choose a shorter prefix"
                raise UsageError("a key is longer than a store takes", where=self._key(file.path)[:80], hint=hint)

    def _check_place(self, there: Iterable[Stored]) -> None:
        """Whether everything below the destination is ours, or may be replaced."""
        if self._overwrite:
            return
        for stored in there:
            if not (self._resume and self._is_ours(stored.key)):
                hint = "choose another, or pass --overwrite"
                raise UsageError(f"the destination exists ({self._name(stored.key)})", where=self.address, hint=hint)

    def _is_ours(self, key: str) -> bool:
        """Whether an object is a file of this very plan, written by an earlier run of it."""
        if not self._digest:
            self._read_sources()
        sizes = {file.path: file.size for file in self._plan.files}
        found = self._bucket.head(key) if self._name(key) in sizes else None
        return found is not None and self._is_marked(found, self._name(key), sizes[self._name(key)])

    def _is_marked(self, found: Stored, path: str, size: int) -> bool:
        return found.size == size and found.metadata.get(_MARK) == self._mark(path)

    def _mark(self, path: str) -> str:
        return hashlib.sha256(f"{self._digest} {path}".encode()).hexdigest()

    def _read_sources(self) -> None:
        sources = self._plan.sources()
        for seen in self._seen:
            seen.check(sources)
        self._fingerprints = fingerprints(sources)
        self._digest = self._plan.digest(self._fingerprints)

    def _below(self) -> list[Stored]:
        """All objects below the destination; consoles make an empty one for a folder, which does not count."""
        prefix = f"{self.address.prefix}/"
        return [item for item in self._bucket.objects(prefix, _MOST) if item.key != prefix]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock. What is not complete stays in the store, as `Destination` leaves it on a disk."""
        self._lock.take()
        if self._lock.note is not None:
            self.notes.append(self._lock.note)
        self._lock.keep()
        try:
            yield
        except BaseException as error:
            self._stop.set(error)
            self._bucket.stopped = threading.Event().is_set
            if self._leader is not None:
                self._leader.end(error)
            elif isinstance(error, InputError) and not isinstance(error, TouchedError) and self._moving:
                with suppress(CkptkitError):
                    self._remove_leftovers()
                    self._begun = False
            if (stands := self._what_stands()) is not None:
                error.add_note(stands)
            elif not isinstance(error, CkptkitError) and (hint := self.resume_hint) is not None:
                error.add_note(hint)
            raise
        finally:
            self._lock.release()

    def _what_stands(self) -> str | None:
        """A sentence about what readers see, for a run that ends while files are completed, or later; else None."""
        if self._in_place:
            return f"the new model is complete at {self.address}"
        if not self._completing:
            return None
        old = " beside those of the old one" if self._old else ""
        return f"files of the new model may be visible at {self.address}{old}: run again with --resume to complete it"

    def _prepare(self) -> None:
        """Finds what an earlier run uploaded, or removes it, and begins the uploads that are missing."""
        self._read_sources()
        earlier = StoreJournal.read(self._bucket, self._journal) if self._resume else None
        if earlier is None:
            removed = self._remove_leftovers()
            if removed:
                self.notes.append(f"what an earlier run had uploaded was removed ({removed} unfinished uploads)")
        self._begun = True
        self._complete = self._completed()
        present = self._present(earlier) if earlier is not None else {}
        fresh = [
            index
            for group in self._layout.groups
            for index in group.files
            if index not in present and index not in self._complete
        ]
        self._bucket.put(self._journal, self._journal_data())  # an upload without a journal would be nobody's
        for index, upload in zip(fresh, self._each(self._begin, fresh), strict=True):
            self._uploads[index] = Begun(upload, self._layout.part_of(index))
            self._tags[index] = {}
        self._bucket.put(self._journal, self._journal_data())
        self._found = present

    def _begin(self, index: int) -> str:
        path = self._plan.files[index].path
        return self._bucket.create(self._key(path), {_MARK: self._mark(path)})

    def _journal_data(self) -> bytes:
        uploads = {self._plan.files[index].path: begun for index, begun in self._uploads.items()}
        files = [self._plan.files[index].path for group in self._layout.groups for index in group.files]
        return StoreJournal.of(self._digest, self._fingerprints, uploads, files).data()

    def _completed(self) -> set[int]:
        """The files of this very plan that an earlier run completed."""
        if not self._resume:
            return set()
        paths = {file.path: index for index, file in enumerate(self._plan.files)}
        there = [paths[name] for item in self._below() if (name := self._name(item.key)) in paths]
        ours = self._each(lambda index: self._is_ours(self._key(self._plan.files[index].path)), there)
        return {index for index, found in zip(there, ours, strict=True) if found}

    def _present(self, earlier: StoreJournal) -> dict[int, Present]:
        """The uploads of an earlier run that go on, with the parts that the store has of them."""
        touched = earlier.touched(self._digest, self._fingerprints, self._bucket.url(self._journal))
        found: dict[int, Present] = {}
        for group in self._layout.groups:
            for index in group.files:
                file = self._plan.files[index]
                begun = earlier.uploads.get(file.path)
                if begun is None or index in self._complete:
                    continue
                key = self._key(file.path)
                changed = touched and not self._sources_of(index).isdisjoint(touched)
                parts = None if changed or begun.part != group.part else self._bucket.parts(key, begun.upload)
                if parts is None:
                    self._bucket.abort([(key, begun.upload)])
                    if changed:
                        sums = self._bucket.objects(f"{self._partial}/sums/{index}/", _MOST)
                        self._bucket.delete([item.key for item in sums])
                    continue
                self._uploads[index] = begun
                spans = [self._span(index, number) for number in range(1, count_of(file.size, begun.part) + 1)]
                whole = {
                    number: parts[number].tag
                    for number, (start, stop) in enumerate(spans, 1)
                    if number in parts and parts[number].size == stop - start
                }
                known = Sums(self._bucket, self._partial, index).read(file, begun.part) if file.checksums else {}
                if file.checksums:
                    whole = {number: tag for number, tag in whole.items() if number in known}
                self._tags[index] = whole
                found[index] = Present(frozenset(whole), [item for number in whole for item in known.get(number, ())])
        return found

    def _sources_of(self, index: int) -> set[str]:
        return source_files(segment.tensor for segment in self._plan.files[index].segments)

    def _remove_leftovers(self) -> int:
        """Has the store forget what an earlier run left, if its journal shows that there was one.

        Returns:
            How many uploads were aborted.
        """
        left = self._bucket.objects(f"{self._partial}/", _MOST)
        if not left:
            return 0
        ours = {self._key(file.path) for file in self._plan.files}
        uploads: set[tuple[str, str]] = set()
        if not self._in_place:
            with suppress(InputError):  # not every store has a list
                if (earlier := StoreJournal.read(self._bucket, self._journal)) is not None:
                    uploads |= {(self._key(path), begun.upload) for path, begun in earlier.uploads.items()}
                    ours.update(self._key(path) for path in (*earlier.uploads, *earlier.files))
        # Others may upload below the destination, too.
        uploads.update(item for item in self._bucket.uploads(f"{self.address.prefix}/") if item[0] in ours)
        self._bucket.abort(sorted(uploads))
        keys = [item.key for item in left]
        self._bucket.delete([key for key in keys if key != self._journal])
        self._bucket.delete([key for key in keys if key == self._journal])  # without it, nobody looks for uploads
        return len(uploads)

    # while bytes move

    def _upload(self, left: Sequence[int], threads: int | None, count: Callable[[int], None], world: World) -> Uploaded:
        for index, present in self._found.items():
            count(sum(stop - start for start, stop in (self._span(index, number) for number in present.numbers)))
        self._sums = {index: Sums(self._bucket, self._partial, index) for index in left}
        uploads = {index: begun for index, begun in self._uploads.items() if index not in self._complete}
        live = {index: numbers_of(self._plan, begun, index) - self._numbers(index) for index, begun in uploads.items()}
        if self._leader is not None:
            self._leader.start(uploads, live, self._found, count)
        uploaded = upload_share(
            self._plan,
            self._layout,
            self,
            shares(self._plan, self._layout, live, world.size)[0],
            uploads,
            self._found,
            held=[index for index in self._layout.held if index in set(left)],
            world=world,
            threads=threads,
            stop=self._stop,
            count=count,
        )
        if self._leader is not None:
            self._leader.wait()
            for index, tags in self._leader.tags.items():
                self._tags[index].update(tags)
        return uploaded

    def _numbers(self, index: int) -> frozenset[int]:
        return self._found[index].numbers if index in self._found else frozenset()

    def part(self, file: int, number: int, data: bytearray, sums: Sequence[Sum]) -> None:
        """Uploads a part, as of `ckptkit.io.stores.uploading.Sink`."""
        if self._lock.lost is not None:
            raise self._lock.lost
        tag = self._bucket.part(self._key(self._plan.files[file].path), self._uploads[file].upload, number, data)
        if self._plan.files[file].checksums:
            self._sums[file].add(number, sums)
        self._tags[file][number] = tag
        with self._counting:
            self._parts += 1
            faults.step(f"part-{self._parts}")

    # after bytes moved

    def _commit(self, held: Mapping[int, bytearray]) -> None:
        """Makes the files visible, the one that makes a checkpoint of them last."""
        self._check_complete(held)
        for fingerprint in self._fingerprints:
            fingerprint.check()
        self._lock.check()
        self._old = self._below()
        names = {file.path for file in self._plan.files}
        self._check_place([item for item in self._old if self._name(item.key) not in names])
        ours = [index for index in range(len(names)) if index not in self._complete]
        taken = {self._name(item.key) for item in self._old} & {self._plan.files[index].path for index in ours}
        if taken and not self._overwrite:
            hint = "choose another, or pass --overwrite"
            raise UsageError(f"the destination exists ({min(taken)})", where=self.address, hint=hint)
        faults.step("complete")
        for rank in sorted({_turn(self._plan.files[index].path) for index in ours}):
            turn = [index for index in ours if _turn(self._plan.files[index].path) == rank]
            if rank == _LAST:
                faults.step("last")
            self._moving, self._completing = False, True
            self._each(lambda index: self._finish(index, held), turn)
        self._in_place = True
        faults.step("clean-up")

    def _check_complete(self, held: Mapping[int, bytearray]) -> None:
        for index, file in enumerate(self._plan.files):
            if index in self._complete or index in held:
                continue
            wanted = set(range(1, count_of(file.size, self._uploads[index].part) + 1))
            if self._tags[index].keys() != wanted:
                place = self._bucket.url(self._key(file.path))
                raise StorageError("the file is not complete", where=place, hint="run again with --resume")

    def _finish(self, index: int, held: Mapping[int, bytearray]) -> None:
        file = self._plan.files[index]
        key = self._key(file.path)
        if index in held:
            self._bucket.put(key, held[index], metadata={_MARK: self._mark(file.path)})
            return
        tags = [tag for _, tag in sorted(self._tags[index].items())]
        try:
            self._bucket.complete(key, self._uploads[index].upload, tags)
        except UploadGoneError:
            # It may be complete, and the answer was lost.
            found = self._bucket.head(key)
            if found is None or not self._is_marked(found, file.path, file.size):
                raise

    def _clean_up(self) -> None:
        """Removes what the old model had and the new one has not, and then the journal."""
        names = {file.path for file in self._plan.files}
        if self._overwrite:
            self._bucket.delete([item.key for item in self._below() if self._name(item.key) not in names])
        self._remove_leftovers()

    def _hashes(self) -> dict[str, str]:
        indices = range(len(self._plan.files))
        paths = [file.path for file in self._plan.files]
        return dict(sorted(zip(paths, self._each(self._hash, indices), strict=True)))

    def _hash(self, index: int) -> str:
        file, digest = self._plan.files[index], hashlib.sha256()
        for start in range(0, file.size, _PIECE):
            digest.update(self._bucket.piece(self._key(file.path), start, min(_PIECE, file.size - start)))
        return digest.hexdigest()

    # names

    @property
    def _partial(self) -> str:
        return self._beside("partial")

    @property
    def _journal(self) -> str:
        return f"{self._partial}/journal.json"

    def _beside(self, kind: str) -> str:
        return self.address.beside(f"ckptkit-{kind}")

    def _key(self, path: str) -> str:
        return self.address.key(path)

    def _name(self, key: str) -> str:
        return key.removeprefix(f"{self.address.prefix}/")

    def _span(self, index: int, number: int) -> tuple[int, int]:
        part = self._uploads[index].part
        return (number - 1) * part, min(number * part, self._plan.files[index].size)

    def _each(self, work: Callable[[int], Answer], tasks: Sequence[int]) -> list[Answer]:
        """Some calls at a time, for files by their indices; after the first error no other is made."""
        errors: list[BaseException] = []

        def one(task: int) -> Answer:
            if errors:
                raise errors[0]
            try:
                return work(task)
            except BaseException as error:
                errors.append(error)
                raise errors[0] from None

        crew = Crew(min(_CALLS, len(tasks)), "ckptkit-store")
        try:
            return list(crew.map(one, tasks))
        except BaseException as error:
            errors.append(error)  # a signal ends the others, too
            raise
        finally:
            crew.close()


_TURNS = ((".index.json",), (".metadata",), ("metadata.json",))
_LAST_NAMES = {"config.json", "adapter_config.json", "megatron_args.json", "latest_checkpointed_iteration.txt"}
_LAST = len(_TURNS) + 1


def _turn(path: str) -> int:
    """When a file is completed: weights and small files first, what names them later, what makes a checkpoint last.

    Hugging Face and PEFT directories are known by their config, packed ones by their arguments, Megatron's by the
    tracker file, and a distributed checkpoint by its `.metadata`. The files of these names in a sidecar do not count.
    """
    if path in _LAST_NAMES:
        return _LAST
    name = path.rpartition("/")[2]
    return next((turn for turn, ends in enumerate(_TURNS, 1) if name.endswith(ends)), 0)
