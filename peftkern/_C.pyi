"""The native module: addresses, sizes and strides in; it allocates nothing.

Written by ``tools/native_stub.py``. Addresses are those of contiguous memory unless strides are
given; only ``peftkern/ops/*/cpu.py`` and ``peftkern/optim`` call these.
"""

from typing import Any

from typing_extensions import Buffer

def bottleneck_backward(
    arg0: tuple[Any, ...],
    arg1: int,
    arg2: bool,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    /,
) -> None: ...
def bottleneck_forward(
    arg0: tuple[Any, ...],
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    /,
) -> None: ...
def build_info() -> dict[str, Any]: ...
def column_dots(
    x: int,
    y: int,
    dtype: int,
    rows: int,
    cols: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def crc32c(data: Buffer, crc: int = 0, chosen: bool = True) -> int: ...
def dequantize(weight: tuple[Any, ...], out: int, threads: int, /) -> None: ...
def dequantize_absmax(
    codes: int,
    numel: int,
    nested_absmax: int,
    offset: float,
    out: int,
    /,
) -> None: ...
def dora_backward(
    dy: int,
    x: int,
    s: int,
    dtype: int,
    m: int,
    in_features: int,
    out_features: int,
    weight: Any,
    add: int,
    a: int,
    b: int,
    adapter_dtype: int,
    rank: int,
    scale: int,
    less: int,
    scaling: float,
    dropout: Any,
    ds: int,
    dx: int,
    da: int,
    db: int,
    threads: int,
    /,
) -> None: ...
def dora_forward(
    x: int,
    dtype: int,
    m: int,
    in_features: int,
    out_features: int,
    weight: Any,
    add: int,
    bias: int,
    a: int,
    b: int,
    adapter_dtype: int,
    rank: int,
    scale: int,
    scaling: float,
    dropout: Any,
    s: int,
    u: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def dora_norm(
    weight: tuple[Any, ...],
    n: int,
    k: int,
    a: int,
    b: int,
    rank: int,
    scaling: float,
    norm_sq: int,
    cross: int,
    gram: int,
    norm: int,
    threads: int,
    /,
) -> None: ...
def dropout(x: int, dtype: int, numel: int, parameters: Any, out: int, threads: int, /) -> None: ...
def fast_pair_products() -> bool: ...
def gated(
    dh: int,
    gate: int,
    up: int,
    dtype: int,
    numel: int,
    activation: int,
    h: int,
    dgate: int,
    dup: int,
    threads: int,
    /,
) -> None: ...
def gradient_norm(table: int, count: int, threads: int, /) -> float: ...
def group_backward(
    x: int,
    s: int,
    dtype: int,
    m: int,
    in_features: int,
    members: list[Any],
    ranks: int,
    ds: int,
    add: int,
    dx: int,
    threads: int,
    /,
) -> None: ...
def group_forward(
    x: int,
    dtype: int,
    m: int,
    in_features: int,
    members: list[Any],
    s: int,
    ranks: int,
    threads: int,
    /,
) -> None: ...
def int8_product(
    x: int,
    dtype: int,
    m: int,
    k: int,
    n: int,
    codes: int,
    scb: int,
    bias: int,
    threshold: float,
    out: int,
    work: int,
    threads: int,
    /,
) -> int: ...
def int8_work(m: int, k: int, threshold: float, /) -> int: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def linear(
    x: int,
    dtype: int,
    m: int,
    weight: tuple[Any, ...],
    transpose: bool,
    bias: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def lora_backward(
    dy: int,
    x: int,
    s: int,
    dtype: int,
    m: int,
    in_features: int,
    out_features: int,
    weight: Any,
    a: int,
    b: int,
    adapter_dtype: int,
    rank: int,
    scaling: float,
    dropout: Any,
    ds: int,
    dx: int,
    da: int,
    db: int,
    threads: int,
    /,
) -> None: ...
def lora_forward(
    x: int,
    dtype: int,
    m: int,
    in_features: int,
    out_features: int,
    weight: Any,
    bias: int,
    a: int,
    b: int,
    adapter_dtype: int,
    rank: int,
    scaling: float,
    dropout: Any,
    s: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def multi_backward(
    dy: int,
    x: int,
    s: int,
    dtype: int,
    m: int,
    in_features: int,
    out_features: int,
    weight: Any,
    order_address: int,
    members: list[Any],
    stride: int,
    ds: int,
    dx: int,
    threads: int,
    /,
) -> None: ...
def multi_forward(
    x: int,
    dtype: int,
    m: int,
    in_features: int,
    out_features: int,
    weight: Any,
    bias: int,
    order_address: int,
    members: list[Any],
    s: int,
    stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def openmp_info() -> dict[str, Any]: ...
def optimizer_call(name: str, address: int, threads: int, /) -> None: ...
def optimizer_step(
    table: int,
    count: int,
    rule: int,
    hyper: int,
    rounding: int,
    skipped: int,
    threads: int,
    /,
) -> None: ...
def prefix_attention(
    views: tuple[Any, ...],
    dtypes: tuple[Any, ...],
    sizes: tuple[Any, ...],
    attn_mask: Any,
    causal: bool,
    scale: float,
    dropout: Any,
    out: int,
    lse: int,
    threads: int,
    /,
) -> None: ...
def prefix_attention_backward(
    dout: tuple[Any, ...],
    saved: tuple[Any, ...],
    views: tuple[Any, ...],
    dtypes: tuple[Any, ...],
    sizes: tuple[Any, ...],
    attn_mask: Any,
    causal: bool,
    scale: float,
    dropout: Any,
    lse: int,
    needs: tuple[Any, ...],
    dq: int,
    dk: int,
    dv: int,
    partial_k: int,
    partial_v: int,
    threads: int,
    /,
) -> None: ...
def quantize_4bit(
    x: int,
    dtype: int,
    numel: int,
    quant_type: int,
    block_shift: int,
    packed: int,
    absmax: int,
    threads: int,
    /,
) -> int: ...
def quantize_8bit(
    x: int,
    dtype: int,
    rows: int,
    cols: int,
    codes: int,
    scb: int,
    threads: int,
    /,
) -> int: ...
def quantize_absmax(
    x: int,
    numel: int,
    codes: int,
    nested_absmax: int,
    threads: int,
    /,
) -> None: ...
def read_page(fd: int, into: Buffer, offset: int, /) -> int: ...
def row_squares(weight: tuple[Any, ...], out: int, threads: int, /) -> None: ...
def sampled_gradient(
    dy: int,
    x: int,
    dtype: int,
    m: int,
    rows: int,
    cols: int,
    positions: tuple[Any, ...],
    dy_tiles: int,
    x_tiles: int,
    gradient: int,
    threads: int,
    /,
) -> int: ...
def scan_parameters(
    parameters: list[Any],
    states: list[Any],
    kept: list[Any],
    facts: int,
    /,
) -> int: ...
def set_isa(name: str, /) -> None: ...
def set_pair_products(arg0: bool, /) -> None: ...
def set_vnni(arg0: bool, /) -> None: ...
def sparse_linear(
    x: int,
    dtype: int,
    m: int,
    rows: int,
    cols: int,
    weight: Any,
    positions: tuple[Any, ...],
    transpose: bool,
    bias: int,
    tiles: int,
    out: int,
    threads: int,
    /,
) -> int: ...
def tables() -> dict[str, Any]: ...
def write_page(fd: int, data: Buffer, offset: int, /) -> int: ...
