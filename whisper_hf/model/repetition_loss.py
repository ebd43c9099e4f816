# Copyright 2026 The whisper_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A loss that encourages diversity: against tokens that would go on with a repetition, and only against those.

Legend: `B` rows of `T` tokens, `n` of which are predicted from and count, `C` candidates for each, `V` vocabulary.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .configuration_whisper_lm import DiversityConfig
from .labels import IGNORED, shift

logger = logging.get_logger(__name__)

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
    gaps = _gaps(logits, labels, candidates)
    value = contrast(gaps)
    derivative = (gaps - value[:, None]).exp()
    return value, derivative, -derivative.sum(-1)


def _gaps(logits: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
    """Return by how much the logit of each candidate exceeds that of the true token, `[n, C]`."""
    gaps = logits.gather(1, candidates.clamp(min=0)) - logits.gather(1, labels[:, None])
    return gaps.masked_fill(candidates == NONE, float("-inf"))


def contrast(gaps: Tensor) -> Tensor:
    """Return `log(1 + sum exp gap)`, `[...]`, of the gaps of candidates, `[..., C]`; `-inf` where there is none."""
    return nn.functional.pad(gaps, (1, 0)).logsumexp(-1)


def diverse_causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    *,
    diversity: DiversityConfig,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy, and in training `contrast_weight` times the contrast with tokens that go on with a repetition.

    Takes the place of transformers' `ForCausalLMLoss`, in its terms; without gradients it is that. Repetitions are
    looked for among labelled tokens: prompts, padding and everything beyond them are neither sources nor copies.

    With `gem_beta` training minimises `beta * cross-entropy(logits / beta)` in place of cross-entropy: its gradient,
    `softmax(logits / beta) - onehot`, is that of GEM with linear `h`, which the paper defines by a constant `q`.

    Args:
        logits (`[B, T, V]`, any float), labels (`[B, T]`, int64): labels are shifted inside.
        num_items_in_batch (`int` or 0-dim tensor, *optional*): divides both sums; else the mean is taken.
        diversity (`DiversityConfig`): weight and window.
        shift_labels (`[B, T]`, int64, *optional*): labels that are shifted already.

    Returns:
        0-dim float32: nats per token.
    """
    beta = diversity.gem_beta if torch.is_grad_enabled() and diversity.gem_beta is not None else 1.0
    tempered = logits if beta == 1 else logits.float() / beta
    loss = beta * ForCausalLMLoss(tempered, labels, vocab_size, num_items_in_batch, shift_labels=shift_labels, **kwargs)
    if not torch.is_grad_enabled() or not diversity.contrast_weight:
        return loss
    if shift_labels is None:
        assert labels is not None  # or the loss above would have failed
        targets, tokens = shift(labels), labels
    else:
        targets, tokens = shift_labels, nn.functional.pad(shift_labels[:, :-1], (1, 0), value=IGNORED)
    targets, tokens = targets.to(logits.device), tokens.to(logits.device)
    hidden = tokens == IGNORED
    stretches = 2 * hidden.cumsum(1) + ~hidden  # of labelled tokens; a hidden one is a stretch of its own
    candidates = repeating_tokens(tokens.clamp(min=0), targets, stretches, window=diversity.window)
    counts = (candidates != NONE).any(-1) & (targets != IGNORED)
    penalty = contrast(_gaps(logits[counts].float(), targets[counts], candidates[counts])).sum()
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return loss + diversity.contrast_weight * penalty / count


def without_adapter(model: Any) -> Any:
    """Return the model beneath one that peft has wrapped, or the model itself."""
    return getattr(model, "get_base_model", lambda: model)()


def use_diversity(model: Any, diversity: Any = True) -> Any:
    """Train a causal language model of any family with the objective that encourages diversity, in place.

    Args:
        model (`PreTrainedModel`, or wrapped by peft): its loss must come from transformers' `loss_function`.
        diversity (`DiversityConfig`, `dict`, `True` or `None`): the settings, the defaults, or off again.

    Returns:
        the model.

    Raises:
        ValueError: a model without `loss_function` or with another loss than that of causal language models.
    """
    base = without_adapter(model)
    vars(base).pop("_loss_function", None)
    hook = vars(base).pop("_diversity_hook", None)
    if hook is not None:
        hook.remove()
    settings = DiversityConfig.from_value({} if diversity is True else diversity)
    if settings is None:
        return model
    if getattr(base, "loss_function", None) is not ForCausalLMLoss:
        raise ValueError(
            "the objective against repetition needs a causal language model with transformers' ForCausalLMLoss, got "
            f"{type(base).__name__}"
        )
    base.loss_function = functools.partial(diverse_causal_lm_loss, diversity=settings)
    vars(base)["_diversity_hook"] = base.register_forward_pre_hook(_warn_where_bypassed, with_kwargs=True)
    return model


def _warn_where_bypassed(model: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
    """Say so where a training forward has no labels: the loss is then computed outside, by something else.

    One that asks for a few logits only is no such loss, as that of [`~whisper_hf.SequenceUnlikelihoodCallback`].
    """
    has_loss = kwargs.get("labels") is not None or kwargs.get("logits_to_keep")
    is_bypassed = model.training and torch.is_grad_enabled() and not has_loss
    if is_bypassed and not is_tracing():
        logger.warning_once(
            f"{type(model).__name__} trains without labels, so its diversity objective does nothing: the Trainer takes "
            "them away for label_smoothing_factor and compute_loss_func, and the DistillationTrainer has a "
            "diversity_weight of its own"
        )
