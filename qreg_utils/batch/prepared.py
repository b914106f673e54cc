"""Processes that start at once: forked from a server, which has imported what every notebook imports.

Importing PyTorch, pandas and their like takes most of the ten seconds between the start of an experiment and its first
epoch. A batch on one machine therefore starts a *server* (``start_server``), and each notebook, and each notebook's
kernel, is a fork of it (``Forked``). The server imports packages (and of this project what the batch itself is made
of), nothing of a user's, and computes nothing: a fork is as clean as a new process, and reads the code of science as it
is then.

Every fork has a connection to the process that asked for it. It ends when that process does, however that ends; and
the server ends with its batch. Where there is no server, or it does not answer, processes start as they always do. On
GPUs (CUDA cannot be forked) and outside of Linux there is none.
"""

import ctypes
import importlib
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

ADDRESS = "QREG_PREPARED"  # the environment variable that names the server's socket
PACKAGES = ("torch", "torch._dynamo", "pandas", "scipy.stats", "seaborn", "sklearn.datasets", "papermill.cli")
PACKAGES += ("nbconvert.exporters", "ipykernel.kernelapp")
NAMES = {"notebook": b"qreg-notebook", "kernel": b"qreg-kernel", "server": b"qreg-server"}  # at most 15 characters
GRACE_SECONDS = 20.0  # for a notebook whose client is gone to end its kernel
POLL_SECONDS = 0.05
UNKNOWN_STATUS = 1  # of a process that has ended without telling


# --- for who wants a process ------------------------------------------------------------------------------------------


def start_server(settings: dict[str, str]) -> subprocess.Popen | None:
    """Start a server that lives as long as this process; ``settings`` are environment variables of its forks.

    From now on ``os.environ`` names it, for the processes that this one starts. None where there can be none, or where
    ``os.environ`` names one already, which then serves this process too.
    """
    if sys.platform != "linux" or os.environ.get(ADDRESS):
        return None
    folder = Path(tempfile.mkdtemp(prefix="qreg-"))
    (folder / "matplotlibrc").touch()  # a user's is not read
    address = str(folder / "socket")
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(address)
        listener.listen(64)
        environment = {**os.environ, **settings, "MATPLOTLIBRC": str(folder / "matplotlibrc")}
        command = [sys.executable, "-m", "qreg_utils.batch.prepared", str(listener.fileno()), str(folder)]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "start_new_session": True}
        server = subprocess.Popen(command, env=environment, pass_fds=[listener.fileno()], **options)
    except OSError:  # a name that is too long for a socket, no processes left
        shutil.rmtree(folder, ignore_errors=True)
        return None
    finally:
        listener.close()
    os.environ[ADDRESS] = address
    return server


class Forked:
    """A process that the server forks for this one: what ``subprocess.Popen`` would be. It ends when this one does."""

    stdin = stdout = stderr = None
    returncode: int | None = None

    def __init__(self, kind: str, arguments: list[str], environment: dict[str, str], files: list[int]):
        """``kind`` is "notebook" or "kernel"; ``files`` become standard input, output and error. Raises OSError where
        no server answers."""
        request = {"kind": kind, "arguments": arguments, "environment": environment, "folder": os.getcwd()}
        content = json.dumps(request).encode()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(os.environ[ADDRESS])
        socket.send_fds(self._connection, [struct.pack("!I", len(content))], files)
        self._connection.sendall(content)
        self.pid = self._number()
        if self.pid is None:
            raise OSError("the server has ended")

    def _number(self) -> int | None:
        """The next number that the other side sends; None if there is none."""
        data = self._connection.recv(4)
        return struct.unpack("!i", data)[0] if len(data) == 4 else None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            status = self._number()
            self.returncode = UNKNOWN_STATUS if status is None else status
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forked(kind: str, arguments: list[str], environment: dict[str, str], files: list[int]) -> Forked | None:
    """A ``Forked``; None where there is no server that answers."""
    if ADDRESS not in os.environ:
        return None
    try:
        return Forked(kind, arguments, environment, files)
    except OSError:
        return None


