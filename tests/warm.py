"""Processes whose imports were made once: each is forked from a server that has torch and Lightning.

A fresh interpreter takes seconds of a processor for these, and many tests start several. All else is as `subprocess`
has it: a process of its own with its own files, environment, session and signals. What a fresh start or the taking
apart of an interpreter shows (imports, variables that torch reads when it is imported) needs `subprocess` itself.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.multiprocessing import start_processes

_WIDTH = 8  # bytes of a number on its way


class Popen(subprocess.Popen):
    """`subprocess.Popen([sys.executable, …])` of a script, `-c` code or `-m` module, but for what it costs to start."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        interpreter, *argv = map(os.fspath, args)
        assert interpreter == sys.executable, args
        cwd, env, pipes, is_leader = rest[4], rest[5], rest[9:15], rest[20]
        request = {"argv": argv, "cwd": os.fspath(cwd or Path.cwd()), "is_leader": bool(is_leader)}
        message = json.dumps({**request, "env": dict(os.environ if env is None else env)}).encode()
        self._status, status = os.pipe()
        with open(os.devnull, "rb") as nothing:
            given = (pipes[0], nothing.fileno()), (pipes[3], 1), (pipes[5], 2)
            files = [inherited if own == -1 else own for own, inherited in given]
            socket.send_fds(_server(), [len(message).to_bytes(_WIDTH, "big")], [*files, status])
            _server().sendall(message)
        os.close(status)
        self._close_pipe_fds(*pipes)
        self.pid = int.from_bytes(os.read(self._status, _WIDTH), "big")
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        number = os.read(self._status, _WIDTH)
        os.close(self._status)
        assert number, "the process's parent is gone"
        return self.pid, int.from_bytes(number, "big")

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(
    args: list[Any],
    *,
    check: bool = False,
    timeout: float | None = None,
    input: str | None = None,  # noqa: A002 (as subprocess has it)
    **options: Any,
) -> Any:
    """`subprocess.run(args, capture_output=True, text=True)`."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if input is not None:
        streams["stdin"] = subprocess.PIPE
    with Popen(args, **streams, **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, args, out, err)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def start_ranks(function: Any, args: tuple[Any, ...], count: int) -> Any:
    """`torch.multiprocessing.start_processes(function, args, count, join=False)`, of processes like those above."""
    start_fork_server()
    arguments = (dict(os.environ), function, args)
    return start_processes(_in_environment, arguments, count, join=False, start_method="forkserver")


def start_fork_server() -> None:
    """The one that ranks and workers of this process's loaders come from: who starts it first says what it imports, and
    what it has not, each of them imports.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded"])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of which the server of Python 3.11 takes no notice else
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


def spawn(function: Any, args: tuple[Any, ...], count: int) -> None:
    """`torch.multiprocessing.spawn(function, args, count)`."""
    ranks = start_ranks(function, args, count)
    while not ranks.join():
        pass


def _in_environment(rank: int, environment: dict[str, str], function: Any, args: tuple[Any, ...]) -> None:
    os.environ.update(environment)  # the server's is that of its start
    function(rank, *args)


@cache
def _server() -> socket.socket:
    """This process's server, which ends when its socket closes."""
    ours, theirs = socket.socketpair()
    path = os.pathsep.join(sys.path)
    with open(os.devnull, "r+b") as nothing:
        server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=nothing,
            stdout=nothing,
            start_new_session=True,
        )
    theirs.close()
    # Closing it would not do: a process that a test forked and left behind may hold it, too.
    atexit.register(lambda: (ours.shutdown(socket.SHUT_RDWR), server.wait()))
    return ours


# ---------------------------------------------------------------------------------------------------------------------
# The server


def _serve(connection: socket.socket) -> list[str]:
    """Returns what to run, in a new process for each request; in the server itself never."""
    base_path = list(sys.path)
    while True:
        size, files, _, _ = socket.recv_fds(connection, _WIDTH, 4)
        if not size:
            os._exit(0)
        request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        if not os.fork():  # waits for the process, as the one that asked can't
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            if not (pid := os.fork()):
                return _become(request, files, base_path)
            for file in files[:3]:
                os.close(file)
            os.write(files[3], pid.to_bytes(_WIDTH, "big"))
            os.write(files[3], os.waitpid(pid, 0)[1].to_bytes(_WIDTH, "big"))
            os._exit(0)
        for file in files:
            os.close(file)


def _become(request: dict[str, Any], files: list[int], base_path: list[str]) -> list[str]:
    import numpy as np
    import torch

    if request["is_leader"]:
        os.setsid()
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        stream = open(number, "w", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.stderr.reconfigure(line_buffering=True)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    script, *_ = request["argv"]
    first = {"-c": "", "-m": str(Path.cwd())}.get(script, str(Path(script).parent))
    own_path = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = list(dict.fromkeys([first, *own_path, *base_path]))
    random.seed()
    np.random.seed()  # noqa: NPY002
    torch.manual_seed(random.getrandbits(63))
    return request["argv"]


def _run(argv: list[str]) -> None:
    match argv:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.modules["__main__"] = program = ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), program.__dict__)
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case _:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")


def _end(status: int) -> None:
    """As any interpreter ends, but that nothing is taken apart of what was imported: that is half a second's work."""
    threading._shutdown()
    atexit._run_exitfuncs()
    with suppress(Exception):  # of which the interpreter knows what to say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import preloaded  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    try:
        _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
    except SystemExit as end:
        if isinstance(end.code, int | None):
            _end(end.code or 0)
        raise
    _end(0)
