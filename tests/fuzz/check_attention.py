"""Compare the fast paths of attention with the reference in float64, in value and gradient.

Queries and keys are small integers times powers of two, so that the scores of blocks are exact in float32 for any order
of summation. All paths must therefore choose the same blocks, also in ties.

The shape legend of `sparse_selection.py` applies here, with `E` for the value dimension.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from whisper_hf.model import (
    attention,
    attention_blockwise,
    attention_gathered,
    attention_masks,
    attention_triton,
    blockwise_plan,
    blockwise_products,
    blockwise_selection,
    sparse_selection,
    triton_decode,
)
from whisper_hf.model.attention_reference import masked_sparse_attention_reference
from whisper_hf.model.sparse_selection import content_layout, query_slots, selected_keys, visible_keys

from .draw_cases import Case

SMALLEST = 1e-38  # the order of float32's smallest normal number
COUNTED = (  # functions whose calls prove that a path ran
    (attention, "attention_blockwise"),
    (attention, "attention_gathered"),
    (attention_gathered, "_attend_last"),
    (attention_gathered, "mean_blocks"),
    (attention_blockwise, "sdpa"),
    (attention_blockwise, "forward_head"),
    (attention_blockwise, "backward_head"),
    (blockwise_products, "_forward_band"),
    (blockwise_products, "_backward_band"),
    (blockwise_products, "_raise_reference"),
    (sparse_selection, "_top_by_sort"),
    (attention_triton, "attend"),
    (attention_triton, "differentiate"),
    (triton_decode, "_decode"),
)
calls: Counter[str] = Counter()
seen: Counter[str] = Counter()


def tensors(case: Case) -> list[Tensor]:
    """Make query (`[B, H, T, D]`), key (`[B, K, S, D]`) and value (`[B, K, S, E]`) of a case, with gradients."""
    generator = torch.Generator().manual_seed(case.seed)
    heads = case.kv_heads * case.groups
    length = case.length

    def integers(*shape: int) -> Tensor:
        return torch.randint(-case.entry, case.entry + 1, shape, generator=generator).double()

    query = integers(case.rows, heads, case.queries, case.head_dim)
    key = integers(case.rows, case.kv_heads, length, case.head_dim)
    if case.keys != "random":  # only two different keys (also the same in each block), or only one
        index = torch.randint(min(2, length), (length,), generator=generator)
        if case.keys == "blocks":
            index = index[torch.arange(length) // case.block_size]
        key = key[:, :, index if case.keys in ("few", "blocks") else torch.zeros_like(index)]
    towers = torch.rand(case.rows, case.kv_heads, length, 1, generator=generator) < 0.02
    key = key * 2.0 ** (towers * case.tower)
    key = key * (case.keys != "zero")
    value = torch.randn(case.rows, case.kv_heads, length, case.value_dim, dtype=torch.float64, generator=generator)
    dtype = getattr(torch, case.dtype)
    states = (query * 2.0 ** case.shifts[0], key * 2.0 ** case.shifts[1], value)
    views = (case.views[0], case.views[1], case.views[1])
    return [_viewed(each.to(dtype), view) for each, view in zip(states, views, strict=True)]


def _viewed(states: Tensor, view: str) -> Tensor:
    """Return a copy of `[B, H, T, D]` with another memory layout, whose gaps hold NaN."""
    batch, heads, length, width = states.shape
    if view == "model":
        return states.transpose(1, 2).contiguous().requires_grad_().transpose(1, 2)
    if view == "buffer":
        room = states.new_full((batch, heads, length + 64 - length % 32, width), math.nan)
        room[:, :, :length] = states
        return room.requires_grad_()[:, :, :length]
    if view == "strided":
        room = states.new_full((batch, heads, length, 2 * width), math.nan)
        room[..., ::2] = states
        return room.requires_grad_()[..., ::2]
    if view == "expanded":
        return states[:1].clone().requires_grad_().expand(batch, -1, -1, -1)
    return states.requires_grad_()


def layout_of(case: Case) -> Tensor | None:
    """Return the layout of a case, `[B, 1, 1, S]` int32, or `None`."""
    if not case.has_layout:
        return None
    generator = torch.Generator().manual_seed(case.seed)
    shown = torch.ones(case.rows, case.length, dtype=torch.bool)
    starts = torch.zeros(case.rows, case.length, dtype=torch.bool)
    for row, (left, right, percent) in enumerate(case.hidden):
        shown[row] = torch.rand(case.length, generator=generator) * 100 >= percent
        shown[row, :left] = False
        shown[row, case.written - right :] = False
        starts[row, list(case.starts[row])] = True
    return content_layout(shown, starts, case.written)


@contextmanager
def counted_calls(tile: int | None = None) -> Iterator[None]:
    """Count calls of the functions in `COUNTED`, and set the sizes of tiles, in a `with` block."""
    with ExitStack() as stack:
        for module, name in COUNTED:
            stack.enter_context(mock.patch.object(module, name, _counting(getattr(module, name), called(module, name))))
        if tile:
            for module, name, value in (
                (attention_masks, "QUERIES_PER_STEP", tile),
                (blockwise_plan, "QUERIES_PER_TILE", tile),
                (blockwise_selection, "QUERIES_PER_CHOICE", tile),
                (blockwise_products, "BLOCKS_PER_BAND", tile // 5),
                (sparse_selection, "LEAST_TO_PARTITION", 1),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
        yield


def called(module: ModuleType, name: str) -> str:
    """Return the key of a function in `calls`."""
    return f"{module.__name__.rpartition('.')[2]}.{name}"


def _counting(function: object, name: str) -> object:
    def counting(*args: object, **kwargs: object) -> object:
        calls[name] += 1
        return function(*args, **kwargs)

    return counting


def attend(case: Case, query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None) -> Tensor:
    """Compute attention by the path under test, `[B, H, T, E]`."""
    if case.path in ("dispatch", "triton"):
        layer = SimpleNamespace(
            config=SimpleNamespace(sparse_attention=case.settings), num_key_value_groups=case.groups
        )
        with attention.sparse_backend("triton" if case.path == "triton" else "auto"):
            output, _ = attention.masked_sparse_attention_forward(
                layer, query, key, value, layout, scaling=case.scaling, sliding_window=case.sliding_window
            )
        return output.transpose(1, 2)
    decodes = case.path == "decode"
    path = attention_gathered.attention_gathered if decodes else attention_blockwise.attention_blockwise
    return path(query, key, value, layout, case.scaling, case.settings)


def check(case: Case) -> None:
    """Compare a path's output (with and without gradients) and its gradients with the reference's.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    states = tensors(case)
    layout = layout_of(case)
    visible = visible_keys(
        layout, query_slots(layout, case.queries, case.length, states[0].device), case.length, case.sliding_window
    )
    allowed = visible
    if case.sliding_window is None:
        allowed = selected_keys(states[0], states[1], visible, case.settings)
    exact, bounds = truth(case, states, layout, allowed)
    with counted_calls(case.tile):
        output = attend(case, *states, layout)
        got = [output, *torch.autograd.grad(output, states, _upstream(case).to(output.dtype))]
        with torch.no_grad():
            got.append(attend(case, *states, layout))
    for name, result, expected, bound in zip(
        ("output", "gradient of query", "gradient of key", "gradient of value", "output without gradients"),
        got,
        [*exact, exact[0]],
        [*bounds, bounds[0]],
        strict=True,
    ):
        assert (result.dtype, result.shape) == (states[0].dtype, expected.shape), name
        excess = (result.double() - expected).abs() / bound
        assert excess.isfinite().all(), f"{name}: not a number"
        assert excess.max() <= 1, f"{name}: {excess.max():.3g} times what rounding explains, at {_worst(excess)}"
    _count(case, visible, allowed)


