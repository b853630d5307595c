"""Triton's interpreter, made to work with the NumPy that is installed."""

from __future__ import annotations

from typing import Any


def repair() -> None:
    """Let runtime values bound a loop: NumPy 2.4 refuses the conversion Triton 3.6 relies on."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
