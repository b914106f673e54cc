"""Prepared processes are as clean as new ones, end with who asked for them, and nobody depends on them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from qreg_utils.batch import prepared
from qreg_utils.batch.running import KERNEL_SETTINGS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are none outside of Linux")
CLIENT = [sys.executable, "-m", "qreg_utils.batch.notebooks"]
SEEN = """
import os, random, sys
import numpy, torch
modules = sorted(name for name in sys.modules if name.startswith("qreg_utils."))
print([os.environ.get("WORD"), os.getcwd(), torch.get_num_threads(), random.random(), numpy.random.rand(), modules])
"""


@pytest.fixture(scope="module")
def server():
    """A server, and the environment in which it is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(prepared.ADDRESS, "")
        process = prepared.start_server(KERNEL_SETTINGS)
        yield process, dict(os.environ)
        process.stdin.close()
        assert process.wait(timeout=30) == 0
        assert not Path(os.environ[prepared.ADDRESS]).parent.exists()


def notebook(folder, *cells):
    source = folder / "source.ipynb"
    folder.mkdir(exist_ok=True)
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel)
    nbformat.write(made, source)
    return [str(source), str(folder / "executed.ipynb")]


def start(arguments, environment, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT} | options
    return subprocess.Popen([*CLIENT, *arguments], env=environment, **options)


def run(arguments, environment):
    process = start(arguments, environment)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def printed(folder):
    (cell,) = nbformat.read(folder / "executed.ipynb", as_version=4).cells
    return eval(cell.outputs[0].text)


def forks(server, name):
    children = psutil.Process(server.pid).children()
    return [child for child in children if child.name() == prepared.NAMES[name].decode()]


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it does not come to that"
        time.sleep(0.05)


def test_a_notebook_has_its_clients_environment_and_nothing_of_another(server, tmp_path):
    process, environment = server
    seen = []
    for word, threads in (("one", "1"), ("two", "2")):
        arguments = notebook(tmp_path / word, SEEN)
        status, said = run(arguments, environment | {"WORD": word, "OMP_NUM_THREADS": threads})
        assert status == 0, said
        seen.append(printed(tmp_path / word))
    assert [values[:3] for values in seen] == [["one", str(ROOT), 1], ["two", str(ROOT), 2]]
    assert seen[0][3] != seen[1][3] and seen[0][4] != seen[1][4], "they draw the same random numbers"
    plumbing = re.compile(r"qreg_utils\.(batch(\.\w+)?|atomic|progress)")  # which papermill's engine is made of
    assert all(plumbing.fullmatch(name) for *_, modules in seen for name in modules), "code of science"
    wait_for(lambda: not psutil.Process(process.pid).children())


def test_a_notebook_of_another_copy_of_the_project_imports_that(server, tmp_path):
    """And what lies in its PYTHONPATH, as in a new process."""
    _, environment = server
    elsewhere, extras = tmp_path / "elsewhere", tmp_path / "extras"
    without_caches = shutil.ignore_patterns("__pycache__")
    copied = shutil.copytree(ROOT / "qreg_utils", elsewhere / "qreg_utils", ignore=without_caches)
    (copied / "names.py").write_text("HERE = 'in the copy'")
    extras.mkdir()
    (extras / "my_parts.py").write_text("HERE = 'in PYTHONPATH'")
    cell = "import my_parts, qreg_utils, qreg_utils.names\nprint([my_parts.HERE, qreg_utils.names.HERE])"
    arguments = notebook(tmp_path, cell)
    client = start(arguments, environment | {"PYTHONPATH": f"{elsewhere}{os.pathsep}{extras}"}, cwd=elsewhere)
    said, _ = client.communicate(timeout=120)
    assert client.returncode == 0, said
    assert printed(tmp_path) == ["in PYTHONPATH", "in the copy"]


def test_one_server_serves_the_batches_of_who_has_started_it(server, monkeypatch):
    _, environment = server
    monkeypatch.setenv(prepared.ADDRESS, environment[prepared.ADDRESS])
    assert prepared.start_server(KERNEL_SETTINGS) is None


def test_what_goes_wrong_in_a_notebook_is_told_as_ever(server, tmp_path):
    _, environment = server
    status, said = run(notebook(tmp_path / "a", "1 / 0"), environment)
    plain_status, plain = run(notebook(tmp_path / "b", "1 / 0"), environment | {prepared.ADDRESS: "/no/such/socket"})
    assert status == plain_status == 1
    assert said.split()[-4:] == plain.split()[-4:] == ["ZeroDivisionError:", "division", "by", "zero"]
    status, said = run(["--help"], environment)
    assert status == 0 and "usage: qreg_utils.batch.notebooks" in said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_fork_ends_with_the_process_that_asked_for_it(server, tmp_path, number):
    process, environment = server
    client = start(notebook(tmp_path, "import time; time.sleep(300)"), environment, preexec_fn=default_interrupt)
    wait_for(lambda: forks(process, "kernel"))
    kernel, runner = forks(process, "kernel")[0], forks(process, "notebook")[0]
    client.send_signal(number)
    assert client.wait(timeout=60) != 0
    wait_for(lambda: not (kernel.is_running() or runner.is_running()))
    assert not (tmp_path / "executed.ipynb").exists()


def default_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_killed_kernel_is_reported(server, tmp_path):
    process, environment = server
    client = start(
        notebook(tmp_path, f"open({str(tmp_path / 'begun')!r}, 'w'); import time; time.sleep(300)"), environment
    )
    wait_for((tmp_path / "begun").exists)
    forks(process, "kernel")[0].kill()
    said, _ = client.communicate(timeout=60)
    assert client.returncode == 1 and "the notebook's kernel was killed" in said


def test_without_a_server_that_answers_a_notebook_runs_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv(prepared.ADDRESS, str(tmp_path / "nobody"))
    assert prepared.forked("notebook", [], {}, [0, 1, 2]) is None
    monkeypatch.delenv(prepared.ADDRESS)
    assert prepared.forked("notebook", [], {}, [0, 1, 2]) is None


def test_a_server_ends_with_the_process_that_started_it():
    code = f"from qreg_utils.batch import prepared; print(prepared.start_server({KERNEL_SETTINGS}).pid, flush=True)"
    code += "; import time; time.sleep(300)"
    environment = {**os.environ, prepared.ADDRESS: ""}
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    batch = subprocess.Popen([sys.executable, "-c", code], **options)
    server = psutil.Process(int(batch.stdout.readline()))
    batch.kill()
    batch.wait()
    wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
