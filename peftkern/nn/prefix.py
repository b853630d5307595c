"""Trainable keys and values for every layer's attention (arXiv 2101.00190)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkern.arguments import whole
from peftkern.functional.prefix import prefix_attention
from peftkern.nn.adapter import AdapterLayer, check_adapter_name

# Where an attention module of a patched model keeps which prefix it uses.
PREFIX_LINK = "_peftkern_prefix"


class PrefixEncoder(nn.Module):
    """One adapter's prefix: a table, or a smaller one with PEFT's two-layer MLP behind it.

    Args:
        num_virtual_tokens: P, positions in front of the sequence.
        token_dim: width of one layer's keys: heads of keys times their size.
        num_layers: attention layers.
        encoder_hidden_size: width of the MLP; ``None`` trains the keys and values themselves.
        init_weights: ``None`` (random) or ``"zero"``.
        dtype: of the trained tensors.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        token_dim: int,
        num_layers: int,
        encoder_hidden_size: int | None = None,
        init_weights: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        width = num_layers * 2 * token_dim
        projected = encoder_hidden_size is not None
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim if projected else width)
        self.transform: nn.Sequential | None = None
        last: nn.Module = self.embedding
        if encoder_hidden_size is not None:
            last = nn.Linear(encoder_hidden_size, width)
            first = nn.Linear(token_dim, encoder_hidden_size)
            self.transform = nn.Sequential(first, nn.Tanh(), last)
        if init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.to(dtype)

    def forward(self) -> Tensor:
        """The prefix of all layers, [P, num_layers * 2 * token_dim], as PEFT stores it."""
        table = self.embedding.weight
        return table if self.transform is None else self.transform(table)


