"""Draw random calls of attention as data; `check_attention.py` runs them and compares.

The shape legend of `sparse_selection.py` applies here.
"""

import math
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from whisper_hf import SparseAttentionConfig

LONGEST = 320
EXACT_BITS = 24  # integers below 2 ** 24 are exact in float32


@dataclass(frozen=True)
class Case:
    """One random call of attention, as data.

    Attributes:
        path: the path to test: `dispatch` (chosen by `masked_sparse`), `blockwise`, `decode` or `triton`.
        written: number of key slots with tokens; with a layout, `unwritten` empty slots follow.
        hidden: per row, the numbers of hidden tokens on the left and right, and the percentage hidden in between.
        starts: per row, the slots at which documents begin.
        views: memory layout of the queries, and of keys and values.
        keys: how the keys are drawn: all random, or with many equal ones, which tests ties.
        entry: largest integer in queries and keys.
        tower: a few keys are larger than the other keys by the factor `2 ** tower`.
        loudness: the standard deviation of the logits is about `2 ** loudness`.
        shifts: exponents of the powers of two by which queries and keys are multiplied, and the scaling is divided.
        tile: number of queries that the fast paths compute at once; `None` for their own constants.
        seed: seed of the numbers in the tensors.
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
        """The sparse attention settings of the case."""
        return SparseAttentionConfig(self.block_size, self.topk, self.local, self.sink)

    @property
    def length(self) -> int:
        """The number of key slots."""
        return self.written + self.unwritten

    @property
    def is_left_to_sdpa(self) -> bool:
        """Whether PyTorch's own attention may compute the case, from all keys or from the keys of chosen blocks."""
        return self.queries == 1 or self.sliding_window is not None or self.settings.covers(self.length)

    @property
    def scaling(self) -> float:
        """The factor on the logits: a power of 4, which keeps them (and its root) exact, or 1.3 times that if odd."""
        deviation = self.entry * (self.entry + 1) / 3 * self.head_dim**0.5
        power = self.loudness - round(math.log2(deviation)) - sum(self.shifts)
        return 4.0 ** (power // 2) * (1.3 if self.odd_scaling else 1.0)


@st.composite
def cases(draw: st.DrawFn, triton: bool = False) -> Case:
    """Draw a case; most are several times longer than the budget, and smaller for Triton's interpreter."""
    block_size = draw(st.sampled_from([16, 16, 32]))
    topk = draw(st.integers(0, 3))
    local = draw(st.integers(1, 3))
    sink = draw(st.integers(0, 2))
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
    case = Case(
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
    # for logits beyond some millions, the gradients of PyTorch's own attention are NaN
    return replace(case, loudness=min(case.loudness, 6), tower=0) if case.is_left_to_sdpa else case


def _lengths(budget: int, longest: int, block_size: int) -> st.SearchStrategy[int]:
    """Return a strategy for lengths: mostly longer than the budget, and often next to a block boundary."""
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
    """Return a strategy for hidden tokens: their numbers on the left and right, and the percentage in between."""
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
    """Draw the slots at which documents begin; some documents have a single token."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, length)), max_size=draw(st.sampled_from([0, 0, 2, 6]))))
    starts, slot = [], 0
    for size in sizes:
        slot += size
        if slot < length:
            starts.append(slot)
    return tuple(starts)
