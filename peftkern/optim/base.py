"""What every optimizer here shares: collecting work, clipping, reporting, the one pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.arguments import real
from peftkern.ops.optimizer.contract import PARAM_DTYPES, hyper_row
from peftkern.ops.optimizer.reference import BLOCK
from peftkern.optim import interchange, planned
from peftkern.optim.planned import Item, Planner, steps_of

_LOG = logging.getLogger("peftkern")
Params = Iterable[Any]


@dataclass(frozen=True)
class Options:
    """What an optimizer is set to besides its groups.

    Args:
        rule: update rule, as the op names it.
        bits: 32 or 8, of the state of parameters with at least ``min_8bit_size`` elements.
        min_8bit_size: smaller parameters keep fp32 state.
        stochastic_rounding: round updated bf16 parameters up or down at random.
        max_grad_norm: clip the global gradient norm to this inside the step.
        skip_nonfinite_step: leave the whole step out when any gradient is not finite.
    """

    rule: str
    bits: int = 32
    min_8bit_size: int = 4096
    stochastic_rounding: bool = False
    max_grad_norm: float | None = None
    skip_nonfinite_step: bool = False


@dataclass
class Work:
    """One parameter with a gradient, in this step."""

    parameter: Tensor  # as in the group
    index: int  # among all parameters of the optimizer
    group: int
    param: Tensor  # local, contiguous; a copy where the parameter is not
    grad: Tensor
    state: dict[str, Any]
    step: int

    @property
    def blocks(self) -> int:
        """Blocks of 256 that the gradient check counts in."""
        return -(-self.param.numel() // BLOCK)


def scalar(value: Any) -> float:
    """A number that may have come as a tensor of one element."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def local(value: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    inner = getattr(value, "_local_tensor", None)
    return value if inner is None else inner


