"""Encouraging diversity: against tokens that would go on with a repetition, and only against those.

Legend: `B` rows of `T` tokens, `n` of which are predicted from and count, `C` candidates for each, `V` vocabulary.
"""

import torch
from torch import Tensor

NONE = -1  # in place of a candidate


def repeating_tokens(
    input_ids: Tensor, targets: Tensor, documents: Tensor | None = None, *, window: int = 512, most: int = 8
) -> Tensor:
    """Find the tokens that would continue a repetition: those that followed the last two tokens when these came before.

    A token that merely occurred before is left alone, as most repetition is legitimate; so is what came from a prompt,
    for answers often quote it, and the true next token, where people repeat themselves too.

    Args:
        input_ids (`[B, T]`, int64): the text.
        targets (`[B, T]`, int64): the token to predict from each position, -100 where none counts (prompt, padding).
        documents (`[B, T]`, int64, *optional*): which document of its row a token belongs to; never crossed.
        window (`int`): how many tokens back to look.
        most (`int`): `C`, candidates of each position, the most recent ones.

    Returns:
        `[B, T, C]`, int64: distinct tokens, -1 where there are fewer.
    """
    size = int(input_ids.numel())
    row = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
    document = row if documents is None else row * (documents.max() + 1) + documents
    last_two = torch.stack([document[:, 1:], input_ids[:, :-1], input_ids[:, 1:]], dim=-1)
    same = document[:, 1:] == document[:, :-1]
    base = input_ids.max() + 1
    key = torch.full_like(input_ids, NONE)
    key[:, 1:] = torch.where(same, (last_two[..., 0] * base + last_two[..., 1]) * base + last_two[..., 2], NONE)

    key, target = key.flatten(), targets.flatten()
    order = key.argsort(stable=True)  # occurrences of two tokens, one after the other
    place = torch.arange(size, device=key.device)
    found = target.new_full((size, most), NONE)
    for back in range(1, min(most, size - 1) + 1):
        here, before = order[back:], order[:-back]
        continues = (key[here] == key[before]) & (key[here] != NONE) & (place[here] - place[before] <= window)
        candidate = target[before]
        is_new = (found[here, : back - 1] != candidate[:, None]).all(1) & (candidate != target[here])
        found[here, back - 1] = torch.where(continues & (candidate >= 0) & is_new, candidate, NONE)
    return found.view(*input_ids.shape, most)


def contrast_loss(logits: Tensor, labels: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`log(1 + sum_c exp(z_c - z_y))` of each token: every candidate is to be less likely than the true token.

    The contrastive token loss (Jiang et al. 2022, https://arxiv.org/abs/2205.02517) over the candidates of
    [`repeating_tokens`]; computed stably, for any gap between logits.

    Args:
        logits (`[n, V]`, float32 or float64).
        labels (`[n]`, int64): the true tokens.
        candidates (`[n, C]`, int64): distinct, not the true one; -1 for none.

    Returns:
        value (`[n]`, nats), and its derivative with respect to the logits of the candidates (`[n, C]`) and of the true
        token (`[n]`).
    """
    gaps = logits.gather(1, candidates.clamp(min=0)) - logits.gather(1, labels[:, None])
    gaps = gaps.masked_fill(candidates == NONE, float("-inf"))
    value = torch.nn.functional.pad(gaps, (1, 0)).logsumexp(-1)
    derivative = (gaps - value[:, None]).exp()
    return value, derivative, -derivative.sum(-1)
