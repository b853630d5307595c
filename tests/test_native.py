"""The native module as a whole: its objects, its threads, and how it is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import native_build
import pytest
import torch

import peftkern
from peftkern import native

pytestmark = pytest.mark.native
needs_native = pytest.mark.skipif(not native.available(), reason=str(native.reason()))
needs_build = pytest.mark.skipif(
    shutil.which("objdump") is None or shutil.which("nm") is None, reason="no binutils"
)
SNIPPET = """
import torch
import peftkern
q = peftkern.quantize_4bit(torch.randn(256, 1024))
y = peftkern.functional.linear_4bit(torch.randn(16, 1024), q)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
        cwd=native_build.ROOT,
    )


def test_backends_tell_about_native() -> None:
    assert peftkern.backends()["native"] == (native.reason() or "ok")


@needs_native
def test_info() -> None:
    info = native.info()
    assert info["available"]
    assert info["version"] == peftkern.__version__
    assert info["isa"] in info["isas"]
    assert set(info["isas"]) <= set(info["isas_built"])
    assert "scalar" in info["isas"]
    assert info["threads"] == torch.get_num_threads()
    assert info["compiler"]
    assert "-ffast-math" not in info["flags"]


@needs_native
def test_one_openmp_runtime_and_it_is_torchs() -> None:
    code = SNIPPET + (
        "from peftkern import native\n"
        "info = native.info()\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "names = ('libgomp', 'libomp', 'libiomp5')\n"
        "files = {w for w in maps if w.rpartition('/')[2].startswith(names)}\n"
        "print(len(files), info['openmp'] in files, len(info['openmp_loaded']))\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "True", "1"]


@needs_native
@needs_build
def test_shipped_module_links_no_openmp_and_no_torch() -> None:
    from peftkern import _C

    text = subprocess.run(
        ["objdump", "-p", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED\s+(\S+)", text)
    assert not [name for name in needed if "omp" in name or "torch" in name], needed


@needs_build
def test_isa_code_stays_in_its_object() -> None:
    """No weak symbols in ISA objects, no AVX in the others, no AVX-512 in the AVX2 one."""
    if native_build.build()[0] is None:
        pytest.skip(native_build.build()[1])
    objects = native_build.objects()
    flagged = {name for name in objects if re.fullmatch(r"isa_avx.*|int8_vnni", name)}
    assert {"isa_scalar", "bind", "dispatch", "threading"} <= set(objects)
    for name, path in objects.items():
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if name.startswith("isa_") or name in flagged:
            symbols = subprocess.run(
                ["nm", "-C", str(path)], capture_output=True, text=True, check=True
            ).stdout
            assert not re.findall(r" [WVu] .*", symbols), name
        if name not in flagged:
            assert not re.findall(r"\t(v[a-z0-9]+ .*%[xyz]mm.*|.*%[yz]mm.*)", code), name
        if name.startswith("isa_"):  # a compiler may drop a function that only prefetches
            assert len(re.findall(r"\tprefetch", code)) >= 10, name
        if name == "isa_avx2":
            assert not re.findall(r"%zmm\d|%[xy]mm(?:1[6-9]|2\d|3[01])|%k[1-7]", code)
            assert "%ymm" in code
        if name == "isa_avx512":
            assert "vpdpbusd" not in code
        if name in ("int8_vnni", "isa_avx512_bf16", "isa_avx512_amx"):
            assert "vpdpbusd" in code
        if name in ("isa_avx512", "isa_avx512_bf16", "isa_avx512_amx"):
            assert "%zmm" in code
            assert ("vdpbf16ps" in code) == (name != "isa_avx512")
            assert ("tdpbf16ps" in code) == (name == "isa_avx512_amx")


@needs_native
def test_unknown_isa_is_refused_with_the_list() -> None:
    before = native.info()["isa"]
    with pytest.raises(ValueError, match=r"isa: got 'sse9'.*scalar"):
        native.set_isa("sse9")
    assert native.info()["isa"] == before


@needs_native
def test_forced_isa() -> None:
    shown = "from peftkern import native\nprint(native.info()['isa'])\n"
    done = python(SNIPPET + shown, PEFTKERN_CPU_ISA="scalar")
    assert done.stdout.split() == ["scalar"], done.stderr
    done = python("import peftkern\nprint('imported')\n" + SNIPPET, PEFTKERN_CPU_ISA="mmx")
    assert done.stdout.split() == ["imported"]
    assert "PEFTKERN_CPU_ISA='mmx'" in done.stderr
    assert "scalar" in done.stderr


@needs_native
@pytest.mark.parametrize("torch_first", [True, False])
def test_forked_child_runs_every_kernel(torch_first: bool) -> None:
    """libgomp does not survive a fork; the child must notice and use one thread."""
    warm = "torch.randn(512, 512) @ torch.randn(512, 512)\n" if torch_first else ""
    code = (
        "import os, torch, peftkern\n"
        "torch.set_num_threads(2)\n"
        + warm
        + "q = peftkern.quantize_4bit(torch.randn(1024, 2048))\n"
        "x = torch.randn(16, 2048)\n"
        "want = peftkern.functional.linear_4bit(x, q)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    got = peftkern.functional.linear_4bit(x, q)\n"
        "    q.dequantize()\n"
        "    os._exit(0 if got.numpy().tobytes() == want.numpy().tobytes() else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = python(code)
    assert done.stdout.split() == ["0"], done.stderr


@needs_native
def test_python_threads_share_the_kernels() -> None:
    """Calls release the GIL and may overlap; scratch memory belongs to a thread."""
    from concurrent.futures import ThreadPoolExecutor

    q = peftkern.quantize_4bit(torch.randn(96, 512))
    inputs = [torch.randn(m, 512) for m in (1, 3, 9, 30) for _ in range(8)]
    want = [peftkern.functional.linear_4bit(x, q) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            got = list(pool.map(lambda x: peftkern.functional.linear_4bit(x, q), inputs))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_import_neither_writes_nor_connects() -> None:
    code = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event.startswith('socket.connect'): raise SystemExit(event)\n"
        "    wrote = event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+')\n"
        "    if wrote and 'pycache' not in str(args[0]): raise SystemExit(f'{args}')\n"
        "import torch\n"
        "sys.addaudithook(hook)\n"
        "import peftkern\n"
        "print('clean')\n"
    )
    done = python(code)
    assert done.stdout.split() == ["clean"], done.stderr


def test_missing_module_gives_its_reason(tmp_path: Path) -> None:
    """A failed build leaves a note that backends() repeats; everything else goes on working."""
    package = tmp_path / "peftkern"
    shutil.copytree(
        native_build.ROOT / "peftkern",
        package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "_native_build_failure.txt"),
    )
    (package / "_native_build_failure.txt").write_text("the native build failed: no compiler\n")
    code = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        # An editable install has a finder that would bring the real module back.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "import torch, peftkern\n"
        "print(peftkern.backends()['native'])\n"
        "w = torch.randn(4, 64)\n"
        "assert peftkern.quantize_4bit(w).dequantize().shape == w.shape\n"
    )
    done = python(code)
    assert done.stdout.strip() == "the native build failed: no compiler", done.stderr
