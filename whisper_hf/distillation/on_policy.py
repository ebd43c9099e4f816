"""Batches of the student's own text (on-policy distillation; Agarwal et al. 2023, https://arxiv.org/abs/2306.13649)."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.diversity import IGNORED


def is_on_policy_step(fraction: float, seed: int, step: int) -> bool:
    """Decide about an optimizer step: the same on every process, whatever the accumulation, also after resuming."""
    if not 0 < fraction < 1:
        return fraction >= 1
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.rand((), generator=generator).item() < fraction


def prompts_of(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prompt_tokens: int | None, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Cut off what is to be continued, and pad it on the left.

    Args:
        input_ids, attention_mask, labels (`[B, T]`, int64): a batch, padded on either side.
        prompt_tokens (`int`, *optional*): how many tokens to keep at most; by default those before the first label.
        pad_token_id (`int`): fills the prompts.

    Returns:
        token ids and attention mask of the prompts, `[B, P]`.

    Raises:
        ValueError: a row without anything before its first label, where the number of tokens is not given.
    """
    rows = []
    for ids, shown, targets in zip(input_ids, attention_mask.bool(), labels, strict=True):
        ids, targets = ids[shown], targets[shown]
        answer = (targets != IGNORED).nonzero()
        length = prompt_tokens or (int(answer[0]) if len(answer) else len(ids))
        if not length:
            raise ValueError(
                "on-policy distillation continues the tokens before the first label, got an example labelled from its "
                "first token on; mask prompts with -100, or set on_policy_prompt_tokens"
            )
        rows.append(ids[:length])
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad_token_id) for row in rows])
    shown = torch.stack([(torch.arange(width, device=ids.device) >= width - len(row)).long() for row in rows])
    return ids, shown


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    prompts: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    temperature: float,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Let the student continue prompts; its own tokens, up to the first end of text, become the labels.

    Args:
        model (`PreTrainedModel`): the student; its mode is left as it was.
        prompts, attention_mask (`[B, P]`, int64): padded on the left.
        max_new_tokens (`int`): length of the continuation.
        temperature (`float`): of sampling; 0 decodes greedily.
        kwargs: `pad_token_id`, and whether other processes must be waited for (`synced_gpus`).

    Returns:
        a batch: `input_ids`, `attention_mask` and `labels`, `[B, at most P + max_new_tokens]`, int64.
    """
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    try:
        ids = model.generate(
            input_ids=prompts,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            **(sampling if temperature else {"do_sample": False}),
            **kwargs,
        )
    finally:
        model.train(was_training)
    written = ids[:, prompts.shape[1] :]
    end = torch.zeros_like(written, dtype=torch.bool)
    eos = model.generation_config.eos_token_id
    for token in [eos] if isinstance(eos, int) else eos or []:
        end |= written == token
    counts = end.cumsum(-1) - end.long() == 0  # up to and with the first end of text
    shown = torch.cat([attention_mask, counts.long()], dim=1)
    labels = torch.cat([torch.full_like(prompts, IGNORED), written.masked_fill(~counts, IGNORED)], dim=1)
    return {"input_ids": ids, "attention_mask": shown, "labels": labels}
