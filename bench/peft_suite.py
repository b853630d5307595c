"""PEFT's own tests on our kernels: the same passed, failed and skipped as without us.

``python -m bench.peft_suite`` fetches the source distribution of the installed PEFT from the
package index (its tests are not part of the wheel, and not part of this repository), runs a part
of them that needs no network once as it is and once with every LoRA layer accelerated as soon as
PEFT has made it, and prints both results, each test whose result differs, and how many calls our
kernels served, which must be some.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLUGIN = f"{__package__}.peft_plugin"
MARKERS = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")
# What PEFT's tests import at the top and this part of them never calls.
STUBS = {
    "datasets": "def load_dataset(*args, **kwargs):\n    raise OSError('no data sets offline')\n",
    "diffusers": "class StableDiffusionPipeline:\n    pass\n",
}


@dataclass(frozen=True)
class Outcome:
    """What one run of the tests gave.

    Args:
        results: test -> "passed", "failed", "skipped", "xfailed" or "xpassed".
        fast: calls that our kernels served.
        fallbacks: reason -> calls that went to PEFT's own forward.
        seconds: how long it took.
    """

    results: Mapping[str, str]
    fast: int
    fallbacks: Mapping[str, int]
    seconds: float

    def count(self, result: str) -> int:
        return sum(each == result for each in self.results.values())


def fetch(version: str, folder: Path) -> Path:
    """Download PEFT's source distribution from the package index; the file."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q"]
    command += ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", f"peft=={version}"]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True)
    found = sorted(folder.glob("peft-*.tar.gz"))
    if done.returncode or not found:
        raise SystemExit(
            f"pip could not download the source distribution of peft {version}; give the file with "
            f"--sdist:\n{done.stderr.strip()}"
        )
    return found[0]


def unpack(sdist: Path, folder: Path) -> Path:
    """PEFT's tests as a package that can run: the folder to run them in."""
    with tarfile.open(sdist) as archive:
        wanted = [
            m for m in archive.getmembers() if "/tests/" in m.name or m.name.endswith("tests")
        ]
        archive.extractall(folder, wanted, filter="data")
    tests = next(folder.glob("*/tests"), None)
    if tests is None:
        raise SystemExit(f"{sdist} holds no tests")
    (tests / "__init__.py").touch()
    lines = ["[pytest]", "addopts =", "markers =", *(f"    {name}: of PEFT" for name in MARKERS)]
    (tests.parent / "pytest.ini").write_text("\n".join(lines) + "\n")
    for name, text in STUBS.items():
        if importlib.util.find_spec(name) is None:
            (tests.parent / f"{name}.py").write_text(text)
    return tests.parent


def start(folder: Path, accelerate: bool, tests: str, keyword: str) -> subprocess.Popen[str]:
    """Begin a run of the tests in a process and a folder of its own."""
    name = "ours" if accelerate else "plain"
    own = folder.parent / name
    shutil.copytree(folder, own)
    here = Path(__file__).resolve().parents[len(PLUGIN.split(".")) - 1]
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "PYTHONPATH": os.pathsep.join([str(own), str(here), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN]
    command += ["-p", "no:cacheprovider", "--timeout=0", "--outcomes", str(own / "outcomes.json")]
    command += ["-k", keyword] if keyword else []
    command += ["--accelerate"] if accelerate else []
    with (own / "log.txt").open("w") as log:
        return subprocess.Popen(
            [*command, f"tests/{tests}"],
            cwd=own,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finish(process: subprocess.Popen[str], own: Path, begun: float) -> Outcome:
    """Wait for a run and read what it found."""
    process.wait()
    seconds = time.perf_counter() - begun
    found = own / "outcomes.json"
    if not found.exists():
        raise SystemExit(f"the tests did not run:\n{(own / 'log.txt').read_text()[-4000:]}")
    kept: dict[str, Any] = json.loads(found.read_text())
    return Outcome(kept["results"], kept["fast"], kept["fallbacks"], seconds)


def compare(plain: Outcome, ours: Outcome) -> tuple[str, bool]:
    """The table of both runs, and whether ours is right."""
    kinds = sorted({*plain.results.values(), *ours.results.values(), "passed", "failed", "skipped"})
    lines = [f"{'':12}" + "".join(f"{kind:>10}" for kind in kinds) + f"{'seconds':>10}"]
    for name, run in (("PEFT", plain), ("accelerated", ours)):
        counts = "".join(f"{run.count(kind):>10}" for kind in kinds)
        lines.append(f"{name:12}{counts}{run.seconds:>10.0f}")
    total = Counter(ours.fallbacks)
    lines.append(f"calls on our kernels: {ours.fast}; to PEFT's own forward: {total.total()}")
    lines += [f"  {count:>6}  {reason}" for reason, count in total.most_common()]
    different = [
        f"  {test}: {plain.results.get(test, 'not run')} -> {ours.results.get(test, 'not run')}"
        for test in sorted({*plain.results, *ours.results})
        if plain.results.get(test) != ours.results.get(test)
    ]
    lines.append(f"tests whose result differs: {len(different) or 'none'}")
    lines += different
    right = not different and ours.fast > 0 and bool(plain.results)
    if not ours.fast:
        lines.append("no call took the fast path: this run shows nothing")
    return "\n".join(lines), right


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 when every test gives the same result with us as without."""
    parser = argparse.ArgumentParser("bench.peft_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--tests", default="test_custom_models.py", help="file of PEFT's tests")
    parser.add_argument("-k", dest="keyword", default="LoraConfig", help="pytest's -k")
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution, if it is here")
    parser.add_argument("--keep", type=Path, help="empty folder for both runs' logs")
    options = parser.parse_args(argv)
    version = importlib.metadata.version("peft")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep.resolve() if options.keep else Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        sdist = options.sdist.resolve() if options.sdist else fetch(version, root)
        folder = unpack(sdist, root / "sdist")
        shutil.move(folder, root / "tests")
        begun = time.perf_counter()
        runs = [
            (start(root / "tests", accelerate, options.tests, options.keyword), root / name)
            for accelerate, name in ((False, "plain"), (True, "ours"))
        ]
        plain, ours = (finish(process, own, begun) for process, own in runs)
    print(f"PEFT {version}, {options.tests} -k {options.keyword!r}")
    text, right = compare(plain, ours)
    print(text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
