"""What `peftkern info` tells, as plain values; needs nothing but the core."""

from __future__ import annotations

from typing import Any

from peftkern.cli.machine import machine, versions


def collect() -> dict[str, Any]:
    """Everything `peftkern info` knows, as plain values.

    Returns:
        `versions`, `machine`, `native` (see `peftkern.native.info`), `threads`, `backends`
        (name -> "ok" or the reason), `forced_backend`, `ops` (name -> what serves it per device),
        `warnings`.

    Raises:
        ValueError: PEFTKERN_CPU_ISA names an instruction set that cannot be used here.
        RuntimeError: PEFTKERN_BACKEND names a backend that cannot be used here.
    """
    import torch

    import peftkern as pk
    from peftkern import native, registry

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    ops: dict[str, dict[str, Any]] = {}
    for name in sorted(registry.specs()):
        ops[name] = {}
        for device in devices:
            rows = registry.explain(name, device)
            serving = next((backend for backend, reason in rows if reason is None), None)
            ops[name][device] = {
                "serves": serving,
                "refused": {backend: reason for backend, reason in rows if reason is not None},
            }
    facts: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "native": native.info(),
        "threads": torch.get_num_threads(),
        "backends": pk.backends(),
        "forced_backend": registry.forced_backend(),
        "devices": devices,
        "ops": ops,
    }
    facts["warnings"] = warnings_of(facts)
    return facts


def warnings_of(facts: dict[str, Any]) -> list[str]:
    """What a user should know about the `native` part of the facts; empty when all is well."""
    made: list[str] = []
    native = facts["native"]
    if not native["available"]:
        made.append(f"no native kernels, the slow reference serves every op: {native['reason']}")
        return made
    if native["openmp"] is None:
        made.append(f"the native kernels run on one thread: {native['openmp_reason']}")
    if len(native["openmp_loaded"]) > 1:
        made.append(
            f"{len(native['openmp_loaded'])} OpenMP runtimes are loaded "
            f"({', '.join(native['openmp_loaded'])}): their threads compete for the cores; the "
            "kernels use the first one that torch loaded"
        )
    return made
