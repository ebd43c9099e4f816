"""Generate text with a model while it trains, without lasting effects on the model.

Legend: `B` prompts of `P` tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..model.labels import IGNORED
from ..model.repetition_loss import without_adapter


@contextmanager
def writing(model: Any, **settings: Any) -> Iterator[None]:
    """Let a model `generate` with given settings only, and restore its modes and generation config afterwards.

    `generate` takes every setting that is not given from the model's own generation config. This config is replaced,
    because a repetition penalty or a ban on repeated n-grams would hide what the model has learnt.

    Args:
        model (`PreTrainedModel`, perhaps wrapped by peft): the model, which is in evaluation mode within the block.
        settings: fields of the `GenerationConfig`. Ids of special tokens default to the model's.
    """
    base = without_adapter(model)
    own = base.generation_config
    special = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    modes = [(module, module.training) for module in model.modules()]  # frozen parts may be in evaluation mode already
    try:
        base.generation_config = GenerationConfig(use_cache=True, **{**special, **settings})
        for module, _ in modes:
            module.training = False
        yield
    finally:
        base.generation_config = own
        for module, was_training in modes:
            module.training = was_training


@torch.no_grad()
def continue_prompts(
    model: Any,
    prompts: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    synced_gpus: bool | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Let a model continue prompts, and return a batch whose labels are the tokens that it wrote.

    The tokens up to the first end-of-text token, including it, are labels. All others are -100.

    Args:
        model (`PreTrainedModel`, perhaps wrapped by peft): the model; its mode is restored.
        prompts, attention_mask (`[B, P]`, int64): prompts, padded on the left.
        max_new_tokens (`int`): largest number of tokens of a continuation.
        temperature (`float`): the temperature of sampling; 0 decodes greedily.
        synced_gpus (`bool`, *optional*): whether to generate until all processes have finished, for sharded weights.
        settings: other fields of the `GenerationConfig`, such as `pad_token_id`.

    Returns:
        a batch of `input_ids`, `attention_mask` and `labels`, `[B, P + L]` each, int64, with `L <= max_new_tokens`.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    decoding = {**(sampling if temperature else {"do_sample": False}), **settings}
    with writing(model, max_new_tokens=max_new_tokens, **decoding):
        ids = model.generate(input_ids=prompts, attention_mask=attention_mask, synced_gpus=synced_gpus)
    written = ids[:, prompts.shape[1] :]
    end = torch.zeros_like(written, dtype=torch.bool)
    for token in end_tokens(model):
        end |= written == token
    counts = end.cumsum(-1) - end.long() == 0  # up to the first end of text, including it
    shown = torch.cat([attention_mask, counts.long()], dim=1)
    labels = torch.cat([torch.full_like(prompts, IGNORED), written.masked_fill(~counts, IGNORED)], dim=1)
    return {"input_ids": ids, "attention_mask": shown, "labels": labels}


def end_tokens(model: Any) -> list[int]:
    """Return the ids of a model's end-of-text tokens; the list may be empty."""
    ends = without_adapter(model).generation_config.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)