def _worst(excess: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))


def _upstream(case: Case) -> Tensor:
    shape = (case.rows, case.kv_heads * case.groups, case.queries, case.value_dim)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(case.seed + 1))


def truth(
    case: Case, states: list[Tensor], layout: Tensor | None, allowed: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients of query, key and value in float64, and bounds on the effect of rounding on each.

    Rounding changes a weight by a share of it, which grows with the logit unless the logit is exact. It changes the
    gradient of a logit by the same share of the sizes of its terms. Half precision also rounds weights and the saved
    output, and in PyTorch's own attention the logits. The smallest weights count with the value to which they are
    clamped. `allowed` (`[B or 1, 1 or K, T, S]`, bool) says which keys have a weight.
    """
    exact = [tensor.detach().double().requires_grad_() for tensor in states]
    upstream = _upstream(case)
    settings = case.settings if case.sliding_window is None else None
    output, weights = masked_sparse_attention_reference(*exact, layout, case.scaling, settings, case.sliding_window)
    results = [output, *torch.autograd.grad(output, exact, upstream)]
    with torch.no_grad():
        query, key, value = (tensor.abs() for tensor in exact)
        key, value = (tensor.repeat_interleave(case.groups, dim=1) for tensor in (key, value))
        shown = allowed.repeat_interleave(case.groups, dim=1) if allowed.shape[1] > 1 else allowed
        largest = (query @ key.mT * shown).amax(-1, keepdim=True) * case.scaling
        dtype = states[0].dtype
        unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        coarse = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
        shares = unit * (64 + 8 * largest) + coarse
        if case.is_left_to_sdpa:
            shares += coarse * largest
        is_exact = not (case.odd_scaling or case.path == "triton" or (coarse and case.is_left_to_sdpa))
        floor = shown * 2 * math.exp(blockwise_products.UNDERFLOW)
        moved = weights.detach() * (unit * 64 + coarse if is_exact else shares) + floor
        loose = weights.detach() * shares + floor
        centred = loose * (upstream.abs() @ value.mT + (upstream * output).abs().sum(-1, keepdim=True))
        groups = (case.kv_heads, case.groups)
        bounds = [
            moved @ value,
            case.scaling * (centred @ key),
            case.scaling * (centred.mT @ query).unflatten(1, groups).sum(2),
            (loose.mT @ upstream.abs()).unflatten(1, groups).sum(2),
        ]
        own = torch.finfo(dtype).eps
        return [result.detach() for result in results], [
            bound + own * result.abs() + SMALLEST for bound, result in zip(bounds, results, strict=True)
        ]


def _count(case: Case, visible: Tensor, allowed: Tensor) -> None:
    seen["cases"] += 1
    seen[case.path] += 1
    seen[case.dtype] += 1
    seen["longer than the budget"] += not case.settings.covers(case.length)
    seen["leaves keys out"] += bool((allowed != visible).any())
    seen["padding, holes or documents"] += case.has_layout
    seen["documents"] += any(case.starts)
    seen["sliding window"] += case.sliding_window is not None
    seen["queries behind a cache"] += case.queries < case.written
