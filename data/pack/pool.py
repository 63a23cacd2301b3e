"""Worker processes of a pack: they read, check and encode batches of records; the order stays.

They are started over pipes, not by `multiprocessing`: nothing of the main program is run again in
them, they need no shared memory and no named semaphore, and they end with their parent. A worker
that dies costs nothing but time: its batch is done again, one record at a time, and only a record
that ends its worker once more is an error, which names it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from mm.data.modalities.base import BadSample
from mm.data.pack.encode import Encoder
from mm.data.pack.worker import Failure, PreparedBatch, Work, join_batches
from mm.data.sources.base import InlineBytes, Record, Unreadable
from mm.errors import UserError
from mm.launch.environment import cores

log = logging.getLogger(__name__)
START_S = 1.0  # a shorter pack is over before worker processes have started
WITH_TOKENIZERS = 8  # times as long: each process imports torch and what the tokenizers need
GROUP_BYTES, GROUP = 4_000_000, 64  # raw records that are sent together: at most so much, so many


def batches(
    source: Iterable[Record], work: Work, size: int, workers: int
) -> Generator[PreparedBatch, None, None]:
    """Read, check and encode records, in order, by ``workers`` processes where it takes long.

    Args:
        source: the records.
        work: what to do with each.
        size: records of a batch that is encoded together; 1 for raw records.
        workers: processes; 1 does everything in this one.
    Raises:
        UserError: a record ends its worker; RuntimeError what else a worker raises. Both name the
            sample.
    """
    records, begun = iter(source), time.monotonic()
    wait = START_S * (WITH_TOKENIZERS if isinstance(work.encoder, Encoder) else 1)
    pool: Pool | None = None
    while pool is None and (batch := list(islice(records, size))):
        yield PreparedBatch([_prepare(work, record) for record in batch])
        if workers > 1 and time.monotonic() - begun >= wait:
            pool = Pool.start(work, workers)
            if pool is None:
                workers = 1
    if pool is None:
        return
    waiting: deque[Future[PreparedBatch]] = deque()
    with pool:
        take = 16 if size == 1 else size
        while batch := list(islice(records, take)):
            waiting.append(pool.submit(batch))
            if len(waiting) > 2 * workers:
                done = waiting.popleft().result()
                if size == 1:
                    held = sum(len(data) for p in done.items for data in p.raws.values())
                    take = max(1, min(GROUP, GROUP_BYTES * len(done.items) // max(1, held)))
                yield done
        while waiting:
            yield waiting.popleft().result()


def _prepare(work: Work, record: Record) -> Any:
    try:
        return work.prepare(record)
    except Exception as error:
        error.add_note(f"at sample '{record.key}' ({record.where})")
        raise


class Pool:
    """A number of workers, each lent to one thread at a time."""

    def __init__(self, payload: bytes, workers: int):
        self.payload, self.closed = payload, False
        self.threads = max(1, cores() // workers)
        self.idle: queue.Queue[Worker] = queue.Queue()
        self.all: list[Worker] = []
        self.pool = ThreadPoolExecutor(workers)

    @classmethod
    def start(cls, work: Work, workers: int) -> Pool | None:
        """Start the processes. None, with a line in the log, when the work cannot be sent."""
        try:
            pool = cls(pickle.dumps(work), workers)
        except Exception as error:  # a tokenizer of someone else may raise anything
            log.warning("packing in one process: %s cannot be sent to workers", error)
            return None
        for _ in range(workers):
            pool.idle.put(pool.new())
        for worker in pool.all:
            said = worker.receive()
            if said is not True:
                log.warning("packing in one process: a worker could not start: %s", said)
                pool.__exit__()
                return None
        return pool

    def new(self) -> Worker:
        worker = Worker(self.payload, self.threads)
        self.all.append(worker)
        return worker

    def submit(self, records: list[Record]) -> Future[PreparedBatch]:
        return self.pool.submit(self._do, records)

    def _do(self, records: list[Record]) -> PreparedBatch:
        try:
            message = pickle.dumps(records)
        except Exception:  # readers that cannot be sent: their bytes are, then
            records = [_held(record) for record in records]
            message = pickle.dumps(records)
        worker = self.idle.get()
        try:
            reply = worker.ask(message)
            if reply is None and not self.closed:
                log.warning("a worker died (%s): its batch is done again", worker.end())
                parts = []
                for record in records:
                    worker = worker if worker.alive() else self._another()
                    part = worker.ask(pickle.dumps([record]))
                    if part is None:
                        raise UserError(
                            f"sample '{record.key}' ({record.where}): ends the process that "
                            f"reads it ({worker.end()}); leave it out, or give the machine more "
                            "memory"
                        )
                    parts.append(_checked(part))
                reply = join_batches(parts)
            return _checked(reply)
        finally:
            self.idle.put(worker)

    def _another(self) -> Worker:
        worker = self.new()
        if worker.receive() is not True:
            raise UserError("packing: no further worker process could start; use --workers 1")
        return worker

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        self.closed = True
        for worker in self.all:
            worker.process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)
        for worker in self.all:
            worker.end()


def _checked(reply: Any) -> PreparedBatch:
    if isinstance(reply, Failure):
        said = f"sample '{reply.record.key}' ({reply.record.where}): {reply.reason}"
        raise UserError(said) if reply.mendable else RuntimeError(f"{said}\n{reply.trace}")
    if not isinstance(reply, PreparedBatch):
        raise RuntimeError("the worker was stopped")
    return reply


def _held(record: Record) -> Record:
    """The record with its bytes read."""

    def reader(read: Any) -> Any:
        try:
            return InlineBytes(read())
        except BadSample as error:
            return Unreadable(str(error))

    return record._replace(values={member: reader(read) for member, read in record.values.items()})


class Worker:
    """One process, and the pipes to it."""

    def __init__(self, payload: bytes, threads: int):
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        one = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", Work.__module__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **one},
        )
        self._send(payload)

    def _send(self, message: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it died: the answer will be missing, too
            self.process.stdin.write(len(message).to_bytes(8, "little") + message)
            self.process.stdin.flush()

    def receive(self) -> Any:
        """The next answer; None when the process is dead."""
        assert self.process.stdout is not None
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError, OSError, ValueError):
            return None

    def ask(self, message: bytes) -> Any:
        """The answer to a pickled list of records."""
        self._send(message)
        return self.receive()

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> str:
        """Wait for its end, and say how it came to it."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