class PrefixTuning(AdapterLayer):
    """Named prefixes for the attention layers of a model; at most one is active.

    Args:
        num_virtual_tokens: P, positions in front of the sequence.
        num_layers: attention layers.
        num_heads: heads of keys and values (with grouped queries fewer than of queries).
        head_dim: size of a head.
        adapter_name: name of the first prefix.
        encoder_hidden_size: width of the reparametrization MLP; ``None`` for none.
        init_weights: ``None`` (random) or ``"zero"``.
        dtype: of the trained tensors.

    Example:
        >>> import torch
        >>> prefix = PrefixTuning(num_virtual_tokens=4, num_layers=2, num_heads=2, head_dim=16)
        >>> q, k, v = (torch.randn(1, heads, 5, 16) for heads in (4, 2, 2))
        >>> prefix(q, k, v, layer=0, is_causal=True).shape
        torch.Size([1, 4, 5, 16])
    """

    _adapter_containers = ("prefix_encoder",)

    def __init__(
        self,
        num_virtual_tokens: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        adapter_name: str = "default",
        encoder_hidden_size: int | None = None,
        init_weights: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_layers = whole("num_layers", num_layers)
        self.num_heads = whole("num_heads", num_heads)
        self.head_dim = whole("head_dim", head_dim)
        self.prefix_encoder = nn.ModuleDict()
        self._drawn: list[Tensor] | None = None
        self.add_adapter(adapter_name, num_virtual_tokens, encoder_hidden_size, init_weights, dtype)

    def add_adapter(
        self,
        adapter_name: str,
        num_virtual_tokens: int,
        encoder_hidden_size: int | None = None,
        init_weights: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add another prefix and make it the active one.

        Raises:
            TypeError: a size is no int.
            ValueError: a prefix of this name exists, or a size is out of range.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.prefix_encoder:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        whole("num_virtual_tokens", num_virtual_tokens)
        if encoder_hidden_size is not None:
            whole("encoder_hidden_size", encoder_hidden_size)
        if init_weights not in (None, "zero"):
            raise ValueError(f"init_weights: got {init_weights!r}, expected None or 'zero'")
        held = next(self.parameters(), None)
        encoder = PrefixEncoder(
            num_virtual_tokens,
            self.num_heads * self.head_dim,
            self.num_layers,
            encoder_hidden_size,
            init_weights,
            dtype,
        )
        self.prefix_encoder[adapter_name] = encoder if held is None else encoder.to(held.device)
        self.set_adapter(adapter_name)

    @property
    def active_prefix(self) -> PrefixEncoder | None:
        """The prefix that takes part in the forward pass; ``None`` while there is none."""
        for name in () if self._disable_adapters else self._active_adapter:
            if name in self.prefix_encoder:
                encoder = self.prefix_encoder[name]
                assert isinstance(encoder, PrefixEncoder)
                return encoder
        return None

    @property
    def num_virtual_tokens(self) -> int:
        """Length of the active prefix; 0 while there is none."""
        encoder = self.active_prefix
        return 0 if encoder is None else encoder.embedding.num_embeddings

    def check(self, names: list[str]) -> None:
        """Refuse two prefixes at once: neither would be what was trained."""
        here = [name for name in names if name in self.prefix_encoder]
        if len(here) > 1:
            raise ValueError(f"names: {', '.join(here)} are prefixes, of which one can be active")

    def example_call(self, name: str) -> tuple[str, tuple[Any, ...]] | str:
        """Attention over 8 positions with this prefix."""
        encoder = self.prefix_encoder[name]
        assert isinstance(encoder, PrefixEncoder)
        table = encoder.embedding.weight
        q = table.new_empty((1, self.num_heads, 8, self.head_dim))
        prefix = table.new_empty((self.num_heads, encoder.embedding.num_embeddings, self.head_dim))
        arguments = (q, q, q, prefix, prefix, None, True, self.head_dim**-0.5, 0.0, None)
        return "prefix_attention", arguments

    def draw(self) -> None:
        """Compute the active prefix for a forward pass over all layers, once."""
        encoder = self.active_prefix
        if encoder is None:
            self._drawn = None
            return
        shape = (-1, 2 * self.num_layers, self.num_heads, self.head_dim)
        # [2 L, H, P, D] in one copy, so that each layer's gradient is added up in one stack.
        self._drawn = list(encoder().view(shape).permute(1, 2, 0, 3).contiguous().unbind(0))

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """The active prefix of a layer, both [H, P, D].

        Raises:
            RuntimeError: no prefix is active.
        """
        encoder = self.active_prefix
        if encoder is None:
            raise RuntimeError("no prefix is active; call set_adapter or enable_adapters first")
        trained = torch.is_grad_enabled() and encoder.embedding.weight.requires_grad
        if self._drawn is None or (trained and not self._drawn[0].requires_grad):
            self.draw()
        assert self._drawn is not None
        return self._drawn[2 * layer], self._drawn[2 * layer + 1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: int, **options: Any) -> Tensor:
        """:func:`peftkern.functional.prefix_attention` with a layer's prefix.

        Args:
            q: [B, Hq, Lq, D].
            k: [B, Hkv, Lk, D].
            v: like k.
            layer: number of the attention layer.
            options: ``attn_mask``, ``is_causal``, ``scale`` and so on.

        Returns:
            [B, Hq, Lq, D].
        """
        self.draw()
        return prefix_attention(q, k, v, *self.keys_and_values(layer), **options)

    def _changed(self) -> None:
        """Called when another prefix, or none, became active."""
        self._drawn = None

    def set_adapter(self, names: Any, trainable: bool = True) -> None:
        """Make one prefix active, or none when its name is not here."""
        super().set_adapter(names, trainable)
        self._changed()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the prefix on or off."""
        super().enable_adapters(enabled)
        self._changed()

    def delete_adapter(self, name: str) -> None:
        """Remove a prefix; unknown names are ignored."""
        super().delete_adapter(name)
        self._changed()

    def __getstate__(self) -> dict[str, Any]:
        # What was drawn for one forward pass belongs to its graph and cannot be copied.
        return self.__dict__ | {"_drawn": None}