# --- the server -------------------------------------------------------------------------------------------------------


def serve(listener: socket.socket, folder: Path) -> None:
    """Fork for whoever asks, until standard input ends, which is the batch's end of a pipe."""
    _call_it("server")
    sys.modules.setdefault("rfc3987_syntax", None)  # see notebooks.execute_notebook
    for package in PACKAGES:
        importlib.import_module(package)
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], POLL_SECONDS if children else None)
        if listener in ready:
            connection, _ = listener.accept()
            with suppress(OSError):  # a client that is gone already
                _fork(connection, listener, children)
        if sys.stdin in ready:
            break
        _report_ends(children)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # at once: PyTorch takes a second to leave


def _fork(connection: socket.socket, listener: socket.socket, children: dict[int, socket.socket]) -> None:
    connection.settimeout(10)
    header, files, _, _ = socket.recv_fds(connection, 4, 3)
    content = b""
    while len(content) < struct.unpack("!I", header)[0]:
        if not (part := connection.recv(65_536)):
            raise ConnectionError("the client has ended")
        content += part
    connection.settimeout(None)
    process = os.fork()
    if process == 0:
        for other in (listener, *children.values()):
            other.close()
        _become(json.loads(content), files, connection)
    for file in files:
        os.close(file)
    children[process] = connection
    connection.sendall(struct.pack("!i", process))


def _report_ends(children: dict[int, socket.socket]) -> None:
    """Tell the clients of processes that have ended with which status."""
    while children:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        with suppress(OSError), children.pop(process) as connection:
            connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))


# --- a fork -----------------------------------------------------------------------------------------------------------


def _become(request: dict, files: list[int], connection: socket.socket) -> None:
    """Be the process that was asked for, from its beginning to its end."""
    status = 1
    try:
        os.setsid()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        places = _python_path()
        os.environ.clear()
        os.environ.update(request["environment"] | {"JPY_PARENT_PID": str(os.getppid())})  # else ipykernel tells how
        os.chdir(request["folder"])
        _import_from_here(places)
        _call_it(request["kind"])
        _like_new()
        threading.Thread(target=_end_with, args=(connection, request["kind"]), daemon=True).start()
        status = _run(request["kind"], request["arguments"])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _python_path() -> list[str]:
    return [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]


def _import_from_here(places: list[str]) -> None:
    """Import from this folder and PYTHONPATH, as a new process would, where the server's (``places``) are others; then
    what the server has of this project may be of another copy, and goes."""
    path = [os.getcwd(), *_python_path(), *sys.path[1 + len(places) :]]
    if path == sys.path:
        return
    sys.path[:] = path
    for module in [name for name in sys.modules if name.partition(".")[0] in ("qreg_utils", "sitecustomize")]:
        del sys.modules[module]
    with suppress(ImportError):  # Python's own start does so
        importlib.import_module("sitecustomize")


def _run(kind: str, arguments: list[str]) -> int:
    if kind == "kernel":
        from ipykernel import kernelapp

        sys.argv = ["ipykernel_launcher", *arguments]
        kernelapp.launch_new_instance()
    else:
        from qreg_utils.batch import notebooks

        sys.argv = ["qreg_utils.batch.notebooks", *arguments]
        notebooks.execute(arguments)
    return 0


def _like_new() -> None:
    """Draw other random numbers than other forks, and use as many threads as the environment now says."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()  # noqa: NPY002
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


def _end_with(connection: socket.socket, kind: str) -> None:
    """End this process when the one that asked for it is gone: a notebook as by Ctrl-C, so that its kernel ends too."""
    with suppress(OSError):
        connection.recv(1)
    if kind == "notebook":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(GRACE_SECONDS)
    os._exit(UNKNOWN_STATUS)


def _call_it(kind: str) -> None:
    """The name of this process in lists of processes."""
    prctl_set_name = 15
    ctypes.CDLL(None).prctl(prctl_set_name, NAMES[kind], 0, 0, 0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
