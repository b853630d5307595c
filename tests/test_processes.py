"""Processes and threads around the kernels: imports, forks, workers, many threads, exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import stress
from peftkern import native

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not native.available(), reason=str(native.reason())),
]
ROOT = Path(__file__).resolve().parents[1]
# One product on two threads, and the digest of its bits.
PRODUCT = """
import hashlib, torch
import peftkern as pk

def product():
    torch.set_num_threads(2)
    make = torch.Generator().manual_seed(1)
    q = pk.quantize_4bit(torch.randn(512, 1024, generator=make))
    y = pk.functional.linear_4bit(torch.randn(32, 1024, generator=make), q)
    return hashlib.sha256(y.numpy().tobytes()).hexdigest()
"""
RUNTIMES = """
def runtimes():
    words = open('/proc/self/maps').read().split()
    names = ('libgomp', 'libomp', 'libiomp5')
    return {w for w in words if w.rpartition('/')[2].startswith(names)}
"""


def python(code: str, *, ends: tuple[int, ...] = (0,), **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
    )
    assert done.returncode in ends, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def digest() -> str:
    return python(PRODUCT + "print(product())").strip()


def test_import_is_light(tmp_path: Path) -> None:
    """No thread, and at most 150 ms of processor time over torch and numpy."""
    code = (
        "import os, time, torch, numpy\n"
        "before, start = len(os.listdir('/proc/self/task')), time.process_time()\n"
        "import peftkern\n"
        "print(len(os.listdir('/proc/self/task')) - before, time.process_time() - start)\n"
    )
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    python(code, **compiled)
    runs = [python(code, **compiled).split() for _ in range(3)]
    assert {threads for threads, _ in runs} == {"0"}
    assert min(float(seconds) for _, seconds in runs) <= 0.150


ORDERS = {
    "numpy-scipy": "import numpy, scipy.linalg\nscipy.linalg.inv(numpy.eye(200))",
    # An OpenMP region of scikit-learn's own runtime.
    "sklearn": "import numpy\nfrom sklearn.cluster import KMeans\n"
    "KMeans(3, n_init=1).fit(numpy.random.rand(2000, 5))",
    "torch": "import torch\ntorch.randn(400, 400) @ torch.randn(400, 400)",
}


@pytest.mark.parametrize("order", ORDERS)
def test_imported_after_others(order: str, digest: str) -> None:
    """The same bits, and no OpenMP runtime that was not there with torch."""
    pytest.importorskip("sklearn")
    count = "\nimport torch\nbefore = runtimes()\n"
    out = python(
        f"{RUNTIMES}{ORDERS[order]}{count}{PRODUCT}\nprint(product(), len(runtimes() - before))"
    )
    assert out.split() == [digest, "0"]


@pytest.mark.parametrize("order", ["numpy-scipy", "sklearn"])
def test_others_imported_after(order: str, digest: str) -> None:
    pytest.importorskip("sklearn")
    out = python(f"{PRODUCT}\nprint(product())\n{ORDERS[order]}\nprint(product())")
    assert out.split() == [digest] * 2


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "3", "OMP_DYNAMIC": "true", "GOMP_CPU_AFFINITY": "0"},
        {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "active"},
    ],
    ids=["affinity", "bound"],
)
def test_openmp_environments(environment: dict[str, str], digest: str) -> None:
    assert python(PRODUCT + "print(product())", **environment).strip() == digest


@pytest.mark.parametrize("used", [True, False], ids=["used", "idle"])
@pytest.mark.parametrize(
    "method",
    [
        "fork",
        pytest.param("forkserver", marks=pytest.mark.slow),
        pytest.param("spawn", marks=pytest.mark.slow),
    ],
)
def test_child_processes(method: str, used: bool, digest: str, tmp_path: Path) -> None:
    """Children of a parent that has used its threads, ours and torch's, or has not."""
    (tmp_path / "product.py").write_text(PRODUCT)
    (tmp_path / "main.py").write_text(
        "import multiprocessing, torch\n"
        "from product import product\n"
        "if __name__ == '__main__':\n"
        f"    if {used}:\n"
        "        torch.set_num_threads(2)\n"
        "        torch.randn(600, 600) @ torch.randn(600, 600)\n"
        "        print(product())\n"
        f"    with multiprocessing.get_context({method!r}).Pool(2) as pool:\n"
        "        for task in [pool.apply_async(product) for _ in range(4)]:\n"
        "            print(task.get(timeout=120))\n"
    )
    run = f"import subprocess, sys\nsubprocess.run([sys.executable, {str(tmp_path / 'main.py')!r}])"
    out = python(run, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}").split()
    assert out == [digest] * (4 + used)


def test_data_loader_workers(digest: str) -> None:
    code = (
        "class Rows(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, i): return product()\n"
        "torch.set_num_threads(2)\n"
        "print(product())\n"
        "for batch in torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=4):\n"
        "    print(*batch)\n"
        "print(product())\n"
    )
    assert python(PRODUCT + code).split() == [digest] * 10


def test_many_threads_and_changing_counts() -> None:
    count, wrong = stress.run(4.0)
    assert not wrong, "\n".join(wrong[:10])
    assert count > 16


@pytest.mark.parametrize("daemon", [False, True], ids=["joined", "daemon"])
def test_exit_while_threads_compute(daemon: bool) -> None:
    """Threads are in kernels, with threads of their own, when the interpreter ends.

    Python up to 3.13 ends daemon threads by unwinding them, at which C++ aborts: so does a process
    that calls torch alone. What it must not do is hang, or touch memory that is gone.
    """
    code = PRODUCT + (
        "import threading, time\n"
        "def work():\n"
        f"    while {daemon} or time.monotonic() < ends: product()\n"
        "ends = time.monotonic() + 1.0\n"
        f"for _ in range(4): threading.Thread(target=work, daemon={daemon}).start()\n"
        "time.sleep(0.5)\n"
        "print('ends', flush=True)\n"
    )
    for _ in range(3 if daemon else 1):
        ends = (0, -signal.SIGABRT) if daemon else (0,)
        assert python(code, ends=ends).split() == ["ends"]
