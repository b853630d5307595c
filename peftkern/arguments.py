"""What arguments are checked for at the public surface; every error names the argument first."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST = sys.float_info.max
_MOST = 2**31 - 1  # what a size, a rank or a number of steps may be


def require_tensor(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor with strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected torch.strided")


def require_float(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor with strides and of a floating dtype."""
    # Not by a call of require_tensor: functions look at up to ten tensors this way.
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        require_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating dtype")


def require_model(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.nn.Module")


def real(name: str, value: Any) -> float:
    """A finite real number; tensors of one element are read.

    Raises:
        TypeError: something else.
        ValueError: NaN or infinite.
    """
    if type(value) is not float:
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            value = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            raise TypeError(f"{name}: got {kind}, expected a real number") from None
        except OverflowError:
            raise ValueError(f"{name}: got {value}, expected a smaller number") from None
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return value


def share(name: str, value: Any) -> float:
    """A number in [0, 1).

    Raises:
        TypeError: not a number.
        ValueError: outside.
    """
    value = real(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return value


def whole(name: str, value: Any, least: int = 1, most: int = _MOST) -> int:
    """An int within bounds.

    Raises:
        TypeError: not an int.
        ValueError: outside.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if not least <= value <= most:
        raise ValueError(f"{name}: got {value}, expected {least} to {most}")
    return value


def flag(name: str, value: Any) -> bool:
    """Raise ``TypeError`` unless ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")
    return value


def folder(name: str, value: Any) -> Path:
    """A path.

    Raises:
        TypeError: neither a string nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a path")
    return Path(value)
