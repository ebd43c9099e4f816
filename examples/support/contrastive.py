"""Contrastive search for `generate`: likely tokens whose meaning is not yet in the text.

transformers has moved its own to a repository on the Hub (`transformers-community/contrastive-search`), code that is
downloaded when it is used. This one needs nothing: `model.generate(ids, custom_generate=contrastive_search)`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput


@torch.no_grad()
def contrastive_search(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    candidates: int = 4,
    penalty: float = 0.6,
    context_states: Tensor | None = None,
    **model_kwargs: Any,
) -> GenerateBeamDecoderOnlyOutput:
    """Write, of the `candidates` likeliest tokens v, the one with the largest `(1 - a) p(v) - a max_j cos(h_v, h_j)`.

    `h` are the last hidden states, `j` all tokens before and `a` the penalty. Su et al. 2022,
    https://arxiv.org/abs/2202.06417 and https://arxiv.org/abs/2210.14140. All candidates are read in one batch.

    Args:
        input_ids (`[1, P]`, int64): one text.
        candidates (`int`), penalty (`float`, in [0, 1]): `k` and `a`.
        context_states (`[1, cached tokens, hidden_size]`, *optional*): hidden states of what is in the cache already,
            where a `cache` is given.

    Returns:
        `sequences` (`[1, P + new]`) and, as of a beam search, `beam_indices` (`[1, new]`): the row of each forward from
        which a token was predicted.

    Raises:
        ValueError: several texts, or a cache without its states.
    """
    cache = model_kwargs["cache"]  # given, or made by `generate`; as a parameter it would get lost there
    seen = cache.get_seq_length()
    known = 0 if context_states is None else context_states.shape[1]
    if len(input_ids) != 1 or known != seen:
        raise ValueError(f"expected one text, and states of its {seen} cached tokens, got {len(input_ids)} and {known}")
    logits, states = _read(model, input_ids[:, seen:], cache)
    states = states if context_states is None else torch.cat([context_states, states], dim=1)
    cache.batch_repeat_interleave(candidates)
    rows, row, is_done = [], 0, False
    while not is_done:
        scores = logits_processor(input_ids, logits[row : row + 1].float()).softmax(-1)
        likely, tokens = scores[0].topk(candidates)
        # what was written last is not in the cache yet, but for the first time
        unread = input_ids[:, cache.get_seq_length() :].expand(candidates, -1)
        logits, new = _read(model, torch.cat([unread, tokens[:, None]], dim=1), cache)
        cache.crop(-1)
        similar = torch.cosine_similarity(new[:, -1:], states, dim=-1).amax(-1)
        rows.append(row)
        row = int(((1 - penalty) * likely - penalty * similar).argmax())
        input_ids = torch.cat([input_ids, tokens[row].view(1, 1)], dim=1)
        states = torch.cat([states, new[row : row + 1, -1:]], dim=1)
        is_done = bool(stopping_criteria(input_ids, None).all())
    return GenerateBeamDecoderOnlyOutput(sequences=input_ids, beam_indices=torch.tensor([rows]))


def _read(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """Return the logits of the last token, `[B, V]`, and the last hidden states of all, `[B, T, hidden_size]`."""
    output = model(tokens, cache=cache, use_cache=True, output_hidden_states=True, logits_to_keep=1)
    return output.logits[:, -1], output.hidden_states[-1]
