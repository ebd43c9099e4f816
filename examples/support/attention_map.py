"""Watch which blocks a model attends to while it runs, by asking the very attention that it runs with.

Legend: `B` rows, `T` new tokens, `S` keys, `H` query heads, `K` key-value heads, `D` head dimension, `N` blocks,
`L` layers, `W` forwards, one for each written token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from whisper_hf import SparseAttentionConfig, masked_sparse_attention_forward
from whisper_hf.model.attention import MASKED_SPARSE, layer_settings


class BlockRecord:
    """How much the last query of each forward attended to each block, layer by layer and head by head.

    Every layer attends a second time, with the same queries, keys and block means, but with the number of its block,
    one-hot, in place of each key's value. What comes out is the attention that went to each block, and exactly 0 for a
    block that was left out. So nothing is computed again by other rules, and the model's own output is untouched.

    Args:
        settings (`SparseAttentionConfig`): the model's.
    """

    def __init__(self, settings: SparseAttentionConfig) -> None:
        self.settings = settings
        self.is_sparse: dict[int, bool] = {}  # by layer
        self.kv_heads = 0
        self._forwards: list[dict[int, Tensor]] = []  # of each layer: `[B, H, N]`, N growing

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `masked_sparse` does, and note to which blocks; arguments and result are those of that function."""
        if mask is not None:
            raise ValueError(f"blocks are recorded of texts without padding, got a mask of shape {list(mask.shape)}")
        number = torch.arange(key.shape[2], device=key.device) // self.settings.block_size
        numbers = one_hot(number).to(query.dtype).expand(*key.shape[:2], -1, -1)  # [B, K, S, N]
        shares, _ = masked_sparse_attention_forward(module, query, key, numbers, mask, **kwargs)
        layer, self.kv_heads = module.layer_idx, key.shape[1]
        if not self._forwards or layer in self._forwards[-1]:
            self._forwards.append({})
        self._forwards[-1][layer] = shares[:, -1].float().cpu()
        self.is_sparse[layer] = layer_settings(module, kwargs) is not None and kwargs.get("sliding_window") is None
        return masked_sparse_attention_forward(module, query, key, value, mask, **kwargs)

    def shares(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the attention that went to each block, `[W, L, H, N]`, float32; it sums to 1 over the blocks.

        Args:
            rows: which row of the batch counts in each forward (a beam, a candidate); the first one if left out. There
                may be fewer than forwards: the last ones are then left out.
        """
        rows = [0] * len(self._forwards) if rows is None else rows
        blocks = max(share.shape[-1] for forward in self._forwards for share in forward.values())
        taken = [
            torch.stack([pad(share[row], (0, blocks - share.shape[-1])) for _, share in sorted(forward.items())])
            for forward, row in zip(self._forwards, rows, strict=False)
        ]
        return torch.stack(taken)


@contextmanager
def recorded_blocks(settings: SparseAttentionConfig) -> Iterator[BlockRecord]:
    """Record what models with `masked_sparse` attention attend to, a WhisperLM's or another's, while this lasts."""
    record = BlockRecord(settings)
    ALL_ATTENTION_FUNCTIONS[MASKED_SPARSE] = record.attend  # an override of this one table, over what is registered
    try:
        yield record
    finally:
        del ALL_ATTENTION_FUNCTIONS[MASKED_SPARSE]


def attending_heads(shares: Tensor, kv_heads: int) -> Tensor:
    """Count the key-value heads that attend to each block, `[..., N]` int64; a head's query heads share its choice.

    Args:
        shares (`[..., H, N]`): of [`BlockRecord.shares`].
        kv_heads (`int`): `K`.
    """
    return shares.unflatten(-2, (kv_heads, -1)).gt(0).any(-2).sum(-2)


def block_roles(query_position: int, blocks: int, settings: SparseAttentionConfig) -> list[str]:
    """Tell why a query may attend to each of `blocks` blocks: "sink", "local", "past" (if chosen) or "" (not yet)."""
    current = query_position // settings.block_size
    first_local = current - settings.local_blocks + 1

    def role(block: int) -> str:
        if block > current:
            return ""
        return "sink" if block < settings.sink_blocks else "local" if block >= first_local else "past"

    return [role(block) for block in range(blocks)]
