"""``importance``: scores of frozen weights, streamed over batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.arguments import require_model, whole
from peftkern.select.batches import first_loss, to_device
from peftkern.select.scores import GRANULARITIES, SCORES, Scores
from peftkern.select.weights import Target, row_blocks, rows_of, targets_of

Progress = Callable[[int, int | None, float], None]
Loss = Callable[[nn.Module, Any], Tensor]


def importance(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    score: str = "taylor",
    granularity: str = "entry",
    loss_fn: Loss | None = None,
    batches: int | None = None,
    progress: Progress | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Scores:
    """How much each weight of the linear layers matters for a loss or a data set.

    ========== ==================================== =========================================
    score      of a weight w with gradient g        source
    ========== ==================================== =========================================
    magnitude  abs(w)                               no data needed
    gradient   mean of abs(g)
    taylor     mean of abs(w g)                     Molchanov 2019; SNIP (arXiv 1810.02340)
    fisher     mean of g²                           empirical Fisher; FISH (arXiv 2111.09839)
    activation abs(w) times the norm of its input   Wanda (arXiv 2306.11695); forward only
    ========== ==================================== =========================================

    The mean is over batches, and g is a batch's gradient. Weights stay frozen: a layer's gradient
    is formed from its input and output gradient, a block of rows at a time, used and dropped, so
    quantized weights are scored like dense ones. Memory beside a forward and backward pass over
    frozen weights: one score a weight (fp32: 4 bytes; 2 with ``dtype=torch.bfloat16``; on the host
    with ``device="cpu"``) for entries, next to nothing for rows and modules, and blocks of 4
    million elements. Only a layer that runs several times in one pass needs a gradient of its own
    size.

    Parameters, ``grad`` fields, flags and modes of the model are what they were afterwards;
    gradient checkpointing is switched off meanwhile. Dropout acts if the model is training.

    Args:
        model: any module; a Hugging Face model computes its loss itself, from ``labels``.
        loader: batches: mappings (keyword arguments), tuples or lists (positional), or tensors.
        score: see above.
        granularity: ``"entry"``, ``"row"`` or ``"module"``; the coarser ones are sums of entries.
        loss_fn: ``loss_fn(model, batch)`` gives the scalar loss; default: the output's ``loss``.
        batches: stop after this many; default: all.
        progress: called as ``progress(done, total or None, loss)`` after each batch.
        target_modules: which layers, as in :class:`peftkern.LoRAConfig`.
        exclude_modules: which not.
        dtype: of stored entry scores: float32 or bfloat16.
        device: where scores are kept; default: beside their weights.

    Returns:
        The scores; ``print`` them for a table.

    Raises:
        TypeError: the model's output has no loss and no loss_fn is given.
        ValueError: unknown score or granularity, no batches, nothing to score, or no gradient
            reached some layer.

    Example:
        >>> import torch, peftkern as pk
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> data = [torch.randn(4, 8) for _ in range(3)]
        >>> scores = pk.importance(net, data, "taylor", loss_fn=lambda m, x: m(x).square().mean())
        >>> scores.values["0"].shape, scores.batches
        (torch.Size([8, 8]), 3)
    """
    require_model("model", model)
    if score not in SCORES:
        raise ValueError(f"score: got {score!r}, expected one of {', '.join(SCORES)}")
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity: got {granularity!r}, expected one of {', '.join(GRANULARITIES)}"
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: got {dtype}, expected torch.float32 or torch.bfloat16")
    if batches is not None:
        whole("batches", batches)
    targets = targets_of(model, target_modules, exclude_modules)
    kept = {t.name: _Kept(t, granularity, dtype, device) for t in targets}
    done = 0
    if score == "magnitude":
        for target in targets:
            for first, last in row_blocks(target):
                kept[target.name].add(first, last, rows_of(target, first, last).abs())
    else:
        if loader is None:
            raise ValueError(f"loader: got None, expected batches: score {score!r} needs data")
        done = _stream(model, loader, targets, kept, score, loss_fn, batches, progress)
    values = {name: each.result(done or 1) for name, each in kept.items()}
    return Scores(values, {t.name: t.shape for t in targets}, score, granularity, done)


class _Kept:
    """The running sum of one layer's scores."""

    def __init__(self, target: Target, granularity: str, dtype: torch.dtype, device: Any) -> None:
        rows, columns = target.shape
        shapes = {"entry": (rows, columns), "row": (rows,), "module": ()}
        kind = dtype if granularity == "entry" else torch.float32
        place = next(target.base.parameters()).device if device is None else device
        self.granularity = granularity
        self.total = torch.zeros(shapes[granularity], dtype=kind, device=place)

    def add(self, first: int, last: int, block: Tensor) -> None:
        """Add the scores [last - first, in] of a block of rows, fp32."""
        if self.granularity == "module":
            self.total += block.sum().to(self.total.device)
            return
        part = block if self.granularity == "entry" else block.sum(1)
        here = self.total[first:last]
        here.copy_(here.float() + part.to(here.device))

    def result(self, batches: int) -> Tensor:
        return self.total.div_(batches)


