"""Optimizers: one pass over all parameters, fp32 or 8-bit state, in memory or paged to disk.

The classes follow ``torch.optim``; their state dicts follow bitsandbytes, and theirs and torch's
AdamW states load here.
"""

from peftkern.optim.groups import lora_plus_groups
from peftkern.optim.optimizers import (
    AdamW,
    AdamW8bit,
    Lion,
    Lion8bit,
    PagedAdamW,
    PagedAdamW8bit,
    SGD8bit,
)
from peftkern.optim.pager import PagingError
from peftkern.optim.plot import paging_svg

__all__ = [
    "AdamW",
    "AdamW8bit",
    "Lion",
    "Lion8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagingError",
    "SGD8bit",
    "lora_plus_groups",
    "paging_svg",
]
