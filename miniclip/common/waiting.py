"""A DataLoader whose waits end: with a batch, with a signal, or with an error that names the likely cause."""

from __future__ import annotations

import atexit
import errno
import gc
import multiprocessing
import multiprocessing.process
import multiprocessing.queues
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from .storage import without_secrets
from .wording import reason_of

T_co = TypeVar("T_co", covariant=True)

_POLL_S = 0.5
_IDLE_TICKS, _IDLE_BYTES = 10, 1 << 16  # what an idle worker may use of the processor and read in `patience_s`
_UNFORKABLE = ("lancedb",)  # libraries whose threads hold locks that a forked child would wait for
_SHARED_MEMORY = re.compile(r"No space left|Bus error|SIGBUS|shared memory|torch_shm|</torch_", re.IGNORECASE)
_TORCHS_MEMORY = re.compile(r"shared memory\(shm\)|</torch_")
_OPEN_FILES = re.compile(r"Too many open files|ancdata|Errno 24", re.IGNORECASE)


class StalledDataError(ValueError):
    """The next batch will not come. Training is between two steps when this is raised."""


class PatientLoader(DataLoader[T_co]):
    """A DataLoader that waits with open eyes.

    Batches are fetched in a thread, so that the main thread hears signals, sees workers that died, and notices when
    nothing moves any more. Workers leave signals to the process that they work for, and end with it.

    Raises, while it is iterated:
        StalledDataError: a worker died or could not hand its batch over, or none has done anything for `patience_s`.
    """

    waited_s = 0.0  # for batches, in all
    silence_s = 60.0  # without a batch, after which a line is printed; and again each time the wait doubles
    patience_s = 300.0  # without a batch and without any work of the workers
    while_waiting: Callable[[float], None] | None = None  # called with the seconds; what it raises ends the wait

    def __init__(self, dataset: Any, *args: Any, **options: Any) -> None:
        self._failures: Any = None
        if options.get("num_workers"):
            asked_for = options.get("multiprocessing_context")
            context = multiprocessing.get_context(asked_for) if isinstance(asked_for, str) else asked_for
            context = options["multiprocessing_context"] = context or _worker_context()
            self._failures = context.SimpleQueue()
            options["worker_init_fn"] = partial(_start_worker, self._failures, dict(os.environ))
        super().__init__(dataset, *args, **options)

    def needed(self) -> str:
        """What the next batch is made of, for messages."""
        return "more data"

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        begin_anew = super().__iter__
        if self._iterator is None:  # the main thread starts the workers
            batches = begin_anew()
            _hide_from_torch(batches)
            fetcher = _Fetcher(lambda: batches, batches)
            atexit.register(_end_stuck, fetcher.workers)
        else:  # workers that persist are asked to begin anew, which may take as long as a batch
            fetcher = _Fetcher(begin_anew, self._iterator)
        atexit.register(fetcher.close)  # for what nobody closes, as where an interrupt comes between two batches
        longest = 0.0
        is_sound = False
        try:
            while True:
                begin = time.perf_counter()
                fetcher.ask()
                batch = self._wait(fetcher, max(self.silence_s, 2 * longest))
                seconds = time.perf_counter() - begin
                self.waited_s += seconds
                longest = max(longest, seconds)
                if batch is None:
                    is_sound = True
                    return
                yield batch
        except GeneratorExit:
            is_sound = True
            raise
        finally:
            if not is_sound:
                _end(fetcher.workers)
            fetcher.close()
            atexit.unregister(fetcher.close)

    def _wait(self, fetcher: _Fetcher, silence_s: float) -> Any:
        # Seconds are counted by polls: a process that was stopped for an hour has not waited for an hour.
        waited, last = 0.0, time.monotonic()
        activity = _Activity(fetcher)
        while True:
            try:
                return fetcher.get(_POLL_S)
            except queue.Empty:
                pass
            except Exception as error:
                raise self._explained(error, fetcher) from error
            now = time.monotonic()
            waited, last = waited + min(now - last, 2 * _POLL_S), now
            if self.while_waiting is not None:
                self.while_waiting(waited)
            if failure := self._failure(fetcher):
                raise failure
            if waited >= silence_s:
                print(
                    f"No batch has come for {waited:.0f} s. The next one needs {without_secrets(self.needed())}.",
                    file=sys.stderr,
                )
                silence_s = 2 * waited
            if activity.idle_s(waited) >= self.patience_s:
                raise StalledDataError(
                    f"no batch has come for {waited:.0f} s, and nothing was read meanwhile: {activity.states()}. "
                    f"The next batch needs {without_secrets(self.needed())}"
                )

    def _failure(self, fetcher: _Fetcher) -> StalledDataError | None:
        """What became of a worker: what it reported before it ended, or how it ended."""
        dead = [worker.exitcode for worker in fetcher.workers if worker.exitcode]
        if self._failures is not None and not self._failures.empty():
            what = f"a worker could not hand its batch over: {self._failures.get()}"
        elif dead:
            what = f"a worker that reads data {_how_it_ended(dead[0])}"
        else:
            return None
        return StalledDataError(self._diagnosis(what))

    def _explained(self, error: Exception, fetcher: _Fetcher) -> Exception:
        """A failure of the loader's own machinery as a StalledDataError; what the data raised stays as it is."""
        is_cut_off = isinstance(error, EOFError | ConnectionError)
        end = time.monotonic() + (2.0 if is_cut_off else 0.0)  # why the worker is gone may come later than that it is
        while not (failure := self._failure(fetcher)) and time.monotonic() < end:
            time.sleep(0.05)
        if failure or is_cut_off:
            broke = f"the connection to a worker that reads data broke ({reason_of(error)}), "
            broke += "most often by too many open files"
            return failure or StalledDataError(self._diagnosis(broke))
        if _OPEN_FILES.search(str(error)) or _TORCHS_MEMORY.search(str(error)):
            return StalledDataError(self._diagnosis(str(error).strip().rpartition("\n")[2]))
        return error

    def _diagnosis(self, what: str) -> str:
        if _OPEN_FILES.search(what):  # of shared memory, too
            return f"{what}. This process may have {_open_files_limit()} files open; raise that with `ulimit -n 4096`"
        if _SHARED_MEMORY.search(what):
            return f"{what}. {_shared_memory()}"
        if "SIGKILL" in what:
            return f"{what}: by hand, or by the system because memory ran out (fewer workers need less of it)"
        return what


