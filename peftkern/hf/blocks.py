"""Where the sub-layers of a transformer end, told from its modules and never from its model type.

Three shapes are known. A *closing* module holds a linear layer, dropout and the normalisation of
the sum with its second argument (BERT's ``SelfOutput`` and ``Output``). A *closed sub-layer* holds
its normalisation, its core and a dropout, and adds its own input (T5). A *block* holds
normalisations and sub-layers in turns and adds the residuals itself (GPT-2, Llama, ViT).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from peftkern.hf.rules import rule_for
from peftkern.hf.targets import Site
from peftkern.nn.adapter import AdapterLayer
from peftkern.nn.bottleneck import BottleneckLayer
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import is_dense_linear

ATTENTION, CROSS, FEED_FORWARD = "mh_adapter", "cross_adapter", "output_adapter"


@dataclass(frozen=True)
class Junction:
    """A place between a sub-layer's result and the residual connection behind it.

    Args:
        kind: ``"mh_adapter"``, ``"cross_adapter"`` or ``"output_adapter"``.
        site: the module that carries the adapters.
        layer: number of the transformer layer, counted over the whole model.
        shape: ``"closing"``, ``"closed"`` or ``"block"``.
        key: path of the adapters in AdapterHub's files.
        before: module whose first argument (``"closing"``: the site's second) is the residual.
        source: module whose result is the sub-layer's.
        after: dropout behind it, where another module applies that.
        norm: normalisation of the sum, or ``None``.
        width: size of the hidden states.
    """

    kind: str
    site: Site
    layer: int
    shape: str
    key: str
    before: nn.Module
    source: nn.Module
    after: nn.Module | None
    norm: nn.Module | None
    width: int


def junctions(sites: Sequence[Site]) -> tuple[list[Junction], dict[str, str]]:
    """All places of a model, and the blocks that are not understood with the reason.

    Args:
        sites: the model's modules, from :func:`peftkern.hf.targets.survey`.
    """
    found: list[Junction] = []
    unknown: dict[str, str] = {}
    by_module = {id(site.module): site for site in sites}
    numbers: dict[str, int] = {}
    for site in sites:
        order = _order(site.module)
        roles = {name: _role(child) for name, child in _children(site.module)}
        shape = [roles[name] for name in order if name in roles]
        block = _block_path(site.name)
        if block is None or "norm" not in shape:
            continue
        number = numbers.setdefault(block, len(numbers))
        children = dict(_children(site.module))
        named = {role: children[name] for name, role in roles.items()}
        if shape == ["linear", "dropout", "norm"] and len(children) == 3:
            width = _width(named["norm"])
            kind = _kind_above(site, sites)
            found.append(
                Junction(
                    kind,
                    site,
                    number,
                    "closing",
                    site.name,
                    site.module,
                    named["dropout"],
                    None,
                    named["norm"],
                    width,
                )
            )
        elif len(shape) == 3 and shape[0] == "norm" and shape[2] == "dropout":
            core = next(name for name in order if roles.get(name) in ("attention", "other"))
            found.append(
                Junction(
                    _kind_of(core, roles[core]),
                    site,
                    number,
                    "closed",
                    site.name,
                    named["norm"],
                    named["dropout"],
                    None,
                    None,
                    _width(named["norm"]),
                )
            )
        elif "attention" in shape:
            reason = _block(site, order, roles, children, number, by_module, found)
            if reason is not None:
                unknown[site.name] = reason
    return found, unknown


def _block(
    site: Site,
    order: Sequence[str],
    roles: dict[str, str],
    children: dict[str, nn.Module],
    number: int,
    by_module: dict[int, Site],
    found: list[Junction],
) -> str | None:
    """Adds the places of a block that normalises before its sub-layers; else says why not."""
    dropouts = [name for name in order if roles.get(name) == "dropout"]
    turns = [name for name in order if roles.get(name) in ("norm", "attention", "other", "linear")]
    shape = [roles[name] for name in turns]
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    good = len(turns) == 2 * len(pairs) and len(pairs) >= 2 and shape[-1] == "other"
    good = good and all(roles[n] == "norm" and roles[c] != "norm" for n, c in pairs)
    good = good and all(roles[core] == "attention" for _, core in pairs[:-1])
    if not good:
        return f"its forward uses {', '.join(turns)} in an order that is not understood"
    if len(dropouts) > 1:
        return f"it has {len(dropouts)} dropouts ({', '.join(dropouts)})"
    after = children[dropouts[0]] if dropouts else None
    for norm, core in pairs:
        module = children[core]
        kind = _kind_of(core, roles[core])
        if kind == ATTENTION and any(_kind_of(c, roles[c]) == ATTENTION for _, c in pairs[:-1][1:]):
            return "it has more than one self-attention"
        home = "attention_adapters" if kind != FEED_FORWARD else "output_adapters"
        found.append(
            Junction(
                kind,
                by_module[id(module)],
                number,
                "block",
                f"{site.name}.{home}",
                children[norm],
                module,
                after,
                None,
                _width(children[norm]),
            )
        )
    return None


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, c) for n, c in module.named_children() if not isinstance(c, BottleneckLayer)]


def _order(module: nn.Module) -> tuple[str, ...]:
    """Names that the module's forward uses, in the order of their first use."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return () if code is None else code.co_names


def _role(child: nn.Module) -> str:
    if isinstance(child, AdapterLayer):
        child = getattr(child, "base_layer", child)
    names = " ".join(cls.__name__ for cls in type(child).__mro__[:-2])
    if "Attention" in names or "Attn" in names:
        return "attention"
    if "Norm" in names:
        return "norm"
    if isinstance(child, nn.Dropout):
        return "dropout"
    if isinstance(child, QuantizedLinear) or is_dense_linear(child) or rule_for(child) is not None:
        return "linear"
    return "other"


def _kind_of(name: str, role: str) -> str:
    if role != "attention":
        return FEED_FORWARD
    return CROSS if re.search("cross|encdec|encoder_attn", name.lower()) else ATTENTION


def _kind_above(site: Site, sites: Sequence[Site]) -> str:
    """Whether a closing module closes an attention or a feed-forward."""
    path, _, _ = site.name.rpartition(".")
    above = next((s for s in sites if path in s.names), None)
    if above is None or _role(above.module) != "attention":
        return FEED_FORWARD
    return _kind_of(path.rpartition(".")[2], "attention")


def _block_path(path: str) -> str | None:
    """Path up to the first number: ``encoder.layer.3`` of ``encoder.layer.3.output``."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return None if match is None else match.group(0)


def _width(norm: nn.Module) -> int:
    weight = getattr(norm, "weight", None)
    return 0 if weight is None else int(weight.numel())