class BlockOptimizer(torch.optim.Optimizer):
    """Base of the optimizers; use :class:`AdamW` and its siblings."""

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        options: Options,
    ) -> None:
        if not isinstance(params, Iterable):
            raise TypeError(f"params: got {type(params).__name__}, expected parameters or groups")
        for name in ("lr", "eps", "weight_decay"):
            value = real(name, defaults.get(name, 0.0))
            if value < 0.0:
                raise ValueError(f"{name}: got {value}, expected a finite number >= 0")
        betas = defaults["betas"]
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise TypeError(f"betas: got {betas!r}, expected two numbers")
        for i, beta in enumerate(betas):
            if not 0.0 <= real(f"betas[{i}]", beta) < 1.0:
                raise ValueError(f"betas[{i}]: got {beta}, expected 0 <= beta < 1")
        norm = options.max_grad_norm
        if norm is not None and not real("max_grad_norm", norm) > 0.0:
            raise ValueError(f"max_grad_norm: got {norm}, expected a positive number or None")
        if options.stochastic_rounding:
            # Drawn from torch's generator, so that manual_seed decides; saved with the groups.
            defaults = {**defaults, "rounding_seed": int(torch.randint(2**62, (1,)))}
        self._options = options
        self._skips = {"steps": 0, "blocks": 0}
        self._last_skip: dict[str, Any] | None = None
        self._last_norm: float | Tensor | None = None
        self._planner = self._new_planner()
        super().__init__(params, defaults)

    def _new_planner(self) -> Planner:
        options = self._options
        return Planner(options.rule, options.stochastic_rounding, self._norm_limit() is not None)

    def _norm_limit(self) -> float | None:
        """Limit of the global norm; infinite where only a norm that is not finite matters."""
        if self._options.max_grad_norm is not None:
            return self._options.max_grad_norm
        return math.inf if self._options.skip_nonfinite_step else None

    @property
    def last_grad_norm(self) -> float | None:
        """Global gradient norm of the last step; None unless the step had to compute it.

        On a CUDA device, reading it waits for the step.
        """
        return None if self._last_norm is None else float(self._last_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in ``torch.optim``.

        Raises:
            TypeError: a parameter is neither fp32, bf16 nor fp16.
        """
        super().add_param_group(param_group)
        self._planner.forget()
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if p.dtype not in PARAM_DTYPES:
                self.param_groups.pop()
                raise TypeError(
                    f"params[{i}]: got dtype {p.dtype}, expected float32, bfloat16 or float16"
                )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        report = self.nonfinite_report()
        state |= {"_options": self._options, "_last_norm": self.last_grad_norm}
        state["_last_skip"] = report.pop("last")
        return state | {"_skips": report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (planner := self.__dict__.get("_planner")) is not None:
            passes, blocks, _ = planner.skips()
            self._skips["steps"] += passes
            self._skips["blocks"] += blocks
        super().__setstate__(state)
        self._planner = self._new_planner()

    # -- the step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Blocks of 256 elements whose gradient holds NaN or Inf keep their values and their state;
        see :meth:`nonfinite_report`. With ``max_grad_norm`` or ``skip_nonfinite_step`` such a
        gradient anywhere leaves the whole step out.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._planned_step():
            return loss
        work = self._collect()
        if work:
            factor = self._clip_factor(work)
            if factor is None:
                self._note_skip({item.index: item.blocks for item in work}, whole=True)
            else:
                self._advance(work, factor)
        return loss

    def _planned_step(self) -> bool:
        """The step as it was planned, where nothing stands against it."""
        first = next((p for group in self.param_groups for p in group["params"]), None)
        if first is None or first.device.type not in planned.DEVICES:
            return False
        plan = self._planner.find(self._items(), self.state)
        if plan is None:
            return False
        self._last_norm = plan.run(self.param_groups, self._norm_limit())
        if self._planner.news():
            _LOG.warning(
                "gradients held NaN or Inf; what they belong to was left as it is: see "
                "nonfinite_report()"
            )
        return True

    def _items(self) -> Iterator[Item]:
        index = -1
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None and not self.state[parameter]:
                    self._init_state(parameter, self.state[parameter])
                yield Item(parameter, index, number, self.state.get(parameter, {}))

    def _collect(self) -> list[Work]:
        work: list[Work] = []
        index = -1
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                index += 1
                grad = parameter.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError(
                        f"parameter {index}: got a sparse gradient, expected a dense one; "
                        "use sparse=False in the embedding"
                    )
                state = self.state[parameter]
                if not state:
                    self._init_state(parameter, state)
                param = local(parameter).detach()
                work.append(
                    Work(
                        parameter,
                        index,
                        number,
                        param if param.is_contiguous() else param.contiguous(),
                        local(grad).detach().contiguous(),
                        state,
                        0,
                    )
                )
        for item, step in zip(work, steps_of([item.state for item in work]), strict=True):
            item.step = step + 1
        return work

    def _clip_factor(self, work: list[Work]) -> float | None:
        """The factor that clips the global norm; None when the step is to be left out."""
        limit = self._norm_limit()
        if limit is None:
            return 1.0
        norm = interchange.global_norm([(item.parameter, item.grad) for item in work])
        self._last_norm = norm
        return min(1.0, limit / (norm + 1e-6)) if math.isfinite(norm) else None

    def _advance(self, work: list[Work], factor: float) -> None:
        skipped = self._run(work, self._hyper(work, factor))
        for item, blocks in zip(work, skipped, strict=True):
            if blocks < item.blocks or not item.blocks:
                if isinstance(item.state["step"], Tensor):
                    item.state["step"].fill_(item.step)
                else:
                    item.state["step"] = item.step
            target = local(item.parameter).detach()
            if item.param.data_ptr() != target.data_ptr():
                target.copy_(item.param)
        torch.autograd.graph.increment_version([item.parameter for item in work])
        bad = {item.index: n for item, n in zip(work, skipped, strict=True) if n}
        if bad:
            self._note_skip(bad, whole=False)

    def _hyper(self, work: list[Work], factor: float) -> Tensor:
        """fp32 [len(work), 11]; parameters of a group at the same step share their numbers."""
        rows: list[list[float]] = []
        row_of: dict[tuple[int, int], int] = {}
        order = []
        for item in work:
            key = (item.group, item.step)
            if key not in row_of:
                group = self.param_groups[item.group]
                row_of[key] = len(rows)
                rows.append(
                    hyper_row(
                        self._options.rule,
                        lr=scalar(group["lr"]),
                        betas=(float(group["betas"][0]), float(group["betas"][1])),
                        eps=float(group.get("eps", 0.0)),
                        weight_decay=float(group["weight_decay"]),
                        step=item.step,
                        grad_scale=-factor if group.get("maximize") else factor,
                    )
                )
            order.append(row_of[key])
        return torch.tensor(rows)[order]

    def _rounding(self, work: list[Work], firsts: list[int] | None = None) -> Tensor | None:
        if not self._options.stochastic_rounding:
            return None
        seeds = [group["rounding_seed"] for group in self.param_groups]
        return torch.tensor(
            [
                (seeds[item.group], item.step, item.index, 0 if firsts is None else firsts[i])
                for i, item in enumerate(work)
            ]
        )

    def _run(self, work: list[Work], hyper: Tensor) -> list[int]:
        """One pass; returns the number of skipped blocks of each parameter."""
        two = self._options.rule == "adamw"
        nothing = hyper.new_empty(0)
        by_device: dict[torch.device, list[int]] = {}
        for i, item in enumerate(work):
            by_device.setdefault(item.param.device, []).append(i)
        skipped = [0] * len(work)
        for device, rows in by_device.items():
            part = [work[i] for i in rows]
            states = [item.state for item in part]
            empty = nothing.to(device)
            rounding = self._rounding(part)
            result = torch.ops.peftkern.optimizer_step(
                (hyper if len(part) == len(work) else hyper[rows]).to(device),
                [item.param for item in part],
                [item.grad for item in part],
                [local(s["state1"]) for s in states],
                [local(s["state2"]) for s in states] if two else [],
                [s.get("absmax1", empty) for s in states],
                [s.get("absmax2", empty) for s in states] if two else [],
                self._options.rule,
                rounding.to(device) if rounding is not None else None,
            )
            for i, blocks in zip(rows, result.tolist(), strict=True):
                skipped[i] = blocks
        return skipped

    # -- reports ----------------------------------------------------------------------------------

    def _note_skip(self, blocks: dict[int, int], *, whole: bool) -> None:
        self._skips["steps"] += 1
        self._skips["blocks"] += sum(blocks.values())
        self._last_skip = {"parameters": blocks, "whole_step": whole}
        _LOG.warning(
            "gradients with NaN or Inf: %s; what they belong to was left as it is",
            "the whole step was left out" if whole else f"{len(blocks)} parameters hold some",
        )

    def nonfinite_report(self) -> dict[str, Any]:
        """What was left out because of NaN or Inf in gradients.

        Returns:
            ``steps`` and ``blocks`` (of 256 elements) left out so far, and ``last``: None or
            ``{"parameters": {index: blocks}, "whole_step": bool}`` of the last such step.

        Example:
            >>> import torch
            >>> from peftkern.optim import AdamW
            >>> AdamW([torch.zeros(2)]).nonfinite_report()["steps"]
            0
        """
        passes, blocks, last = self._planner.skips()
        report: dict[str, Any] = {
            "steps": self._skips["steps"] + passes,
            "blocks": self._skips["blocks"] + blocks,
            "last": self._last_skip,
        }
        if last:
            sizes = [local(p).numel() for group in self.param_groups for p in group["params"]]
            whole = self._norm_limit() is not None and all(
                n == -(-sizes[number] // BLOCK) for number, n in last.items()
            )
            report["last"] = {"parameters": last, "whole_step": whole}
        return report

    # -- state ------------------------------------------------------------------------------------

    def _eight_bit(self, parameter: Tensor) -> bool:
        numel = local(parameter).numel()
        return self._options.bits == 8 and numel >= self._options.min_8bit_size

    def _init_state(self, parameter: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0
        state.update(
            interchange.fresh_state(
                parameter, self._eight_bit(parameter), self._options.rule == "adamw"
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """The state in bitsandbytes' layout: tensors under ``__bnb_optimizer_quant_state__``.

        8-bit state of DTensors is handed out as fp32 DTensors, so that it can be gathered and
        sharded anew; at the same world size it loads bit for bit.

        Returns:
            ``state`` and ``param_groups``; loads into bitsandbytes' optimizer of the same name.
        """
        result: dict[str, Any] = super().state_dict()
        states = result["state"]
        counted = [key for key, value in states.items() if isinstance(value.get("step"), Tensor)]
        steps = dict(zip(counted, steps_of([states[key] for key in counted]), strict=True))
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, value in states.items():
            sharded = "absmax1" in value and hasattr(parameters[key], "device_mesh")
            state = interchange.spread(value, parameters[key]) if sharded else value
            counted_state = {**state, "step": steps[key]} if key in steps else state
            result["state"][key] = interchange.wrap(counted_state)
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load our state, that of bitsandbytes, or that of ``torch.optim.AdamW`` / ``SGD``.

        State of the other precision is converted; that is said in the log.

        Args:
            state_dict: as returned by ``state_dict()`` of one of those optimizers.

        Raises:
            ValueError: groups, shapes or code tables do not fit; the message names the entry.
        """
        # torch would cast fp32 state to the dtype of the parameter: it gets sealed boxes instead.
        sealed = {**state_dict, "state": interchange.seal(state_dict["state"])}
        for number, group in enumerate(state_dict["param_groups"]):
            if group.get("amsgrad"):
                raise ValueError(f"param_groups[{number}]: amsgrad state cannot be loaded")
        super().load_state_dict(sealed)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            if "momentum" in group and "betas" not in state_dict["param_groups"][0]:
                group["betas"] = (float(group["momentum"]), 0.0)
        index = -1
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                state = self.state.get(parameter)
                if state:
                    self._restore(index, parameter, state.pop("sealed").content, state)

    def _restore(
        self, index: int, parameter: Tensor, loaded: dict[str, Any], state: dict[str, Any]
    ) -> None:
        state["step"] = int(loaded.get("step", 0))
        state.update(
            interchange.adopt(
                f"state of parameter {index}",
                loaded,
                parameter,
                self._eight_bit(parameter),
                self._options.rule == "adamw",
            )
        )
