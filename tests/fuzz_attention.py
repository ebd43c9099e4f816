"""Random attention: shapes, masks, budgets and magnitudes; the fast paths against the reference in float64.

Queries and keys are small integers times powers of two, so that the scores of blocks are exact in float32 in whatever
order they are summed. Which blocks are chosen, ties included, is then a fact, and no difference is excused.

Legend: that of `sparse_selection.py`; also `E` value dimension.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from whisper_hf import SparseAttentionConfig
from whisper_hf.model import (
    attention,
    attention_blockwise,
    attention_decode,
    attention_triton,
    blockwise_head,
    blockwise_plan,
    sparse_selection,
    triton_decode,
)
from whisper_hf.model.attention_reference import attention_reference
from whisper_hf.model.sparse_selection import content_layout, query_slots, selected_keys, visible_keys

LONGEST = 320
EXACT_BITS = 24  # integers below 2 ** 24 are exact in float32
SMALLEST = 1e-38  # of float32's normal numbers
COUNTED = (  # that a path ran is what calls of these prove
    (attention, "attention_blockwise"),
    (attention, "attention_decode"),
    (attention_decode, "_attend_last"),
    (attention_decode, "mean_blocks"),
    (attention_blockwise, "sdpa"),
    (attention_blockwise, "forward_head"),
    (attention_blockwise, "backward_head"),
    (blockwise_head, "_forward_band"),
    (blockwise_head, "_backward_band"),
    (blockwise_head, "_raise_reference"),
    (sparse_selection, "_top_by_sort"),
    (attention_triton, "attend"),
    (attention_triton, "differentiate"),
    (triton_decode, "_decode"),
)
calls: Counter[str] = Counter()
seen: Counter[str] = Counter()


@dataclass(frozen=True)
class Case:
    """One call of attention; `seed` draws its numbers.

    Attributes:
        path: `dispatch` (what `masked_sparse` takes), or by name `blockwise`, `decode` or `triton`.
        written: slots that hold tokens; `unwritten` more follow where there is a layout.
        hidden: per row, how many tokens are hidden on the left and on the right, and the percentage in between.
        starts: per row, the slots where documents begin.
        views: how queries, and how keys and values, lie in memory.
        entry: largest integer of queries and keys.
        tower: bits by which a few keys exceed the others.
        loudness: the logits' standard deviation is about two to the power of this.
        shifts: powers of two that queries and keys are multiplied by, and the scaling divided.
        tile: how many queries the fast paths take at once; `None`: their own constants.
    """

    path: str
    dtype: str
    rows: int
    kv_heads: int
    groups: int
    head_dim: int
    value_dim: int
    queries: int
    written: int
    unwritten: int
    has_layout: bool
    hidden: tuple[tuple[int, int, int], ...]
    starts: tuple[tuple[int, ...], ...]
    block_size: int
    topk: int
    local: int
    sink: int
    sliding_window: int | None
    views: tuple[str, str]
    keys: str
    entry: int
    tower: int
    loudness: int
    odd_scaling: bool
    shifts: tuple[int, int]
    tile: int | None
    seed: int

    @property
    def settings(self) -> SparseAttentionConfig:
        """The budget."""
        return SparseAttentionConfig(self.block_size, self.topk, self.local, self.sink)

    @property
    def length(self) -> int:
        """Number of key slots."""
        return self.written + self.unwritten

    @property
    def is_left_to_sdpa(self) -> bool:
        """Whether PyTorch's own attention may compute it, from all keys or from those of the chosen blocks."""
        return self.queries == 1 or self.sliding_window is not None or self.settings.covers(self.length)

    @property
    def scaling(self) -> float:
        """The factor on the logits; unless it is odd, it keeps them exact, also where its root is applied twice."""
        deviation = self.entry * (self.entry + 1) / 3 * self.head_dim**0.5
        power = self.loudness - round(math.log2(deviation)) - sum(self.shifts)
        return 4.0 ** (power // 2) * (1.3 if self.odd_scaling else 1.0)


@st.composite
def cases(draw: st.DrawFn, triton: bool = False) -> Case:
    """Draw a case, most of them several times longer than the budget; for Triton's interpreter smaller ones."""
    block_size = draw(st.sampled_from([16, 16, 32]))
    topk, local, sink = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    budget = (topk + local + sink) * block_size
    longest = max(min(4 * budget, 80 if triton else LONGEST), budget + block_size)
    written = draw(st.integers(budget + 1, longest) if triton else _lengths(budget, longest, block_size))
    named = ["blockwise", "decode"] if written >= block_size else ["blockwise"]
    path = "triton" if triton else draw(st.sampled_from(["dispatch"] * 4 + named))
    queries = draw(st.sampled_from([written, 1, 0]) if path != "decode" else st.sampled_from([1, 0]))
    queries = queries or draw(st.integers(1, written if path != "decode" else min(written, 24)))
    rows, kv_heads = (1, 1) if triton else (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    has_layout = (path != "decode" or queries == 1) and draw(st.booleans())
    head_dim = draw(st.sampled_from([16, 24] if triton else [2, 4, 6, 8, 16, 32]))
    entry = draw(st.sampled_from([1, 3, 7]))
    spare = EXACT_BITS - math.ceil(math.log2(entry**2 * head_dim * block_size)) - 1
    view = st.sampled_from(["model", "contiguous", "buffer", "strided", "expanded"])
    return Case(
        path=path,
        dtype="float32" if triton else draw(st.sampled_from(["float32", "float32", "float64", "bfloat16"])),
        rows=rows,
        kv_heads=kv_heads,
        groups=draw(st.integers(1, 3)),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, head_dim, 8, 20])),
        queries=queries,
        written=written,
        unwritten=draw(st.sampled_from([0, 1, 37])) if has_layout else 0,
        has_layout=has_layout,
        hidden=tuple(draw(_hidden(written)) for _ in range(rows)) if has_layout else (),
        starts=tuple(draw(_starts(written)) for _ in range(rows)) if has_layout else (),
        block_size=block_size,
        topk=topk,
        local=local,
        sink=sink,
        sliding_window=draw(st.integers(1, written)) if path == "dispatch" and draw(st.integers(0, 11)) == 11 else None,
        views=(draw(view), draw(view)),
        keys=draw(st.sampled_from(["random", "random", "random", "few", "blocks", "equal", "zero"])),
        entry=entry,
        tower=draw(st.sampled_from([0, 0, spare // 2, spare])),
        loudness=draw(st.sampled_from([0, -2, 1, 2, 6, 9, 20])),
        odd_scaling=draw(st.booleans()),
        shifts=draw(st.sampled_from([(0, 0), (0, 0), (30, -30), (-30, 25), (20, 20)])),
        tile=draw(st.sampled_from([None, 7, 40])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def _lengths(budget: int, longest: int, block_size: int) -> st.SearchStrategy[int]:
    """Mostly beyond the budget, often next to the boundary of a block."""
    boundary = st.builds(
        lambda block, offset: block * block_size + offset,
        st.integers(budget // block_size + 1, longest // block_size),
        st.integers(-1, 1),
    )
    return st.one_of(
        st.integers(budget + 1, longest),
        st.integers(min(2 * budget, longest), longest),
        st.integers(1, budget),
        boundary,
    )


def _hidden(length: int) -> st.SearchStrategy[tuple[int, int, int]]:
    some = st.integers(0, length)
    return st.one_of(
        st.just((0, 0, 0)),
        st.tuples(some, st.just(0), st.just(0)),
        st.tuples(st.just(0), some, st.just(0)),
        st.tuples(st.just(0), st.just(0), st.sampled_from([2, 10, 30])),
        st.tuples(st.integers(0, length // 4), st.integers(0, length // 4), st.sampled_from([0, 5])),
        st.just((length, 0, 0)),
    )


@st.composite
def _starts(draw: st.DrawFn, length: int) -> tuple[int, ...]:
    """Documents, also of one token."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, length)), max_size=draw(st.sampled_from([0, 0, 2, 6]))))
    starts, slot = [], 0
    for size in sizes:
        slot += size
        if slot < length:
            starts.append(slot)
    return tuple(starts)


def tensors(case: Case) -> list[Tensor]:
    """Return query (`[B, H, T, D]`), key (`[B, K, S, D]`) and value (`[B, K, S, E]`) that require gradients."""
    generator = torch.Generator().manual_seed(case.seed)
    heads, length = case.kv_heads * case.groups, case.length

    def integers(*shape: int) -> Tensor:
        return torch.randint(-case.entry, case.entry + 1, shape, generator=generator).double()

    query = integers(case.rows, heads, case.queries, case.head_dim)
    key = integers(case.rows, case.kv_heads, length, case.head_dim)
    if case.keys != "random":  # every one of them one of two, in runs of a block, or all the same
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
    """Lay `[B, H, T, D]` out in memory; what lies between is not a number."""
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
    """Return the layout, `[B, 1, 1, S]` int32."""
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
    """Count the calls of what is in `COUNTED`, and make tiles small."""
    with ExitStack() as stack:
        for module, name in COUNTED:
            stack.enter_context(mock.patch.object(module, name, _counting(getattr(module, name), called(module, name))))
        if tile:
            for module, name, value in (
                (attention, "QUERIES_PER_STEP", tile),
                (blockwise_plan, "QUERIES_PER_TILE", tile),
                (blockwise_plan, "QUERIES_PER_CHOICE", tile),
                (blockwise_head, "BLOCKS_PER_BAND", tile // 5),
                (sparse_selection, "LEAST_TO_PARTITION", 1),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
        yield


def called(module: ModuleType, name: str) -> str:
    """Return what `calls` says of a function."""
    return f"{module.__name__.rpartition('.')[2]}.{name}"


def _counting(function: object, name: str) -> object:
    def counting(*args: object, **kwargs: object) -> object:
        calls[name] += 1
        return function(*args, **kwargs)

    return counting


def attend(case: Case, query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None) -> Tensor:
    """Attend by the path under test, `[B, H, T, E]`."""
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
    path = attention_decode.attention_decode if decodes else attention_blockwise.attention_blockwise
    return path(query, key, value, layout, case.scaling, case.settings)


def check(case: Case) -> None:
    """Compare a fast path's output, with and without gradients, and its gradients with the reference's.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    states, layout = tensors(case), layout_of(case)
    visible = visible_keys(
        layout, query_slots(layout, case.queries, case.length, states[0].device), case.length, case.sliding_window
    )
    allowed = visible
    if case.sliding_window is None:
        allowed = selected_keys(states[0], states[1], visible, case.settings)
    exact, bounds = truth(case, states, allowed)
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


def truth(case: Case, states: list[Tensor], allowed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients of query, key and value in float64, and how far rounding may move each element.

    Rounding moves a weight by a share of it, which grows with the logit unless that is exact, and a logit's gradient by
    the same share of the sizes of its terms; half precision rounds weights and the saved output once more, and where
    PyTorch's own attention computes, the logits, too. The smallest weights count as much as they are clamped to.
    """
    exact = [tensor.detach().double().requires_grad_() for tensor in states]
    upstream = _upstream(case)
    output, weights = attention_reference(*exact, allowed, case.scaling)
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
        floor = shown * 2 * math.exp(blockwise_head.UNDERFLOW)
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
