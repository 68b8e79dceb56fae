"""Processes that begin where torch and the package are imported: forked from one that did nothing but import them.

The one forked from runs this file. What is forked ends as any Python does (tracebacks, exit statuses, `atexit`), but
does not take apart what is imported, which would take seconds. For what is not about starting and importing, of which
a process of its own is the test; ranks too, without torchrun: `Ranks`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from select import select

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asked otherwise, a GPU cannot be used behind a fork
}
OTHERS = ("transformers", "sklearn.feature_extraction.text", "nltk", "matplotlib.figure", "torch.distributed")
LONGEST = 300  # seconds, after which a process hangs


class Forked:
    """A process, as `subprocess.Popen` has it. run: a script's path and its arguments, or "-m" and a module's.

    errors: stderr is kept for `communicate`; limits: those of `resource`; environment: added to this process's.
    Ctrl-C reaches it, whether this process hears any or not.
    """

    def __init__(
        self,
        run: Sequence[str],
        folder: Path,
        errors: bool = False,
        limits: dict[int, int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        asked = (list(run), str(folder), environment, list((limits or {}).items()))
        stdout, end = os.pipe()
        stderr, ended = os.pipe() if errors else (None, os.dup(2))
        self._told, tell = os.pipe()
        self.stdout = open(stdout, "rb", 0)  # noqa: SIM115
        self._stderr = None if stderr is None else open(stderr, "rb", 0)  # noqa: SIM115
        server, _ = _server()
        socket.send_fds(server, [f"{json.dumps(asked)}\n".encode()], [end, ended, tell])
        for fd in (end, ended, tell):
            os.close(fd)
        self.pid = self._hear(LONGEST)
        if self.pid is None:
            raise TimeoutError(f"no process could be forked in {LONGEST} s")

    def _hear(self, seconds: float | None) -> int | None:
        """What is told next: the process id, then the status; None: nothing within so many seconds."""
        if not select([self._told], [], [], seconds)[0]:
            return None
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._told, 1)
            if not byte:
                raise RuntimeError("the process that others are forked from has ended: what it said is above")
            line += byte
        return int(line)

    def poll(self) -> int | None:
        return self.wait(0)

    def wait(self, seconds: float = LONGEST) -> int | None:
        """Its status; None where it still runs."""
        if self.returncode is None:
            self.returncode = self._hear(seconds)
            if self.returncode is not None:
                os.close(self._told)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[bytes, bytes | None]:
        """All it writes from here on, and its errors where they are kept; it is killed where it comes to no end."""
        until = time.monotonic() + LONGEST
        said = {stream: b"" for stream in (self.stdout, self._stderr) if stream}
        while writing := [stream for stream in said if not stream.closed]:
            ready = select(writing, [], [], max(0.0, until - time.monotonic()))[0]
            if not ready:
                break
            for stream in ready:
                more = stream.read(1 << 16)
                said[stream] += more
                if not more:
                    stream.close()
        status = self.wait(max(0.0, until - time.monotonic()))
        self.kill()
        if status is None:
            raise TimeoutError(f"a process did not end in {LONGEST} s: {list(said.values())}")
        return said[self.stdout], said.get(self._stderr)


class Ranks:
    """So many processes with what torchrun gives its ranks; where one fails, the others are ended."""

    def __init__(self, run: Sequence[str], folder: Path, count: int = 2) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a free port
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        each = [common | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]
        self.processes = [Forked(run, folder, environment=its) for its in each]
        self.returncode: int | None = None

    def communicate(self) -> None:
        until = time.monotonic() + LONGEST
        while time.monotonic() < until:
            statuses = [process.poll() for process in self.processes]
            if any(statuses) or None not in statuses:
                break
            time.sleep(0.005)
        else:
            statuses = [None]
        for process in self.processes:
            process.kill()
            process.communicate()
        if None in statuses and not any(statuses):
            raise TimeoutError(f"the ranks did not end in {LONGEST} s")
        self.returncode = next((status for status in statuses if status), 0)


def knowedit(*arguments: str, cwd: Path, limits: dict[int, int] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m knowedit_ext` with these arguments."""
    process = Forked(["-m", "knowedit_ext", *arguments], cwd, errors=True, limits=limits)
    stdout, stderr = (said.decode() for said in process.communicate())
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


@cache
def _server() -> tuple[socket.socket, subprocess.Popen]:
    """To the process forked from, of which there is one for this process; it ends, with all it forked, as this does."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, __file__, str(its.fileno()), *sys.path]
    common = dict(stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **ENVIRONMENT})
    process = subprocess.Popen(command, pass_fds=[its.fileno()], **common)
    its.close()
    return ours, process


def _serve(channel: socket.socket) -> list[str]:
    """Forks for what comes through the channel. Returns in what is forked: what it has to run."""
    while True:
        message, fds, *_ = socket.recv_fds(channel, 1 << 16, 3)
        while message and not message.endswith(b"\n"):
            message += channel.recv(1 << 16)
        if not message:
            os.killpg(0, signal.SIGKILL)
        if not os.fork():
            run, folder, environment, limits = json.loads(message)
            _tell(*fds)
            channel.close()
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for what, most in limits:
                resource.setrlimit(what, (most, most))
            return run
        for fd in fds:
            os.close(fd)


def _tell(stdout: int, stderr: int, told: int) -> None:
    """Fork once more, and stay behind to tell how that one ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        os.close(stdout)
        os.close(stderr)
        os.write(told, f"{pid}\n".encode())
        os.write(told, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
        os._exit(0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for fd in (stdout, stderr, told):
        os.close(fd)


def _import_everything() -> None:
    for name in OTHERS:
        with suppress(ImportError):  # what only some of the work needs
            import_module(name)
    package = import_module("knowedit_ext")
    for module in walk_packages(package.__path__, "knowedit_ext."):
        if not module.name.startswith("knowedit_ext.compat") and "__main__" not in module.name:
            import_module(module.name)


def _run(what: list[str]) -> int:
    """Its exit status."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # no two draw the same
    try:
        if what[0] == "-m":
            sys.argv = what[1:]
            runpy.run_module(what[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = what
            runpy.run_path(what[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        if end.code is not None:
            print(end.code, file=sys.stderr)
        return int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    door = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = sys.argv[2:]
    _import_everything()
    if os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("importing has started threads, which a fork would lose")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # what is here stays, and its pages stay shared
    status = _run(_serve(door))
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
