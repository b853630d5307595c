"""Optimizers whose state does not fit in memory: state in buckets behind a pager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.arguments import folder, whole
from peftkern.ops.optimizer.reference import BLOCK
from peftkern.optim import interchange
from peftkern.optim.base import BlockOptimizer, Params, Work
from peftkern.optim.files import Disk, PagingError, Record, default_disk, newest_record
from peftkern.optim.layout import (
    ALIGN,
    Plane,
    Segment,
    Share,
    bucket_size,
    copy_segment,
    layout_hash,
    planes_of,
)
from peftkern.optim.link import CudaLink, Link
from peftkern.optim.paged_plan import Held, PagedPlanner, Piece
from peftkern.optim.pager import Pager
from peftkern.optim.planned import Planner, steps_of
from peftkern.optim.tier import DeviceTier


class PagedOptimizer(BlockOptimizer):
    """Mixed into an optimizer, pages its state.

    Parameters are on the CPU, or all on one CUDA device. There, state has three places: the
    device's memory up to ``device_budget``, pinned RAM up to ``ram_budget``, and a file.

    Args:
        ram_budget: bytes of RAM for optimizer state; None for no limit. What exceeds it lives in
            a file, is read ahead of its update and written behind it. Change it with
            :meth:`set_ram_budget`.
        device_budget: bytes of a CUDA device's memory for optimizer state; None for no limit, then
            all of it stays there and costs what it costs without paging. Change it with
            :meth:`set_device_budget`.
        page_dir: directory for state that survives the process: two slots a bucket and a journal,
            so that a kill at any moment leaves the last or the next commit. None pages to an
            unnamed temporary file, and only if the budget demands it.
        resume: take over the last commit found in ``page_dir``.
        keep_parameters: commits hold the parameters too, and ``resume`` restores them: a killed
            run goes on from its last commit without a checkpoint. Needs ``page_dir``.
        commit_every: steps from commit to commit. Commits end in the background: a kill loses at
            most the steps since the last but one; :meth:`sync` waits for the last.
        bucket_bytes: size of a bucket; by default 32 MiB, less for small budgets.
        disk: file operations, for tests.
        link: copies between device and host, for tests.
        kwargs: those of the optimizer it is mixed into.

    Raises:
        ValueError: the budget does not hold two buckets, ``page_dir`` already holds a commit and
            ``resume`` is not set, or the commit belongs to other parameters.
        PagingError: files cannot be made or read, or are in use.

    All groups must be given at construction for ``resume``.

    Example:
        >>> import torch
        >>> from peftkern.optim import PagedAdamW
        >>> w = torch.nn.Parameter(torch.zeros(300_000))
        >>> optimizer = PagedAdamW([w], lr=1e-3, ram_budget=1 << 20)
        >>> w.sum().backward(); optimizer.step()
        >>> optimizer.paging_report()["resident_bytes"] <= 1 << 20
        True
        >>> optimizer.close()
    """

    def __init__(
        self,
        params: Params,
        *args: Any,
        ram_budget: int | None = None,
        device_budget: int | None = None,
        page_dir: str | Path | None = None,
        resume: bool = False,
        keep_parameters: bool = False,
        commit_every: int = 1,
        bucket_bytes: int | None = None,
        disk: Disk | None = None,
        link: Link | None = None,
        **kwargs: Any,
    ) -> None:
        if page_dir is None and (resume or keep_parameters):
            raise ValueError("page_dir: got None, expected a directory for what survives a crash")
        whole("commit_every", commit_every)
        for name, budget in (("ram_budget", ram_budget), ("device_budget", device_budget)):
            if budget is not None:
                whole(name, budget, most=2**62)
        directory = None if page_dir is None else folder("page_dir", page_dir)
        if bucket_bytes is None:
            found = None if directory is None else newest_record(directory)[1]
            bucket_bytes = found.bucket_bytes if found else bucket_size(ram_budget, device_budget)
        whole("bucket_bytes", bucket_bytes, 4096, 2**40)
        self._bucket_bytes, self._keep = bucket_bytes, keep_parameters
        self._commit_every, self._runs, self._layout_hash = commit_every, 0, ""
        self._segments: dict[int, list[Segment]] = {}  # by index of the parameter
        self._by_bucket: list[list[Segment]] = []
        self._plan: tuple[list[int], list[Share]] = ([], [])  # by indices of the work
        self._views: dict[int, tuple[int, dict[str, list[Tensor]]]] = {}  # of buckets that stay
        self._settled: tuple[int, list[int], Held] | None = None
        self._pager: Pager | None = None
        self._tier: DeviceTier | None = None
        self._link, self._device_budget = link, device_budget
        super().__init__(params, *args, **kwargs)
        self._pager = Pager(bucket_bytes, ram_budget, directory, disk or default_disk())
        if directory is not None:
            try:
                self._open_directory(directory, resume)
            except BaseException:
                self.store.close()
                raise

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a paged optimizer owns files and a thread: copy its state_dict() instead")

    # -- layout -----------------------------------------------------------------------------------

    @property
    def pager(self) -> Pager:
        """The pager that holds the state."""
        if self._pager is None:
            raise RuntimeError("the optimizer is not built yet")
        return self._pager

    @property
    def store(self) -> Pager | DeviceTier:
        """Where buckets are asked for: the device tier where parameters are on a device."""
        return self.pager if self._tier is None else self._tier

    def _open_tier(self, device: torch.device) -> None:
        """Put the device's memory before the pager's, where there is a device."""
        if self._tier is None and (self._link is not None or device.type == "cuda"):
            link = self._link or CudaLink(device)
            self._tier = DeviceTier(self.pager, link, self._bucket_bytes, self._device_budget)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _planes(self, parameter: Tensor, length: int, offset: int) -> tuple[Plane, ...]:
        states = 2 if self._options.rule == "adamw" else 1
        kept = parameter.dtype if self._keep else None
        return planes_of(states, self._eight_bit(parameter), kept, length, offset)

    def _lay_out(self, indices: list[int]) -> None:
        """Give parameters their places: in order, cut at bucket ends, in multiples of 256."""
        self._forget_plan()
        self._layout_hash = ""
        parameters = self._parameters()
        sizes: list[int] = []
        used = self._bucket_bytes  # never continues a bucket that the pager already has
        for index in indices:
            parameter = parameters[index]
            self._check_device(index, parameter)
            if hasattr(parameter, "device_mesh"):
                raise ValueError(
                    f"parameter {index}: is a DTensor; page the state of plain parameters only"
                )
            segments = self._segments.setdefault(index, [])
            start, numel = 0, parameter.numel()
            per_block = self._planes(parameter, BLOCK, 0)[-1].end
            while start < numel:
                room = self._bucket_bytes - used - 6 * ALIGN
                length = min(numel - start, max(0, room) // per_block * BLOCK)
                if length == 0:
                    self._by_bucket.append([])
                    sizes.append(0)
                    used = 0
                    continue
                bucket = len(self._by_bucket) - 1
                planes = self._planes(parameter, length, used)
                segment = Segment(index, start, length, bucket, planes)
                segments.append(segment)
                self._by_bucket[-1].append(segment)
                used = sizes[-1] = -(-planes[-1].end // ALIGN) * ALIGN
                start += length
        if sizes:
            self.store.extend(sizes)

    def _check_device(self, index: int, parameter: Tensor) -> None:
        device = parameter.device
        expected = self._parameters()[0].device
        if device.type not in ("cpu", "cuda") or device != expected:
            raise ValueError(
                f"parameter {index}: is on {device}, the first one on {expected}; paged "
                "optimizers need all parameters on the CPU, or on one CUDA device"
            )
        if device.type == "cuda" or self._link is not None:
            self._open_tier(device)
        elif self._tier is not None:
            raise ValueError(f"parameter {index}: was on a device when the first step was taken")

    def _ensure_layout(self, indices: list[int]) -> None:
        missing = [index for index in indices if index not in self._segments]
        if missing:
            if not self._segments:
                trained = [i for i, p in enumerate(self._parameters()) if p.requires_grad]
                missing = sorted({*missing, *trained})
            self._lay_out(missing)

    def _fingerprint(self) -> str:
        if not self._layout_hash:
            about = (self._options.rule, self._options.bits, self._keep)
            self._layout_hash = layout_hash(about, self._parameters(), self._segments)
        return self._layout_hash

    # -- commits ----------------------------------------------------------------------------------

    def _open_directory(self, directory: Path, resume: bool) -> None:
        record = self.store.recover()
        if record is not None and not resume:
            raise ValueError(
                f"page_dir: {directory} holds the state of another run; pass resume=True to go "
                "on with it, or another directory"
            )
        parameters = self._parameters()
        self._ensure_layout([i for i, p in enumerate(parameters) if p.requires_grad])
        if record is None:
            if self._keep:
                self._store_parameters()
            self._end(commit=True)
            self.store.settle()
            return
        if record.layout != self._fingerprint():
            raise ValueError(
                f"page_dir: {directory} belongs to other parameters, another optimizer or another "
                "bucket size; build the same ones, or use another directory"
            )
        self.store.adopt(record)
        for index, step in enumerate(record.steps):
            if step >= 0:
                self.state[parameters[index]]["step"] = step
        for group, seed in zip(self.param_groups, record.seeds, strict=False):
            group["rounding_seed"] = seed
        if self._keep:
            self._load_parameters()

    def _end(self, *, commit: bool) -> None:
        if not (commit and self.store.persistent):
            self.store.end(None)
            return
        steps = steps_of([self.state.get(p) or {"step": -1} for p in self._parameters()])
        seeds = [g["rounding_seed"] for g in self.param_groups if "rounding_seed" in g]
        self.store.end(Record(self._fingerprint(), [], [], steps, self._bucket_bytes, seeds))

    def _each_bucket(self) -> list[int]:
        order = list(range(len(self._by_bucket)))
        self.store.begin(order)
        return order

    @torch.no_grad()
    def _store_parameters(self) -> None:
        flats = [p.detach().contiguous().view(-1) for p in self._parameters()]
        for number in self._each_bucket():
            bucket = self.store.acquire(number)
            for segment in self._by_bucket[number]:
                stored = segment.tensor("param", bucket)
                assert stored is not None
                end = segment.start + segment.length
                stored.copy_(flats[segment.parameter][segment.start : end])
            self.store.release(number, dirty=True)

    @torch.no_grad()
    def _load_parameters(self) -> None:
        parameters = self._parameters()
        flats = [p.detach().contiguous().view(-1) for p in parameters]
        for number in self._each_bucket():
            bucket = self.store.acquire(number)
            for segment in self._by_bucket[number]:
                stored = segment.tensor("param", bucket)
                assert stored is not None
                end = segment.start + segment.length
                flats[segment.parameter][segment.start : end] = stored
            self.store.release(number, dirty=False)
        for parameter, flat in zip(parameters, flats, strict=True):
            if parameter.detach().data_ptr() != flat.data_ptr():
                parameter.copy_(flat.view(parameter.shape))

    # -- the step ---------------------------------------------------------------------------------

    def _init_state(self, parameter: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0

    def _new_planner(self) -> Planner:
        options = self._options
        norm = self._norm_limit() is not None
        return PagedPlanner(self, options.rule, options.stochastic_rounding, norm)

    def _planned_step(self) -> bool:
        tier = self._tier
        if tier is not None and not tier.resident() and tier.link.capturing():
            raise RuntimeError(
                "a CUDA graph cannot capture a step whose state passes through the device; lift "
                "device_budget, or step outside the graph"
            )
        if not super()._planned_step():
            return False
        self._end_run()
        return True

    def ensure_layout(self, numbers: list[int]) -> None:
        """Give parameters their places, and check those that have some."""
        parameters = self._parameters()
        for number in numbers:
            self._check_device(number, parameters[number])
        self._ensure_layout(numbers)

    def pieces(self) -> list[list[Piece]]:
        """What lies in each bucket."""
        return [list(segments) for segments in self._by_bucket]

    def pass_through(
        self,
        buckets: list[int],
        resident: Callable[[Held], None],
        update: Callable[[int, Tensor], None],
    ) -> None:
        """Call ``resident`` with those that stay in place, ``update`` with each of the others."""
        store = self.store
        # What a commit writes is better handed back one by one, so that writing begins early.
        together = not (store.persistent and self._commits_now())
        kept = [number for number in buckets if together and store.keeps(number)]
        others = buckets if not together else [n for n in buckets if not store.keeps(n)]
        if self._runs % 2:
            others = others[::-1]  # starts with the buckets that the last step ended with
        store.begin(kept + others, commit=self._commits_now())
        held = [(number, store.acquire(number)) for number in kept]
        if held:
            resident(held)
        for number, bucket in held:
            self._note_parameters(number, bucket)
            store.release(number, dirty=True)
        for number in others:
            bucket = store.acquire(number)
            update(number, bucket)
            self._note_parameters(number, bucket)
            store.release(number, dirty=True)
        # Everything stays and is marked as changed: the next pass need not ask for it.
        self._settled = None
        if not others and not store.persistent:
            self._settled = (store.version, buckets, held)

    def settled(self, buckets: list[int]) -> Held | None:
        """The bytes of buckets that the last pass left in place; None where it may be otherwise."""
        known = self._settled
        if known is None or known[0] != self.store.version or known[1] != buckets:
            return None
        self.store.pass_resident(len(buckets))
        return known[2]

    def _note_parameters(self, number: int, bucket: Tensor) -> None:
        """Put the updated parameters beside their state, where commits hold them."""
        if not self._keep:
            return
        parameters = self._parameters()
        for segment in self._by_bucket[number]:
            if (stored := segment.tensor("param", bucket)) is not None:
                stored.copy_(segment.part(parameters[segment.parameter].detach()))

    def _advance(self, work: list[Work], factor: float) -> None:
        super()._advance(work, factor)
        self._end_run()

    def _end_run(self) -> None:
        commit = self._commits_now()
        self._runs += 1
        self._end(commit=commit)

    def _commits_now(self) -> bool:
        return (self._runs + 1) % self._commit_every == 0

    def _forget_plan(self) -> None:
        self._plan = ([], [])
        self._forget_places()

    def _forget_places(self) -> None:
        """Hold no views of buckets that may be moved or given up."""
        self._views.clear()
        self._settled = None

    def _shares(self, work: list[Work]) -> list[Share]:
        """The buckets that hold state of these parameters; most steps repeat the last one's."""
        indices = [item.index for item in work]
        if self._plan[0] != indices:
            self._ensure_layout(indices)
            self._forget_plan()
            row_of = {index: i for i, index in enumerate(indices)}
            shares = []
            for number, segments in enumerate(self._by_bucket):
                mine = [segment for segment in segments if segment.parameter in row_of]
                if mine:
                    rows = [row_of[segment.parameter] for segment in mine]
                    partial = [
                        (i, segment)
                        for i, segment in enumerate(mine)
                        if segment.length != work[rows[i]].param.numel()
                    ]
                    shares.append(Share(number, mine, rows, torch.tensor(rows), partial))
            self._plan = (indices, shares)
        return self._plan[1]

    def _run(self, work: list[Work], hyper: Tensor) -> list[int]:
        shares = self._shares(work)
        if self._runs % 2:
            shares = shares[::-1]  # starts with the buckets that the last step ended with
        results = []
        self.store.begin([share.bucket for share in shares], commit=self._commits_now())
        for share in shares:
            bucket = self.store.acquire(share.bucket)
            results.append(self._update(share, bucket, work, hyper))
            self.store.release(share.bucket, dirty=True)
        skipped = [0] * len(work)
        if results:  # one question to the device, once everything is under way
            found = torch.cat(results).tolist()
            for row, blocks in zip((r for s in shares for r in s.rows), found, strict=True):
                skipped[row] += blocks
        return skipped

    def _planes_of(self, share: Share, bucket: Tensor) -> dict[str, list[Tensor]]:
        """Views of a bucket by name, one a segment; kept for buckets that stay where they are."""
        address, known = self._views.get(share.bucket, (0, {}))
        if address == bucket.data_ptr():
            return known
        empty = torch.empty(0, device=bucket.device)
        views: dict[str, list[Tensor]] = {
            name: [empty] * len(share.segments)
            for name in ("state1", "state2", "absmax1", "absmax2", "param")
        }
        typed: dict[torch.dtype, Tensor] = {}
        for i, segment in enumerate(share.segments):
            for plane in segment.planes:
                whole = typed.get(plane.dtype)
                if whole is None:
                    whole = typed[plane.dtype] = bucket.view(plane.dtype)
                size = plane.dtype.itemsize
                views[plane.name][i] = whole[plane.offset // size : plane.end // size]
        if self.store.keeps(share.bucket):
            self._views[share.bucket] = (bucket.data_ptr(), views)
        return views

    def _update(self, share: Share, bucket: Tensor, work: list[Work], hyper: Tensor) -> Tensor:
        two = self._options.rule == "adamw"
        views = self._planes_of(share, bucket)
        items = [work[row] for row in share.rows]
        params = [item.param for item in items]
        grads = [item.grad for item in items]
        for i, segment in share.partial:
            params[i], grads[i] = segment.part(params[i]), segment.part(grads[i])
        rounding = None
        if self._options.stochastic_rounding:
            rounding = self._rounding(items, [segment.start for segment in share.segments])
        device = bucket.device
        result: Tensor = torch.ops.peftkern.optimizer_step(
            hyper[share.index].to(device),
            params,
            grads,
            views["state1"],
            views["state2"] if two else [],
            views["absmax1"],
            views["absmax2"] if two else [],
            self._options.rule,
            None if rounding is None else rounding.to(device),
        )
        if self._keep:
            for param, stored in zip(params, views["param"], strict=True):
                stored.copy_(param.view(-1))
        return result

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole state in bitsandbytes' layout, on the CPU; needs memory for all of it.

        Raises:
            PagingError: state cannot be written behind or read back.
        """
        result = super().state_dict()
        parameters = self._parameters()
        whole: dict[int, dict[str, Any]] = {}
        for index in self._segments:
            if parameters[index] in self.state:
                parameter = parameters[index]
                whole[index] = interchange.fresh_state(
                    parameter,
                    self._eight_bit(parameter),
                    self._options.rule == "adamw",
                    torch.device("cpu"),
                )
        for number in self._each_bucket():
            bucket = self.store.acquire(number)
            for segment in self._by_bucket[number]:
                if segment.parameter in whole:
                    copy_segment(segment, bucket, whole[segment.parameter], into_bucket=False)
            self.store.release(number, dirty=False)
        for index, tensors in whole.items():
            step = result["state"][index]["step"]
            result["state"][index] = interchange.wrap({"step": step, **tensors})
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as :meth:`BlockOptimizer.load_state_dict` does; residency follows the budget."""
        self.store.begin([])
        super().load_state_dict(state_dict)
        self._end(commit=True)

    def _restore(
        self, index: int, parameter: Tensor, loaded: dict[str, Any], state: dict[str, Any]
    ) -> None:
        whole: dict[str, Any] = {}
        super()._restore(index, parameter, loaded, whole)
        state["step"] = whole["step"]
        self._ensure_layout([index])
        flat = parameter.detach().contiguous().view(-1)
        for segment in self._segments[index]:
            bucket = self.store.acquire(segment.bucket)
            copy_segment(segment, bucket, whole, into_bucket=True)
            stored = segment.tensor("param", bucket)
            if stored is not None:
                stored.copy_(flat[segment.start : segment.start + segment.length])
            self.store.release(segment.bucket, dirty=True)

    # -- for the user -----------------------------------------------------------------------------

    def set_ram_budget(self, ram_budget: int | None) -> None:
        """Change the RAM budget now; None lifts it.

        Raises:
            ValueError: it does not hold two buckets.
            PagingError: what has to leave RAM cannot be written.
        """
        self._forget_places()
        if self._tier is not None:
            self._tier.set_ram_budget(ram_budget)
        else:
            self.pager.set_budget(ram_budget)

    def set_device_budget(self, device_budget: int | None) -> None:
        """Change the budget of device memory now; None lifts it. Does nothing without a device.

        Raises:
            ValueError: it does not hold two buckets.
            PagingError: what has to leave the device cannot be written.
        """
        self._forget_places()
        self._device_budget = device_budget
        if self._tier is not None:
            self._tier.set_device_budget(device_budget)

    def sync(self) -> None:
        """Wait for background writing; with a ``page_dir`` the last step is durable then.

        Raises:
            PagingError: something could not be written; it is still whole in memory.
        """
        if self.store.persistent and self._runs % self._commit_every:
            self.store.settle()
            self._end(commit=True)
        self.store.settle()

    def paging_report(self) -> dict[str, Any]:
        """What paging did so far.

        Returns:
            ``total_bytes`` of state, ``resident_bytes`` now in RAM, ``ram_budget``, ``buckets``,
            ``kept_buckets`` that always stay, ``hits``, ``misses``, ``hit_rate``, ``bytes_read``,
            ``bytes_written``, ``stall_seconds`` that steps waited, ``commits``, and ``history``: a
            dict for each of the last 1000 passes over the state (steps, and what loads state or
            takes up a directory) with its number ``step``, ``step_seconds`` from the first bucket
            to the last, ``stall_seconds``, ``resident_bytes``, ``bytes_read``, ``bytes_written``,
            ``hits`` and ``misses``. :func:`~peftkern.optim.paging_svg` draws it.
        """
        return self.store.report()

    def close(self) -> None:
        """Finish writing and release the files and the thread; the optimizer ends here.

        Raises:
            PagingError: something could not be written.
        """
        self._forget_places()
        self.store.close()

    def __enter__(self) -> PagedOptimizer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


__all__ = ["PagedOptimizer", "PagingError"]
