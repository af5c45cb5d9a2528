"""Documents in shards, and their tokens, by one process or by several in the same order.

A worker imports this module and no torch: it starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np

from megatron_idea.data.documents import DataError, Documents, hash_fraction
from megatron_idea.data.tokenizer import Tokenizer

SHARD_CHARACTERS = 4_000_000
"""Encoded at once: enough to keep the tokenizer's threads busy, little enough to lose or forget."""
_AHEAD = 2
"""Shards that are read for each worker before the first of them is done: a bound of the memory."""


@dataclass(frozen=True)
class Shard:
    texts: list[str]
    skipped: int
    """Bad documents between the end of the shard before and that of this one."""
    reached: tuple[int, int]
    """Where the next shard begins, as ``Documents.begin`` says it."""


@dataclass
class Tokens:
    """Documents of one side of the split, each ending with eod."""

    ids: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    text_bytes: int = 0


@dataclass(frozen=True)
class Encoded:
    """What a shard has become."""

    train: Tokens
    held_out: Tokens
    empty: int
    """Documents without a token, left out."""


@dataclass(frozen=True)
class Encoder:
    """Turns the texts of a shard into tokens; a worker has a copy."""

    tokenizer: Tokenizer
    dtype: str
    held_out: float

    def __call__(self, texts: list[str]) -> Encoded:
        train, held, empty = Tokens(), Tokens(), 0
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            if not ids:
                empty += 1
                continue
            ids.append(self.tokenizer.eod)
            side = held if hash_fraction(text, salt=b"held out") < self.held_out else train
            side.ids += np.array(ids, dtype=self.dtype).tobytes()
            side.lengths.append(len(ids))
            side.text_bytes += len(text.encode("utf-8"))
        return Encoded(train, held, empty)


class WorkerError(DataError):
    """Says how a worker process ended before its work was done."""


def shards_of(documents: Documents) -> Iterator[Shard]:
    """Yield documents in shards of ``SHARD_CHARACTERS`` and what the last document is longer."""
    texts: list[str] = []
    size = skipped = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= SHARD_CHARACTERS:
            yield Shard(texts, documents.skipped - skipped, documents.reached)
            texts, size, skipped = [], 0, documents.skipped
    if texts or documents.skipped > skipped:
        yield Shard(texts, documents.skipped - skipped, documents.reached)


def encode_all(
    shards: Iterator[Shard], encoder: Encoder, workers: int
) -> Iterator[tuple[Shard, Encoded]]:
    """Yield each shard, without its texts, with its tokens, in order.

    One worker is this process, where the tokenizer may take threads of its own. Each of several is
    a process with one thread; this one reads for them.

    Raises: WorkerError when a worker process ends before its time; whatever reading raises.
    """
    if workers == 1:
        for shard in shards:
            yield _without_texts(shard), encoder(shard.texts)
        return
    with _Workers(encoder, workers) as pool:
        shown: dict[int, Shard] = {}
        done: dict[int, Encoded] = {}
        given = taken = 0

        def in_order() -> Iterator[tuple[Shard, Encoded]]:
            nonlocal taken
            while taken in done:
                yield shown.pop(taken), done.pop(taken)
                taken += 1

        for shard in shards:
            while not pool.idle or given - taken >= _AHEAD * workers:
                done.update(pool.results())
                yield from in_order()
            pool.give(given, shard.texts)
            shown[given] = _without_texts(shard)
            given += 1
        while taken < given:
            done.update(pool.results())
            yield from in_order()


def _without_texts(shard: Shard) -> Shard:
    return Shard([], shard.skipped, shard.reached)


class _Workers:
    """Processes with an ``Encoder`` each; a context manager that ends them.

    Every worker has a pipe of its own, whose other end no third process holds: it ends when this
    process does, even by SIGKILL, and this process hears of its end at once.
    """

    def __init__(self, encoder: Encoder, count: int) -> None:
        self._encoder, self._count = encoder, count
        self._processes: dict[Connection, BaseProcess] = {}
        self._busy: dict[Connection, int] = {}
        self.idle: list[Connection] = []

    def __enter__(self) -> _Workers:
        # Not fork: the tokenizer that was trained, and the reader of Parquet, have threads.
        context = multiprocessing.get_context("spawn")
        try:
            for _ in range(self._count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, self._encoder), daemon=True, name="tokenize"
                )
                # A worker inherits that: Ctrl-C is for this process, which then ends the others.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                try:
                    process.start()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                theirs.close()
                self._processes[ours] = process
                self.idle.append(ours)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    def give(self, number: int, texts: list[str]) -> None:
        """Let an idle worker encode the texts of a shard."""
        connection = self.idle.pop()
        self._busy[connection] = number
        try:
            connection.send(texts)
        except OSError:
            self._explain(connection)

    def results(self) -> Iterator[tuple[int, Encoded]]:
        """Wait for a worker; yield the numbers of the shards that are done, with their tokens."""
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except (EOFError, OSError):
                self._explain(connection)
            if isinstance(result, BaseException):
                raise result
            yield self._busy.pop(connection), result
            self.idle.append(connection)

    def _explain(self, connection: Connection) -> None:
        """Raises: WorkerError for the process at the other end, which is gone."""
        process = self._processes[connection]
        process.join()
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise WorkerError(
            f"worker process {process.pid} {how}: the same call goes on, with fewer --workers if "
            "memory was short"
        )


def _work(connection: Connection, encoder: Encoder) -> None:
    """Encode what comes until nobody is at the other end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(EOFError, OSError):
        while True:
            texts = connection.recv()
            result: Encoded | Exception
            try:
                result = encoder(texts)
            except Exception as error:
                error.add_note(traceback.format_exc())
                result = error
            connection.send(result)
