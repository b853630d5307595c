"""Op families, one folder each; walking the folders at import is what registers them.

The files of a family have the same names everywhere: ``contract.py`` declares the ops,
``reference.py`` holds their plain torch truth, ``autograd.py`` their gradients, and ``cpu.py``,
``cuda.py``, ``triton.py`` the implementations.
"""

from __future__ import annotations

import importlib
import pkgutil

_IMPLEMENTATION_FILES = ("cpu", "cuda", "triton")


def load() -> None:
    """Import every family: first all contracts, then all implementations."""
    families = [info.name for info in pkgutil.iter_modules(__path__) if info.ispkg]
    for family in families:
        importlib.import_module(f"{__name__}.{family}.contract")
    for family in families:
        package = importlib.import_module(f"{__name__}.{family}")
        present = {info.name for info in pkgutil.iter_modules(package.__path__)}
        for file in _IMPLEMENTATION_FILES:
            if file in present:
                importlib.import_module(f"{__name__}.{family}.{file}")