def _stream(
    model: nn.Module,
    loader: Iterable[Any],
    targets: list[Target],
    kept: dict[str, _Kept],
    score: str,
    loss_fn: Loss | None,
    batches: int | None,
    progress: Progress | None,
) -> int:
    total = batches
    if isinstance(loader, Sized):
        length = len(loader)
        total = length if batches is None else min(batches, length)
    place = next(model.parameters()).device
    done = 0
    watch: Inputs | Gradients
    watch = Inputs(targets) if score == "activation" else Gradients(targets)
    with watch.attached(model):
        for batch in itertools.islice(loader, batches):
            batch = to_device(batch, place)
            if isinstance(watch, Gradients):
                loss = watch.backward(model, batch, loss_fn, _use(kept, score))
            else:
                with torch.no_grad():
                    loss = float("nan")
                    if loss_fn is not None:
                        loss = float(loss_fn(model, batch))
                    else:
                        first_loss(model, batch, needed=False)
            done += 1
            if progress is not None:
                progress(done, total, loss)
        if done == 0:
            raise ValueError("loader: gave no batch")
    if isinstance(watch, Inputs):
        for target in targets:
            norm = watch.norm(target)
            for first, last in row_blocks(target):
                block = rows_of(target, first, last).abs() * norm
                kept[target.name].add(first, last, block * done)  # result() divides again
    return done


def _use(kept: dict[str, _Kept], score: str) -> Callable[[Target, int, int, Tensor], None]:
    def use(target: Target, first: int, last: int, gradient: Tensor) -> None:
        if score == "gradient":
            block = gradient.abs_()
        elif score == "fisher":
            block = gradient.square_()
        else:
            block = gradient.mul_(rows_of(target, first, last)).abs_()
        kept[target.name].add(first, last, block)

    return use


