"""Which modules a configuration means. Matching rules are PEFT's, so that files agree."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from peftkern.hf.config import ALL_LINEAR, AdapterConfig, TargetedConfig
from peftkern.hf.rules import is_foreign_adapter, rule_for
from peftkern.nn.adapter import AdapterLayer


@dataclass(frozen=True)
class Slot:
    """A place in the model where a module hangs."""

    parent: nn.Module
    attribute: str


@dataclass
class Site:
    """One module of the model with every name and place it is reached by.

    Args:
        name: first path, the one that files and reports use.
        module: the module.
        aliases: further paths to the same object.
        slots: where it hangs; replacing it means setting all of them.
    """

    name: str
    module: nn.Module
    aliases: list[str]
    slots: list[Slot]

    @property
    def names(self) -> list[str]:
        """All paths."""
        return [self.name, *self.aliases]


def survey(model: nn.Module) -> list[Site]:
    """All modules below ``model``, each once, in the order of ``named_modules``.

    The inside of adapter layers is left out: an adapter stands for the layer that it wraps.
    """
    sites: dict[int, Site] = {}
    order: list[Site] = []

    def visit(module: nn.Module, path: str, trail: tuple[int, ...]) -> None:
        for attribute, child in module._modules.items():
            if child is None or id(child) in trail:
                continue
            name = f"{path}.{attribute}" if path else attribute
            site = sites.get(id(child))
            slot = Slot(module, attribute)
            if site is None:
                site = sites[id(child)] = Site(name, child, [], [slot])
                order.append(site)
            else:
                site.aliases.append(name)
                if all(s.parent is not module or s.attribute != attribute for s in site.slots):
                    site.slots.append(slot)
            if not isinstance(child, AdapterLayer) and not is_foreign_adapter(child):
                visit(child, name, (*trail, id(child)))

    visit(model, "", (id(model),))
    return order


def matches(spec: str | Sequence[str], name: str) -> bool:
    """A regular expression must match the whole path; a list names paths or their last parts."""
    if isinstance(spec, str):
        return re.fullmatch(spec, name) is not None
    return any(name == part or name.endswith(f".{part}") for part in spec)


def saved_by(names: Iterable[str], path: str) -> bool:
    """Whether modules_to_save means this path (PEFT compares plain endings)."""
    return any(path.endswith(name) for name in names)


def _below_saved(names: Iterable[str], path: str) -> bool:
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in names)


def excluded(config: AdapterConfig, path: str) -> str | None:
    """Why a path that the targets match is left alone; ``None`` when it is not."""
    exclude = config.exclude_modules if isinstance(config, TargetedConfig) else None
    if exclude and matches(exclude, path):
        return "excluded by exclude_modules"
    if _below_saved(config.saved_names, path):
        return "trained in full (modules_to_save)"
    return None


def in_layers(config: AdapterConfig, path: str) -> bool:
    """Whether layers_to_transform admits the path."""
    if not isinstance(config, TargetedConfig) or config.layers_to_transform is None:
        return True
    wanted = config.layers_to_transform
    numbers = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    patterns = config.layers_pattern or ()
    if isinstance(patterns, str):
        patterns = (patterns,)
    forms = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] or [
        r".*?\.[^.]*\.(?P<idx>\d+)\."
    ]
    for form in forms:
        found = re.match(form, path)
        if found is not None:
            return int(found["idx"]) in numbers
    return False


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that maps to the vocabulary, when the model tells which it is."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of what "all-linear" leaves out: the output embedding, or else the head.

    The head is everything beside the backbone that a Hugging Face model names with
    ``base_model_prefix``; a model without such a split has none.
    """
    embedding = output_embedding(model)
    if embedding is not None:
        return tuple(
            name for name, m in model.named_modules(remove_duplicate=False) if m is embedding
        )
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if not isinstance(backbone, nn.Module):
        return ()
    return tuple(name for name, child in model.named_children() if child is not backbone)


