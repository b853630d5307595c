"""Trainable embeddings in front of the sequence (arXiv 2104.08691)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkern.arguments import require_float, whole
from peftkern.functional.prefix import prompt_embedding, soft_prompt
from peftkern.nn.adapter import AdapterLayer, check_adapter_name
from peftkern.nn.structure import hooks_of, is_parametrized


class PromptTuning(AdapterLayer):
    """Named soft prompts; at most one is active.

    Args:
        num_virtual_tokens: P, positions in front of the sequence.
        token_dim: width of the embeddings.
        adapter_name: name of the first prompt.
        initial: [rows, token_dim] to start from; random when left out.
        num_transformer_submodules: 2 keeps 2 P rows, of which the first P are used: so PEFT stores
            prompts of encoder-decoder models.
        dtype: of the trained tensor.

    Example:
        >>> import torch
        >>> PromptTuning(num_virtual_tokens=3, token_dim=8)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 8, 8])
    """

    _adapter_containers = ("prompt_encoder",)

    def __init__(
        self,
        num_virtual_tokens: int,
        token_dim: int,
        adapter_name: str = "default",
        initial: Tensor | None = None,
        num_transformer_submodules: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.token_dim = whole("token_dim", token_dim)
        self.num_transformer_submodules = whole(
            "num_transformer_submodules", num_transformer_submodules
        )
        self.prompt_encoder = nn.ModuleDict()
        self.add_adapter(adapter_name, num_virtual_tokens, initial, dtype)

    def add_adapter(
        self,
        adapter_name: str,
        num_virtual_tokens: int,
        initial: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add another prompt and make it the active one.

        Raises:
            TypeError: a size is no int, or ``initial`` is no float tensor.
            ValueError: a prompt of this name exists, a size is out of range, or ``initial`` has
                another shape.
        """
        check_adapter_name(adapter_name)
        whole("num_virtual_tokens", num_virtual_tokens)
        if adapter_name in self.prompt_encoder:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        held = next(self.parameters(), None)
        rows = num_virtual_tokens * self.num_transformer_submodules
        table = nn.Embedding(rows, self.token_dim, dtype=dtype)
        if initial is not None:
            require_float("initial", initial)
            if initial.device.type == "meta":
                raise ValueError("initial: is on meta, expected values")
            if tuple(initial.shape) != (rows, self.token_dim):
                raise ValueError(
                    f"initial: got shape {tuple(initial.shape)}, expected {(rows, self.token_dim)}"
                )
            with torch.no_grad():
                table.weight.copy_(initial)
        self.prompt_encoder[adapter_name] = table if held is None else table.to(held.device)
        self.set_adapter(adapter_name)

    @property
    def active_prompt(self) -> Tensor | None:
        """The prompt in use, [P, token_dim]; ``None`` while there is none."""
        for name in () if self._disable_adapters else self._active_adapter:
            if name in self.prompt_encoder:
                table = self.prompt_encoder[name].weight
                assert isinstance(table, Tensor)
                return table[: table.shape[0] // self.num_transformer_submodules]
        return None

    def check(self, names: list[str]) -> None:
        """Refuse two prompts at once: neither would be what was trained."""
        here = [name for name in names if name in self.prompt_encoder]
        if len(here) > 1:
            raise ValueError(f"names: {', '.join(here)} are prompts, of which one can be active")

    def forward(self, input_embeds: Tensor) -> Tensor:
        """:func:`peftkern.functional.soft_prompt` with the active prompt, if there is one."""
        prompt = self.active_prompt
        return input_embeds if prompt is None else soft_prompt(input_embeds, prompt)

    def embed(self, embeddings: nn.Module, ids: Tensor) -> Tensor:
        """The tokens' embeddings with the active prompt in front.

        A plain frozen table is looked up and joined in one pass; any other module is called.
        """
        prompt = self.active_prompt
        if prompt is None or not _plain_table(embeddings):
            return self(embeddings(ids))
        table = embeddings.weight
        assert isinstance(table, Tensor)
        return prompt_embedding(ids, table, prompt)


def _plain_table(embeddings: nn.Module) -> bool:
    """Whether calling the module is nothing but looking rows of a frozen float table up."""
    return (
        type(embeddings) is nn.Embedding
        and embeddings.max_norm is None
        and not embeddings.weight.requires_grad
        and embeddings.weight.dtype.is_floating_point
        and not is_parametrized(embeddings)
        and hooks_of(embeddings) is None
    )


def text_rows(
    embeddings: nn.Module, rows: int, text: str, tokenizer: str, options: dict[str, Any]
) -> Tensor:
    """Embeddings of a text's tokens, cut off or repeated to ``rows``.

    Raises:
        ValueError: the text has no tokens.
    """
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tokenizer, **options)(text)["input_ids"]
    if not ids:
        raise ValueError(f"prompt_tuning_init_text: {text!r} has no tokens")
    return _rows(embeddings, torch.tensor((ids * (-(-rows // len(ids))))[:rows]))


def sampled_rows(embeddings: nn.Module, rows: int, vocabulary: int) -> Tensor:
    """Embeddings of ``rows`` tokens drawn from the vocabulary."""
    return _rows(embeddings, torch.randint(vocabulary, (rows,)))


@torch.no_grad()
def _rows(embeddings: nn.Module, ids: Tensor) -> Tensor:
    device = next(embeddings.parameters()).device
    return embeddings(ids.to(device)).detach().clone().float()
