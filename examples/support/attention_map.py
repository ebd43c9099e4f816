"""Record which blocks a model attends to while it runs, by the attention function that it runs with.

Legend: `S` keys, `H` query heads, `K` key-value heads, `N` blocks, `L` layers, `W` forwards, one for each token that
the model writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from whisper_hf import SparseAttentionConfig, masked_sparse_attention_forward
from whisper_hf.model.attention import MASKED_SPARSE, layer_settings

ROLES = ("sink", "local", "chosen")  # why a query attends to a block


class BlockRecord:
    """How much attention the last query of each forward paid to each block, by layer and head, for one text.

    Every layer attends twice, with identical queries, keys and block means. The first time, the value of a key is the
    number of its block, one-hot. The output is then the attention that went to each block, which is exactly 0 for a
    block that was left out. The second time is the model's own, so its output does not change.

    Args:
        settings (`SparseAttentionConfig`): the model's.
    """

    def __init__(self, settings: SparseAttentionConfig) -> None:
        self.settings = settings
        self.is_sparse: dict[int, bool] = {}  # by layer
        self.kv_heads = 0
        self._forwards: list[dict[int, Tensor]] = []  # by layer `[H, N]`, where N grows with the text

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `masked_sparse` does, with its arguments and result, and record to which blocks."""
        if mask is not None or len(query) > 1:
            raise ValueError(f"blocks are recorded for one text without padding, got {len(query)} and mask {mask}")
        number = torch.arange(key.shape[2], device=key.device) // self.settings.block_size
        numbers = one_hot(number).to(query.dtype).expand(*key.shape[:2], -1, -1)  # [B, K, S, N]
        shares, _ = masked_sparse_attention_forward(module, query, key, numbers, mask, **kwargs)
        layer, self.kv_heads = module.layer_idx, key.shape[1]
        if not self._forwards or layer in self._forwards[-1]:
            self._forwards.append({})
        self._forwards[-1][layer] = shares[0, -1].float().cpu()
        self.is_sparse[layer] = layer_settings(module, kwargs) is not None and kwargs.get("sliding_window") is None
        return masked_sparse_attention_forward(module, query, key, value, mask, **kwargs)

    def shares(self) -> Tensor:
        """Return the attention that went to each block, `[W, L, H, N]`, float32; it adds up to 1 over the blocks."""
        blocks = max(share.shape[-1] for forward in self._forwards for share in forward.values())
        padded = [
            [pad(share, (0, blocks - share.shape[-1])) for _, share in sorted(forward.items())]
            for forward in self._forwards
        ]
        return torch.stack([torch.stack(layers) for layers in padded])


@contextmanager
def recorded_blocks(settings: SparseAttentionConfig) -> Iterator[BlockRecord]:
    """Record what models with `masked_sparse` attention, of any family, attend to inside this context."""
    record = BlockRecord(settings)
    ALL_ATTENTION_FUNCTIONS[MASKED_SPARSE] = record.attend  # an override of this one table, over what is registered
    try:
        yield record
    finally:
        del ALL_ATTENTION_FUNCTIONS[MASKED_SPARSE]


def attending_heads(shares: Tensor, kv_heads: int) -> Tensor:
    """Count the key-value heads that attend to each block, `[..., N]` int64.

    Args:
        shares (`[..., H, N]`): of [`BlockRecord.shares`]; the query heads of a key-value head share its blocks.
        kv_heads (`int`): `K`.
    """
    return shares.unflatten(-2, (kv_heads, -1)).gt(0).any(-2).sum(-2)


def block_roles(query_positions: Tensor, blocks: int, settings: SparseAttentionConfig) -> Tensor:
    """Say why queries may attend to each of `N` blocks, `[W, N]` int64: the number in `ROLES`, or -1 for "not yet".

    A block that is neither sink nor local is "chosen" if the query attends to it at all.

    Args:
        query_positions (`[W]`, int64): places of the queries in their text.
        blocks (`int`): `N`.
        settings (`SparseAttentionConfig`): the model's.
    """
    current = query_positions[:, None] // settings.block_size
    block = torch.arange(blocks)
    roles = torch.where(block > current - settings.local_blocks, ROLES.index("local"), ROLES.index("chosen"))
    roles[:, : settings.sink_blocks] = ROLES.index("sink")
    return roles.where(block <= current, -1)