# ---------------------------------------------------------------------------------------------------------------------
# This process


class _Fetcher:
    """Asks an iterator for its values in a thread, which may be blocked in it for good."""

    def __init__(self, begin: Callable[[], Iterator[Any]], owner: Any) -> None:
        self.workers: list[Any] = list(getattr(owner, "_workers", []))
        self._begin = begin
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        batches = None
        while self._asked.get():
            try:
                batches = self._begin() if batches is None else batches
                self._found.put((next(batches, None), None))
            except BaseException as error:
                self._found.put((None, error))

    def ask(self) -> None:
        self._asked.put(True)

    def get(self, timeout_s: float) -> Any:
        value, error = self._found.get(timeout=timeout_s)
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Has the thread end, which takes a second at most. A thread that frees tensors while the interpreter exits
        aborts the process: PyTorch asks for the interpreter's lock in destructors, and gets an end of the thread."""
        self._asked.put(False)
        if threading.current_thread() is not self.thread:
            self.thread.join(timeout=1)


def _hide_from_torch(batches: Any) -> None:
    """Who waits here looks after the workers. Torch's handler of SIGCHLD, which any loader of the process may have
    installed, raises at an arbitrary line when a worker dies that it knows of."""
    if getattr(batches, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]
        batches._worker_pids_set = False


def _end(workers: list[Any]) -> None:
    """Kills workers that may be stopped or wait for a dead disk, and does not wait for those that can't die."""
    for worker in workers:
        worker.kill()
    end = time.monotonic() + 5
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
        if worker.is_alive():  # else the interpreter would wait for it when it exits
            multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


def _end_stuck(workers: list[Any]) -> None:
    """Before the interpreter exits, which would wait for workers that do not hear its SIGTERM."""
    _end([worker for worker in workers if worker.is_alive() and _usage(Path(f"/proc/{worker.pid}"))[2] in "TtD"])


# ---------------------------------------------------------------------------------------------------------------------
# What is likely


