"""A few hundred draws of the fuzzer, the same ones each time; `make fuzz` draws new ones."""

from __future__ import annotations

import pytest
import torch

from bench import fuzz, fuzz_files
from peftkern import functional, native


@pytest.mark.skipif(native.reason() is not None, reason="no native kernels")
@pytest.mark.parametrize("seed", [0, 100_000])
def test_draws_agree_with_the_reference(seed: int) -> None:
    torch.set_num_threads(1)  # so small that threads only cost; conftest.py puts the number back
    for one in range(seed, seed + 150):
        (fuzz.check_codes if one % 7 == 0 else fuzz.check)(one)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkern import registry

    right = functional.lora_linear

    def wrong(*args: object, **options: object) -> torch.Tensor:
        y = right(*args, **options)  # type: ignore[arg-type]
        return y if registry.forced_backend() == "reference" else y * 1.001

    monkeypatch.setattr(functional, "lora_linear", wrong)
    found, failed = fuzz.fuzz(1, 0.5)
    assert 0 < failed < found


def test_broken_files_are_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    done, found = fuzz_files.run(60.0, seed=3, every=29)
    assert done > 600
    assert found == 0, capsys.readouterr().out
