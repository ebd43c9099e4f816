"""Which implementation computes masked sparse attention: a pure choice, made for one thread and task."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from whisper_hf import SparseAttentionConfig, sparse_backend
from whisper_hf.model import attention, attention_triton
from whisper_hf.model.attention import resolve_backend, shared_dtype, sparse_attention
from whisper_hf.model.sparse_selection import content_layout

SETTINGS = SparseAttentionConfig(16, 1, 1, 1)  # 48 tokens


def states(queries: int, keys: int = 400, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.zeros(1, 4, queries, 16, dtype=dtype)
    return query, torch.zeros(1, 2, keys, 16, dtype=dtype), torch.zeros(1, 2, keys, 16, dtype=dtype)


@pytest.mark.parametrize(
    ("queries", "has_layout", "expected"),
    [
        (1, False, "gathered"),
        (1, True, "gathered"),
        (16, False, "gathered"),  # 16 times 48 keys are less than twice 400
        (17, False, "blockwise"),
        (2, True, "blockwise"),
        (400, False, "blockwise"),
    ],
)
@pytest.mark.parametrize("wanted", ["auto", "stock"])
def test_the_number_of_queries_decides_on_a_cpu(queries: int, has_layout: bool, expected: str, wanted: str) -> None:
    everything = torch.ones(1, 400, dtype=torch.bool)
    layout = content_layout(everything, torch.zeros_like(everything), 400) if has_layout else None
    assert resolve_backend(*states(queries), layout, SETTINGS, wanted) == expected


@pytest.mark.parametrize(("queries", "expected"), [(1, "triton_decode"), (3, "triton")])
def test_kernels_are_taken_where_they_are_wanted(queries: int, expected: str) -> None:
    assert resolve_backend(*states(queries), None, SETTINGS, "triton") == expected


def test_a_gradient_is_not_decoded() -> None:
    query, key, value = states(1)
    assert resolve_backend(query.requires_grad_(), key, value, None, SETTINGS, "triton") == "triton"
    with torch.no_grad():
        assert resolve_backend(query, key, value, None, SETTINGS, "triton") == "triton_decode"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_gpu_falls_back_only_where_nothing_was_insisted_on(dtype: torch.dtype, monkeypatch) -> None:
    """Stand-ins that claim to be on a GPU: only shapes, dtypes and devices are read."""
    device = SimpleNamespace(type="cuda")
    facts = {"is_cuda": True, "device": device, "requires_grad": False}
    floats = torch.float32 if dtype == torch.int8 else dtype

    def on_gpu(heads: int, count: int, dtype: torch.dtype) -> SimpleNamespace:
        floating = {"is_floating_point": lambda: dtype.is_floating_point}
        return SimpleNamespace(shape=(1, heads, count, 16), dtype=dtype, **floating, **facts)

    tensors = on_gpu(4, 1, floats), on_gpu(2, 400, dtype), on_gpu(2, 400, dtype)
    monkeypatch.setattr(attention_triton, "HAS_TRITON", True)
    assert resolve_backend(*tensors, None, SETTINGS, "auto") == "gathered"
    with pytest.raises(ValueError, match=r"float64|quantized cache"):
        resolve_backend(*tensors, None, SETTINGS, "triton")
    halves = on_gpu(4, 1, torch.bfloat16), on_gpu(2, 400, torch.bfloat16), on_gpu(2, 400, torch.bfloat16)
    assert resolve_backend(*halves, None, SETTINGS, "auto") == "triton_decode"


def test_the_dtype_of_the_kernels_is_the_widest_or_that_of_autocast() -> None:
    query, key, value = states(1)
    assert shared_dtype(query, key.bfloat16(), value.to(torch.int8)) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert shared_dtype(query, key, value) == torch.bfloat16
        assert shared_dtype(query.double(), key, value) == torch.float64


def test_overlapping_blocks_in_two_threads_leave_nothing_behind(count_calls) -> None:
    resolved = count_calls(attention, "resolve_backend")
    entered, left = threading.Event(), threading.Event()
    found: dict[str, str] = {}

    def hold_stock() -> None:
        with sparse_backend("stock"):
            entered.set()
            left.wait(60)
            sparse_attention(*states(3), None, 0.25, SETTINGS)
            found["stock"] = resolved[-1]

    holder = threading.Thread(target=hold_stock)
    holder.start()
    assert entered.wait(60)
    with sparse_backend("triton"):
        sparse_attention(*states(3), None, 0.25, SETTINGS)
        found["triton"] = resolved[-1]
        left.set()
        holder.join()
    sparse_attention(*states(3), None, 0.25, SETTINGS)
    assert (found, resolved[-1]) == ({"stock": "gathered", "triton": "triton"}, "gathered")


def test_a_task_keeps_its_choice_while_another_runs() -> None:
    async def run(name: str, turn: asyncio.Event, other: asyncio.Event) -> str:
        with sparse_backend(name):
            other.set()
            await turn.wait()
            return attention._wanted()

    async def both() -> list[str]:
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(run("stock", first, second), run("triton", second, first))

    assert asyncio.run(both()) == ["stock", "triton"]
    assert attention._wanted() == "auto"


def test_another_thread_may_leave_the_block() -> None:
    """A generator that yields within the block, against the documentation, does not fail where it is closed."""

    def held():
        with sparse_backend("stock"):
            yield

    generator = held()
    next(generator)
    closer = threading.Thread(target=generator.close)
    closer.start()
    closer.join()
    assert generator.gi_frame is None
    with sparse_backend("auto"):
        assert attention._wanted() == "auto"


def test_unknown_names_list_the_backends() -> None:
    with pytest.raises(ValueError, match=r"\['auto', 'stock', 'triton'\], got 'cuda'"), sparse_backend("cuda"):
        pass
