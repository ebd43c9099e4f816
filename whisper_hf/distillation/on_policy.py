"""When and from where a student writes text of its own (on-policy distillation; Agarwal et al. 2023, https://arxiv.org/abs/2306.13649)."""

import torch
from torch import Tensor

from ..model.labels import IGNORED
from ..training.seeds import step_seed


def is_on_policy_step(fraction: float, seed: int, step: int) -> bool:
    """Decide about an optimizer step: the same on every process, whatever the accumulation, also after resuming."""
    if not 0 < fraction < 1:
        return fraction >= 1
    generator = torch.Generator().manual_seed(step_seed(seed, step))
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
