"""``LoRAEmbedding``: a low-rank adapter beside a frozen embedding table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from peftkern.arguments import real, whole
from peftkern.nn.adapter import check_adapter_name
from peftkern.nn.lora_init import check_initialisation
from peftkern.nn.rows import by_rows
from peftkern.nn.weight_adapter import WeightAdapter


class LoRAEmbedding(WeightAdapter):
    """``y = base(ids) + scaling * A^T[ids] B^T`` for every active adapter.

    Args:
        base_layer: ``nn.Embedding``; frozen in place and not copied.
        r: rank.
        lora_alpha: numerator of the scaling.
        use_rslora: scaling lora_alpha / sqrt(r) instead of lora_alpha / r.
        adapter_name: name of the first adapter.
        init_lora_weights: True or ``"gaussian"`` (A zero, B ~ N(0, 1)), or False (both random).
        lora_dtype: dtype of A and B, float32 when left out.

    Raises:
        TypeError: not an ``nn.Embedding``.
        ValueError: a number out of range, or a table with ``max_norm``.

    Attribute names are PEFT's: ``lora_embedding_A[name]`` [r, vocabulary] and
    ``lora_embedding_B[name]`` [width, r], bare parameters. As in PEFT there is no dropout.

    Example:
        >>> layer = LoRAEmbedding(torch.nn.Embedding(100, 32), r=4)
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 32])
    """

    _adapter_containers = ("lora_embedding_A", "lora_embedding_B")
    _adapter_tables = ("r", "lora_alpha", "use_rslora", "scaling")
    serves_rows = True

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        adapter_name: str = "default",
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(base_layer, nn.Embedding):
            raise TypeError(f"base_layer: expected nn.Embedding, got {type(base_layer).__name__}")
        if base_layer.max_norm is not None:
            raise ValueError("base_layer: max_norm changes the table in every forward pass")
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.training = base_layer.training
        self.add_adapter(adapter_name, r, lora_alpha, use_rslora, init_lora_weights, lora_dtype)

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter and make it the active one; arguments as for the class.

        Raises:
            ValueError: the name is taken or not usable, or a number is out of range.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.lora_embedding_A:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        if self.merged:
            raise RuntimeError("adapters are merged into the base; unmerge before adding another")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r: expected a positive integer, got {r!r}")
        whole("r", r)
        real("lora_alpha", lora_alpha)
        check_initialisation(init_lora_weights)
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights: {init_lora_weights!r} is for linear layers; an embedding "
                "takes True, 'gaussian' or False"
            )
        table = self.base_layer.weight
        where = table.device if table.device.type == "meta" else torch.device("cpu")
        # Drawn on the CPU in PEFT's order, as for linear layers.
        down = torch.randn(r, self.base_layer.num_embeddings, device=where)
        up = torch.randn(self.base_layer.embedding_dim, r, device=where)
        if init_lora_weights is not False:
            down.zero_()
            up.normal_()
        kind = lora_dtype if lora_dtype is not None else torch.float32
        self.lora_embedding_A[adapter_name] = nn.Parameter(down.to(table.device, kind))
        self.lora_embedding_B[adapter_name] = nn.Parameter(up.to(table.device, kind))
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = bool(use_rslora)
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.set_adapter(adapter_name)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, vocabulary] and B [width, r] of one adapter."""
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def forward(self, ids: Tensor) -> Tensor:
        """The adapted rows; ids [...] -> [..., width] in the dtype of the table."""
        if self._disable_adapters or self.merged_adapters:
            return self.base_layer(ids)
        choice = self.row_choice()
        if choice is None:
            return self._sum(ids, self._active_adapter)
        known = self.adapter_names
        return by_rows(choice, ids, lambda name, part: self._sum(part, (name,)), known)

    def _sum(self, ids: Tensor, names: Sequence[str | None]) -> Tensor:
        base = self.base_layer
        y = base(ids)
        for name in names:
            if name is None or name not in self.lora_embedding_A:
                continue
            down, up = self.factors(name)
            rows = tnf.embedding(
                ids,
                down.t(),
                base.padding_idx,
                scale_grad_by_freq=base.scale_grad_by_freq,
                sparse=base.sparse,
            )
            term = (rows @ up.t()) * self.scaling[name]
            scale = getattr(base, "embed_scale", None)  # Gemma's tables scale their rows
            if scale is not None:
                term = term * (scale.to(term.dtype) if isinstance(scale, Tensor) else scale)
            y = (y + term).to(y.dtype)
        return y

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """The update of one adapter as the table is stored: fp32 [vocabulary, width]."""
        down, up = self.factors(name)
        return (up.float() @ down.float()).t() * self.scaling[name]

    def extra_repr(self) -> str:
        active = ",".join(self._active_adapter)
        state = ", disabled" if self._disable_adapters else ", merged" if self.merged else ""
        return f"r={self.r}, active={active!r}{state}"