class _Activity:
    """When the readers last did something: the workers, or the thread that reads where there are none."""

    def __init__(self, fetcher: _Fetcher) -> None:
        if fetcher.workers:
            self.tasks = {worker.pid: Path(f"/proc/{worker.pid}") for worker in fetcher.workers}
        else:
            self.tasks = {os.getpid(): Path(f"/proc/{os.getpid()}/task/{fetcher.thread.native_id}")}
        self._before: dict[int, tuple[int, int, str]] = {}
        self._since = 0.0

    def idle_s(self, waited: float) -> float:
        """Seconds of `waited` in which no reader ran, wanted to, or read. Without /proc, a sixth of them."""
        now = {pid: _usage(task) for pid, task in self.tasks.items()}
        if not any(ticks >= 0 for ticks, _, _ in now.values()):
            return waited / 6
        moved = not self._before or any(  # "R": it runs, or would if the processor were free
            state == "R" or ticks - self._before[pid][0] > _IDLE_TICKS or size - self._before[pid][1] > _IDLE_BYTES
            for pid, (ticks, size, state) in now.items()
        )
        if moved:
            self._before, self._since = now, waited
        return waited - self._since

    def states(self) -> str:
        meanings = {
            "T": "is stopped (`kill -CONT {pid}` lets it go on)",
            "t": "is held by a debugger",
            "D": "waits for a disk that does not answer (is a network mount gone?)",
            "S": "sleeps",
            "R": "runs",
        }
        who = "worker" if len(self.tasks) > 1 or os.getpid() not in self.tasks else "process"
        found = [(pid, meanings.get(_usage(task)[2], "is gone")) for pid, task in self.tasks.items()]
        found.sort(key=lambda each: each[1] == meanings["S"])  # what explains the wait comes first
        return ", ".join(f"{who} {pid} {meaning.format(pid=pid)}" for pid, meaning in found[:4])


def _usage(task: Path) -> tuple[int, int, str]:
    """Ticks of processor time, bytes read, and the state of a process or thread; -1, 0, "" where it can't be seen."""
    try:
        fields = (task / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1, 0, ""
    try:
        size = int((task / "io").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        size = 0
    return int(fields[11]) + int(fields[12]), size, fields[0]


def _shared_memory() -> str:
    remedy = "Raise it (docker run --shm-size=2g, or --ipc=host), or read with fewer workers or none"
    try:
        disk = shutil.disk_usage("/dev/shm")
    except OSError:
        return f"Workers hand batches over in shared memory, which is too small. {remedy}"
    return (
        f"Workers hand batches over in shared memory, /dev/shm, which has {disk.total / 1e6:,.0f} MB, "
        f"{disk.free / 1e6:,.0f} of them free. {remedy}"
    )


def _open_files_limit() -> str:
    try:
        import resource
    except ImportError:
        return "only so many"
    return f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}"


def _how_it_ended(code: int) -> str:
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended with status {code}"


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def _worker_context() -> Any:
    """How workers start: as elsewhere, but never as forks of a process with threads that a fork breaks."""
    if multiprocessing.get_start_method() != "fork" or not any(name in sys.modules for name in _UNFORKABLE):
        return multiprocessing.get_context()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.data"])
    return context


def _start_worker(failures: Any, environment: dict[str, str], worker: int) -> None:
    """Ctrl-C reaches every process of the terminal's group, and SLURM's signals every process of the job; the process
    that the workers work for alone decides what they mean.

    In a group of their own the workers do not hear Ctrl-C. They end by a SIGTERM of that process, or when it is gone.
    A fork server hands its own environment on, as old as itself; `environment` is that of the workers' process.
    """
    del worker
    gc.freeze()  # a collection through what a forked worker shares would copy it, 100 MB a worker
    os.environ.clear()
    os.environ.update(environment)

    def hand_over_failed(self: Any, error: BaseException, batch: Any) -> None:
        del self, batch
        failures.put(f"{type(error).__name__}: {error}")
        os._exit(1)

    def serving_failed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            hand_over_failed(None, error, None)
        sys.__excepthook__(kind, error, trace)

    # The thread that sends batches would print the error, lose the batch, and go on.
    multiprocessing.queues.Queue._on_queue_feeder_error = hand_over_failed  # type: ignore[attr-defined]
    # The thread that hands over shared memory's files prints an error and tries again without end.
    sys.excepthook = serving_failed
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    can_ask_who = hasattr(signal, "sigtimedwait")  # not on macOS and Windows, which have no SLURM either
    if can_ask_who:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(can_ask_who,), daemon=True).start()


def _end_with_parent(can_ask_who: bool) -> None:
    # Under forkserver, the parent by the system's account is the fork server.
    master = multiprocessing.parent_process()
    parent = os.getppid()
    pid = parent if master is None else master.pid
    while os.getppid() == parent and (master is None or master.is_alive()):
        if not can_ask_who:
            time.sleep(1.0)
        elif (info := signal.sigtimedwait({signal.SIGTERM}, 1.0)) is not None and info.si_pid == pid:
            os._exit(0)
    os._exit(1)
