"""Text that a model writes while it trains."""

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
    """Let a model `generate` with these settings alone, then leave its modes and generation config as they were.

    Its own generation config has to step aside, since `generate` takes from there what is not set: a repetition
    penalty, or a ban on repeated n-grams, would hide what the model itself has learnt.

    Args:
        model (`PreTrainedModel`, or wrapped by peft).
        settings: of the `GenerationConfig`; ids of special tokens that are not given are the model's.
    """
    base = without_adapter(model)
    own = base.generation_config
    special = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    modes = [(module, module.training) for module in model.modules()]  # a frozen part may be in evaluation alone
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
    """Let a model continue prompts; its own tokens, up to the first end of text, become the labels.

    Args:
        model (`PreTrainedModel`, or wrapped by peft): its mode is left as it was.
        prompts, attention_mask (`[B, P]`, int64): padded on the left.
        max_new_tokens (`int`): length of the continuation.
        temperature (`float`): of sampling; 0 decodes greedily.
        synced_gpus (`bool`, *optional*): whether other processes must be waited for.
        settings: more of the `GenerationConfig`, such as `pad_token_id`.

    Returns:
        a batch: `input_ids`, `attention_mask` and `labels`, `[B, at most P + max_new_tokens]`, int64.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    decoding = {**(sampling if temperature else {"do_sample": False}), **settings}
    with writing(model, max_new_tokens=max_new_tokens, **decoding):
        ids = model.generate(input_ids=prompts, attention_mask=attention_mask, synced_gpus=synced_gpus)
    written = ids[:, prompts.shape[1] :]
    end = torch.zeros_like(written, dtype=torch.bool)
    for token in end_tokens(model):
        end |= written == token
    counts = end.cumsum(-1) - end.long() == 0  # up to and with the first end of text
    shown = torch.cat([attention_mask, counts.long()], dim=1)
    labels = torch.cat([torch.full_like(prompts, IGNORED), written.masked_fill(~counts, IGNORED)], dim=1)
    return {"input_ids": ids, "attention_mask": shown, "labels": labels}


def end_tokens(model: Any) -> list[int]:
    """Return the ids that end a text: none, one or several."""
    ends = without_adapter(model).generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
