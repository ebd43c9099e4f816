"""On-policy distillation: in which optimizer steps the student writes text, and which prompts it continues.

Agarwal et al. 2023, https://arxiv.org/abs/2306.13649. Legend: `B` rows of `T` tokens, `P` tokens of the longest prompt.
"""

import torch
from torch import Tensor

from ..model.labels import IGNORED
from ..training.seeds import step_seed


def is_on_policy_step(fraction: float, seed: int, step: int) -> bool:
    """Decide whether the student writes the text of an optimizer step.

    The decision depends on the arguments alone. All processes therefore agree, and resuming does not change it.

    Args:
        fraction (`float`): the share of steps in which the student writes, in [0, 1].
        seed, step (`int`): the seed of the training, and the number of the optimizer step.
    """
    if not 0 < fraction < 1:
        return fraction >= 1
    generator = torch.Generator().manual_seed(step_seed(seed, step, "is on policy"))
    return torch.rand((), generator=generator).item() < fraction


def prompts_of(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prompt_tokens: int | None, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Cut the prompts out of a batch, and pad them on the left.

    Args:
        input_ids, attention_mask, labels (`[B, T]`, int64): a batch, padded on either side.
        prompt_tokens (`int`, *optional*): how many tokens to keep at most. By default the tokens before the first label
            are kept, or all tokens of a row without labels.
        pad_token_id (`int`): the token that fills shorter prompts.

    Returns:
        token ids and attention mask of the prompts, both `[B, P]`, int64.

    Raises:
        ValueError: a row whose first token has a label, if `prompt_tokens` is not given.
    """
    rows = []
    for ids, shown, targets in zip(input_ids, attention_mask.bool(), labels, strict=True):
        visible_ids = ids[shown]
        labelled = (targets[shown] != IGNORED).nonzero()
        length = prompt_tokens or (int(labelled[0]) if len(labelled) else len(visible_ids))
        if not length:
            raise ValueError(
                "on-policy distillation continues the tokens before the first label, got an example whose first token "
                "has a label; mask prompts with -100, or set on_policy_prompt_tokens"
            )
        rows.append(visible_ids[:length])
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad_token_id) for row in rows])
    shown = torch.stack([(torch.arange(width, device=ids.device) >= width - len(row)).long() for row in rows])
    return ids, shown