def _under(paths: Iterable[str], name: str) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


@dataclass(frozen=True)
class Choice:
    """What a target specification says about one site: meant or not, and why not."""

    site: Site
    wanted: bool
    reason: str | None


def is_linear_like(module: nn.Module) -> bool:
    """True for what "all-linear" speaks about: every kind of linear layer, adapted or not."""
    if (isinstance(module, AdapterLayer) and module.on_linear) or is_foreign_adapter(module):
        return True
    return rule_for(module) is not None


def choose(
    model: nn.Module, sites: Sequence[Site], spec: str | Sequence[str], config: AdapterConfig
) -> list[Choice]:
    """Every site that ``spec`` speaks about, with the reason where it is left alone."""
    heads = head_paths(model) if spec == ALL_LINEAR else ()
    chosen = []
    for site in sites:
        if spec == ALL_LINEAR:
            if not is_linear_like(site.module):
                continue
            reason = None
            if any(_under(heads, name) for name in site.names):
                reason = "is the model's output layer or head, which all-linear leaves out"
        else:
            if not any(matches(spec, name) and in_layers(config, name) for name in site.names):
                continue
            reason = None
        why = excluded(config, site.name)
        chosen.append(Choice(site, why is None and reason is None, why or reason))
    return chosen


def unmatched(names: str | Sequence[str], sites: Sequence[Site]) -> list[str]:
    """The names of a list that match no module; a regular expression counts as one name."""
    paths = [name for site in sites for name in site.names]
    parts = (names,) if isinstance(names, str) else names
    test: Any = (lambda n: n) if isinstance(names, str) else (lambda n: (n,))
    return [part for part in parts if not any(matches(test(part), path) for path in paths)]


def near_names(name: str, sites: Sequence[Site], count: int = 4) -> list[str]:
    """Names of adaptable layers that look like ``name``, for error messages."""
    linear = [s for s in sites if rule_for(s.module) is not None]
    ends = dict.fromkeys(part for s in linear for part in (s.name.rsplit(".", 1)[-1], s.name))
    close = difflib.get_close_matches(name, list(ends), n=count, cutoff=0.5)
    last = list(dict.fromkeys(s.name.rsplit(".", 1)[-1] for s in linear))
    return close or last[:12]


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the path; else the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def minimal_names(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest endings that mean all of ``chosen`` and none of ``others``."""
    taken = {ending for path in others for ending in _endings(path)}
    names = []
    for path in chosen:
        ending = next((e for e in _endings(path) if e not in taken), path)
        names.append(ending)
    return sorted(dict.fromkeys(names))


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


Targeted = TypeVar("Targeted", bound=TargetedConfig)


def explicit_targets(
    config: Targeted, sites: Sequence[Site], adapted: Sequence[str], rewrite: bool = False
) -> Targeted:
    """The config with targets that mean exactly the adapted modules to PEFT.

    What the user wrote is kept when PEFT would read it so; "all-linear", and targets of which some
    were refused, become the shortest names that mean just these modules.

    Args:
        config: what the model was patched with.
        sites: its modules.
        adapted: paths of the adapted ones.
        rewrite: name the modules in any case.
    """
    keep = not rewrite and config.target_modules != ALL_LINEAR
    if keep and _meant(config, sites) == set(adapted):
        return config
    others = [site.name for site in sites if site.name not in set(adapted)]
    exact = replace(
        config,
        target_modules=tuple(minimal_names(adapted, others)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    if _meant(exact, sites) == set(adapted):
        return exact
    # A whole path that is also the end of another one cannot be said as a name.
    return replace(exact, target_modules="|".join(re.escape(path) for path in adapted))


def _meant(config: TargetedConfig, sites: Sequence[Site]) -> set[str]:
    return {
        site.name
        for site in sites
        if matches(config.target_modules, site.name)
        and in_layers(config, site.name)
        and excluded(config, site.name) is None
    }