class Inputs:
    """Sums of squares of each input feature of the targets, over all rows of all batches."""

    def __init__(self, targets: list[Target]) -> None:
        self.targets = targets
        self.squares: dict[str, Tensor] = {}

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Listen within the block."""
        with ExitStack() as stack:
            for target in self.targets:
                handle = target.layer.register_forward_pre_hook(self._listen(target))
                stack.callback(handle.remove)
            yield

    def _listen(self, target: Target) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, target.shape[1])
            step = max(1, (1 << 22) // max(1, x.shape[1]))
            for part in x.split(step):
                sums = part.float().square().sum(0, dtype=torch.float64)
                before = self.squares.get(target.name)
                self.squares[target.name] = sums if before is None else before + sums

        return hook

    def norm(self, target: Target) -> Tensor:
        """fp32 [in]: the root of the sums.

        Raises:
            ValueError: the layer was never called.
        """
        if target.name not in self.squares:
            raise ValueError(f"loader: no batch reached {target.name}; leave it out")
        return self.squares[target.name].sqrt().float()


class Gradients:
    """Gradients of frozen weights, formed block by block while a backward pass goes by."""

    def __init__(self, targets: list[Target]) -> None:
        self.targets = targets
        self._open: dict[str, int] = {}
        self._pending: dict[str, Tensor] = {}
        self._reached: set[str] = set()
        self._use: Callable[[Target, int, int, Tensor], None] | None = None

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Freeze the parameters and listen within the block; everything is put back after it."""
        flags = [(p, p.requires_grad) for p in model.parameters()]
        switches = [
            m for m in model.modules() if isinstance(vars(m).get("gradient_checkpointing"), bool)
        ]
        before = [bool(m.gradient_checkpointing) for m in switches]
        with ExitStack() as stack:
            for parameter, flag in flags:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, flag)
            for module, flag in zip(switches, before, strict=True):
                stack.callback(setattr, module, "gradient_checkpointing", flag)
                setattr(module, "gradient_checkpointing", False)  # noqa: B010 - nn.Module hides it
            for target in self.targets:
                handle = target.layer.register_forward_hook(self._listen(target))
                stack.callback(handle.remove)
            yield
        missed = [t.name for t in self.targets if t.name not in self._reached]
        if missed:
            raise ValueError(
                f"loader: no gradient reached {len(missed)} layers ({missed[0]}, ...); the loss "
                "does not depend on them. Leave them out with exclude_modules or target_modules"
            )

    def backward(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: Loss | None,
        use: Callable[[Target, int, int, Tensor], None],
    ) -> float:
        """One batch; ``use(target, first, last, gradient)`` gets blocks of rows, fp32, to keep.

        Returns:
            The loss.
        """
        self._use = use
        self._open.clear()
        with torch.enable_grad():
            loss = first_loss(model, batch) if loss_fn is None else loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TypeError("loss_fn: expected a tensor with one element as the loss")
            if loss.requires_grad:
                loss.backward()
        for target in self.targets:  # calls of which some gave no gradient
            if target.name in self._pending:
                self._finish(target, self._pending.pop(target.name))
        return float(loss.detach())

    def _listen(self, target: Target) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            inside = torch._C._current_graph_task_id() != -1
            if inside and self._open.get(target.name, 0) > 0:
                return None  # the recomputation of a call that is listened to already
            changed = None
            if not y.requires_grad:
                y = changed = y.detach().requires_grad_()
            x = args[0].detach()
            self._open[target.name] = self._open.get(target.name, 0) + 1
            y.register_hook(lambda dy: self._take(target, dy, x))
            return changed

        return hook

    @torch.no_grad()
    def _take(self, target: Target, dy: Tensor, x: Tensor) -> None:
        rows, columns = target.shape
        dy, x = dy.reshape(-1, rows), x.reshape(-1, columns)
        self._reached.add(target.name)
        self._open[target.name] -= 1
        waiting = self._pending.pop(target.name, None)
        if waiting is None and self._open[target.name] == 0:
            assert self._use is not None
            for first, last in row_blocks(target):
                self._use(target, first, last, _outer(dy[:, first:last], x))
            return
        gradient = _outer(dy, x) if waiting is None else waiting + _outer(dy, x)
        if self._open[target.name] == 0:
            self._finish(target, gradient)
        else:
            self._pending[target.name] = gradient

    def _finish(self, target: Target, gradient: Tensor) -> None:
        assert self._use is not None
        for first, last in row_blocks(target):
            self._use(target, first, last, gradient[first:last])


def _outer(dy: Tensor, x: Tensor) -> Tensor:
    # Not under the autocast that the caller's loop may be in: sums over many rows need fp32.
    with torch.autocast(dy.device.type, enabled=False):
        return dy.float().t() @ x.float()
