# A loader's waits, with real workers that are stopped, killed, cut off from shared memory or from files.

import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from miniclip.common.waiting import PatientLoader, StalledDataError


class Numbers:
    """Batches of one number; what `act` does at a number happens in the worker that reads it."""

    def __init__(self, act=id, size=1):
        self.act, self.size = act, size

    def __len__(self):
        return 8

    def __getitem__(self, number):
        self.act(number)
        return torch.full((self.size,), float(number))


def loader(act=id, workers=2, patience_s=1.0, size=1):
    made = PatientLoader(
        Numbers(act, size), 1, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    made.patience_s = patience_s
    return made


def numbers(batches):
    return [int(batch[0, 0]) for batch in batches]


def at(number, action):
    return lambda found: action() if found == number else None


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_again_and_again(workers):
    batches = loader(workers=workers)
    assert numbers(batches) == list(range(8))
    assert numbers(batches) == list(range(8))
    assert next(iter(batches)) == torch.zeros(1, 1)


class Variable:
    """Batches of the number that a variable of the environment holds where they are read."""

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return torch.full((1,), float(os.environ["NUMBER"]))


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_have_the_environment_of_the_process_that_they_work_for(start, monkeypatch):
    """A fork server, which is started once, has the first one's."""
    for number in (3, 5):
        monkeypatch.setenv("NUMBER", str(number))
        assert numbers(PatientLoader(Variable(), 1, num_workers=1, multiprocessing_context=start)) == [number] * 2


class Lengths(list):
    """The one batch is the list's length where it is read."""

    def __len__(self):
        return 1

    def __getitem__(self, _):
        return super().__len__()


def test_collections_in_a_worker_leave_alone_what_it_shares(monkeypatch):
    spared = Lengths()
    monkeypatch.setattr(gc, "freeze", lambda: spared.append(gc.isenabled()))
    found = next(iter(PatientLoader(spared, None, num_workers=1, multiprocessing_context="fork")))
    assert int(found) == 1  # there, and in this process never
    assert not list.__len__(spared)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_stays_what_it_is(workers):
    def fail():
        raise KeyError("no such sample")

    with pytest.raises(KeyError, match="no such sample"):
        numbers(loader(at(3, fail), workers))


@pytest.fixture
def no_workers_left():
    """Afterwards none of the test's own workers is there; those of other tests of this process may be."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before  # or this process could not end


def test_a_worker_that_is_killed_ends_the_wait_with_the_signal_and_the_likely_cause(no_workers_left):
    with pytest.raises(StalledDataError, match=r"killed by SIGKILL.*memory ran out"):
        numbers(loader(at(3, lambda: os.kill(os.getpid(), signal.SIGKILL))))


@pytest.fixture
def watched_by_torch():
    """Another loader has worked in this process, and torch raises where the main thread is when a worker dies."""
    signal_handling._SIGCHLD_handler_set = False
    before = signal.getsignal(signal.SIGCHLD)
    list(DataLoader(range(1), num_workers=1, multiprocessing_context="fork"))
    assert signal.getsignal(signal.SIGCHLD) is not before
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.long
@pytest.mark.usefixtures("watched_by_torch")
def test_workers_that_die_or_are_ended_raise_nothing_by_torchs_handler(no_workers_left):
    for _ in range(3):
        with pytest.raises(StalledDataError, match=r"killed by SIGKILL.*memory ran out"):
            numbers(loader(at(3, lambda: os.kill(os.getpid(), signal.SIGKILL))))
        with pytest.raises(StalledDataError, match=r"worker (\d+) is stopped"):
            numbers(loader(at(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))))


def test_a_worker_that_is_stopped_ends_the_wait_with_its_number_and_the_remedy(no_workers_left):
    with pytest.raises(StalledDataError, match=r"worker (\d+) is stopped \(`kill -CONT \1` lets it go on\)"):
        numbers(loader(at(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))))


def test_a_worker_that_goes_on_in_time_is_waited_for(tmp_path):
    def stop():
        if os.fork() == 0:  # who lets it go on
            time.sleep(1.0)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)

    assert numbers(loader(at(3, stop), patience_s=20)) == list(range(8))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_nobody_answers_for_ends_the_wait(tmp_path, workers):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StalledDataError, match=r"nothing was read meanwhile: .* sleeps\. The next batch needs"):
        numbers(loader(at(3, (tmp_path / "pipe").read_bytes), workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_work_that_takes_long_is_waited_for(workers):
    def work():
        end = time.monotonic() + 3
        while time.monotonic() < end:
            pass

    assert numbers(loader(at(3, work), workers, patience_s=1.5)) == list(range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_who_waits_is_asked_meanwhile_and_may_end_it(tmp_path, workers):
    os.mkfifo(tmp_path / "pipe")
    batches = loader(at(3, (tmp_path / "pipe").read_bytes), workers, patience_s=60)

    def enough(seconds):
        raise InterruptedError(f"after {seconds:.1f} s")

    batches.while_waiting = enough
    with pytest.raises(InterruptedError, match=r"after [01]\.\d s"):
        numbers(batches)


def test_too_few_open_files_end_the_wait_with_the_limit_and_the_remedy():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def use_all():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
        with contextlib.suppress(OSError):  # however many are open already
            while True:
                held.append(os.dup(0))

    held = []
    with pytest.raises(StalledDataError, match=r"[Tt]oo many open files.* ([\d,]+) files open; .*`ulimit -n"):
        numbers(loader(at(3, use_all), 1, patience_s=20))
    torchs = "unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)"
    found = loader(at(3, use_all), 0)._diagnosis(torchs)
    assert "raise that with `ulimit -n 4096`" in found
    assert "/dev/shm" not in found


SMALL = """
import sys
sys.path.insert(0, sys.argv[1])
from test_waiting import loader, numbers
try:
    numbers(loader(size=1_000_000))
except ValueError as error:
    print(error)
"""


def test_shared_memory_that_is_too_small_ends_the_wait_with_its_size_and_the_remedy(tmp_path):
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=3m none /dev/shm && exec "$@"', "-"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a small /dev/shm")
    command = [*mount, sys.executable, "-c", SMALL, str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "/dev/shm, which has 3 MB" in run.stdout, run.stdout + run.stderr
    assert "--shm-size" in run.stdout
    assert run.returncode == 0


WORKING = """
import multiprocessing, sys, time
sys.path.insert(0, sys.argv[2])
from miniclip.common.waiting import PatientLoader
from test_waiting import Numbers
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    batches = iter(PatientLoader(Numbers(), 1, num_workers=2, persistent_workers=True))
    next(batches)
    print("pids", *[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[3] == "stays":
        time.sleep(100)
"""


INTERRUPTED = """
import atexit, sys, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate() if thread.name == "batches"]))
sys.path.insert(0, sys.argv[1])
from miniclip.common.waiting import PatientLoader
from test_waiting import Numbers
for batch in PatientLoader(Numbers(), 1, num_workers=int(sys.argv[2])):
    raise KeyboardInterrupt  # in the loop's body; the traceback keeps the loop's iterator
"""


@pytest.mark.sample(1)
@pytest.mark.parametrize("workers", [0, 2])
def test_no_thread_holds_tensors_when_the_interpreter_exits(workers):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(Path(__file__).parent), str(workers)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[]\n"
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert done.returncode == -signal.SIGINT  # and no SIGABRT


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SOME_ENDS = [("fork", "returns"), ("forkserver", "stays")]
OTHER_ENDS = [("fork", "stays"), ("forkserver", "returns"), ("spawn", "stays"), ("spawn", "returns")]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "method, end", [*SOME_ENDS, *(pytest.param(*each, marks=pytest.mark.long) for each in OTHER_ENDS)]
)
def test_workers_end_with_the_process_that_they_work_for(tmp_path, method, end):
    script = tmp_path / "script.py"
    script.write_text(WORKING)
    command = [sys.executable, script, method, str(Path(__file__).parent), end]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline().split()
    assert line[0] == "pids"
    assert len(line) == 3
    if end == "stays":
        process.kill()
    assert process.wait(300) == (0 if end == "returns" else -signal.SIGKILL)
    deadline = time.monotonic() + 300
    while any(is_alive(pid) for pid in line[1:]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
