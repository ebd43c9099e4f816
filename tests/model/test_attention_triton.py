"""The Triton kernels: the reference's values and gradients; on a GPU, or else in Triton's interpreter; that they run.

In the interpreter tiles are small, so that these small inputs still make many of them, and bfloat16 is left out.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from whisper_hf import SparseAttentionConfig
from whisper_hf.model import (
    attention,
    attention_triton,
    triton_choosers,
    triton_decode,
    triton_forward,
    triton_plan,
    triton_selection,
    triton_tiling,
)
from whisper_hf.model.attention import sparse_backend
from whisper_hf.model.attention_gathered import mean_blocks
from whisper_hf.model.attention_masks import explicit_mask
from whisper_hf.model.sparse_selection import content_layout
from whisper_hf.model.triton_optional import IS_INTERPRETED

from ..conftest import ROOT, tiny_model, tokens
from ..helpers.attention_cases import attend_by_reference, attention_inputs, layout_of

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SETTINGS = SparseAttentionConfig(block_size=16, topk_blocks=2, local_blocks=1, sink_blocks=1)  # 64 tokens
LENGTH = 163  # two and a half times that
HALVES = [torch.float16, torch.bfloat16] if HAS_GPU else [torch.float16]
HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton"),
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1"),
]


@pytest.fixture(autouse=True)
def _small_tiles_and_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make tiles small where they are interpreted; fill what is allocated and not written with NaN."""
    if not HAS_GPU:
        for module, name, value in (
            (triton_decode, "BLOCKS_PER_STEP", 4),
            (triton_choosers, "ENTRIES_PER_RUN", 128),
            (triton_tiling, "SMALLEST", 8),
            (triton_tiling, "BLOCKS_PER_STEP", 8),
            (triton_tiling, "ROWS", 64),
            (triton_tiling, "KEYS_PER_STEP", 32),
            (triton_plan, "QUERIES_PER_ITEM", 80),
        ):
            monkeypatch.setattr(module, name, value)
    triton_plan._plan_without_layout.cache_clear()
    torch.use_deterministic_algorithms(True, warn_only=HAS_GPU)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(**changed: Any) -> list[Tensor]:
    """Return query, key and value in the memory layout of models; a tiny row of two heads unless it is `changed`."""
    tiny = {"heads": 2, "kv_heads": 1, "head_dim": 16, "queries": LENGTH, "keys": LENGTH, "rows": 1}
    return attention_inputs(**{**tiny, **changed}, device=DEVICE, tokens_first=True)


def assert_same(states: list[Tensor], layout: Tensor | None = None, settings=SETTINGS, rtol=1e-4, atol=2e-5) -> None:
    """Compare output and gradients of the kernels with the reference's."""
    scaling = states[0].shape[-1] ** -0.5
    results, upstream = [], None
    for forward in (attention_triton.attention_triton, attend_by_reference):
        output = forward(*states, layout, scaling, settings)
        upstream = torch.randn_like(output) if upstream is None else upstream
        results.append([output, *torch.autograd.grad(output, states, upstream)])
    for name, got, expected in zip("oqkv", *results, strict=True):
        assert got.dtype == expected.dtype, name
        assert got.shape == expected.shape, name
        torch.testing.assert_close(
            got, expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )


LAYOUTS = ["none", "left and right", "packed", "packed with holes", "one token and all hidden"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_triton_matches_reference_in_every_layout(name: str) -> None:
    assert_same(inputs(rows=2), layout_of(name, LENGTH, DEVICE))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim", "queries"),  # 2, 2 and 11 tiles of queries
    [(1, 1, 64, 64, 90), (6, 2, 24, 40, 29), (16, 1, 16, 128, 21)],
)
def test_triton_matches_reference_in_every_head_shape(
    heads: int, kv_heads: int, head_dim: int, value_dim: int, queries: int
) -> None:
    assert_same(inputs(heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, queries=queries))


@pytest.mark.parametrize(
    ("block_size", "topk", "local", "sink"), [(16, 0, 1, 0), (16, 3, 2, 0), (32, 1, 1, 0), (16, 0, 1, 2), (64, 1, 1, 0)]
)
def test_triton_matches_reference_at_every_budget(block_size: int, topk: int, local: int, sink: int) -> None:
    settings = SparseAttentionConfig(block_size, topk, local, sink)
    length = min(3 * settings.budget_blocks * block_size, 333)
    assert not settings.covers(length)
    assert_same(inputs(queries=min(length, 150), keys=length), None, settings)


@pytest.mark.parametrize(("queries", "name"), [(1, "none"), (45, "none"), (45, "packed")])
def test_triton_matches_reference_behind_a_cache(queries: int, name: str) -> None:
    assert_same(inputs(queries=queries, rows=2), layout_of(name, LENGTH, DEVICE))


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, count_calls) -> None:
    states = inputs(queries=90)
    whole = attention_triton.attention_triton(*states, None, 0.2, SETTINGS)
    monkeypatch.setattr(triton_forward, "PARTIAL_BYTES", 1)
    assert len(list(triton_forward.chunks(states[0], *chosen_and_plan(states), 16))) > 2
    last_bits = dict.fromkeys(("rtol", "atol"), 0.0 if HAS_GPU else 1e-6)  # a CPU's depend on a row's place in a tile
    torch.testing.assert_close(attention_triton.attention_triton(*states, None, 0.2, SETTINGS), whole, **last_bits)
    assert_same(states)


def chosen_and_plan(states: list[Tensor]) -> tuple[Tensor, triton_plan.TritonPlan]:
    """Return the blocks that the kernel chooses, and the plan."""
    query, key, value = states
    plan, tiling = attention_triton._plan(query, key, value, None, SETTINGS)
    return triton_selection.choose(query, key, plan, tiling, SETTINGS), plan


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_error_is_no_worse_than_that_of_sdpa(dtype: torch.dtype) -> None:
    """Values and gradients, against float64 on the same inputs and the same choice of blocks."""
    states = inputs(dtype=dtype)
    mask = explicit_mask(*states[:2], None, SETTINGS)
    upstream = torch.randn_like(states[0])

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeated = [tensor.expand_as(query) for tensor in (key, value)]
        return torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.25)

    def run(attend, states: list[Tensor]) -> list[Tensor]:
        output = attend(*states)
        return [output, *torch.autograd.grad(output, states, upstream.to(output.dtype))]

    fast = run(lambda *tensors: attention_triton.attention_triton(*tensors, None, 0.25, SETTINGS), states)
    plain = run(sdpa, states)
    exact = run(sdpa, [tensor.detach().double().requires_grad_() for tensor in states])
    for name, truth, usual, got in zip("oqkv", exact, plain, fast, strict=True):
        assert got.dtype == dtype, name
        assert (got - truth).abs().mean() <= 1.5 * (usual - truth).abs().mean(), name


# --- selection -------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_more_recent_block() -> None:
    """Equal keys tie everywhere: the choice is that of the reference, and is in the past."""
    states = inputs()
    with torch.no_grad():
        states[1].fill_(1.0)
    chosen, _ = chosen_and_plan(states)
    assert sorted(chosen[0, 140].tolist()) == [6, 7]  # block 8 is local
    assert chosen[0, 30].tolist() == [-1, -1]
    assert_same(states)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_scores_are_as_exact_as_in_float32(dtype: torch.dtype) -> None:
    """Means that differ in their last bits, of large and small keys, are told apart as by float64."""
    query, key, value = (tensor.detach() for tensor in inputs())
    key = (key[:, :, :1] + key * torch.logspace(-4, 0, 16, device=DEVICE)).to(dtype)
    chosen, plan = chosen_and_plan([query.to(dtype), key, value.to(dtype)])
    tiling = attention_triton._plan(query.to(dtype), key, value.to(dtype), None, SETTINGS)[1]
    means = triton_selection.block_means(key, plan, tiling)
    means = sum(part.double() / triton_selection.PARTS[dtype][1] ** index for index, part in enumerate(means))[
        :, :10
    ]  # the first row's complete blocks
    exact = key[0, :, :160].double().unflatten(1, (10, 16)).mean(2)
    torch.testing.assert_close(means, exact, rtol=1e-6, atol=1e-7)
    assert chosen.max() < plan.num_blocks


@pytest.mark.parametrize("topk", [1, 3, 8])
def test_lists_of_choosers_are_complete_and_in_order(topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_choosers, "ENTRIES_PER_RUN", 64)  # several runs for each block
    chosen = torch.rand(2, 150, 9).argsort(-1)[..., :topk].int()  # distinct blocks of nine
    chosen[torch.rand(chosen.shape) > 0.8] = -1
    starts, pairs = triton_choosers.list_choosers(chosen.to(DEVICE), 40, 90, 9)
    bounds, listed = starts.tolist(), pairs.tolist()
    for head in range(2):
        for block in range(9):
            query, rank = (chosen[head, 40:130] == block).nonzero().unbind(1)
            number = head * 9 + block
            assert listed[bounds[number] : bounds[number + 1]] == ((query + 40) * topk + rank).tolist()


def test_plans_are_shared_by_layers_and_follow_changes(count_calls) -> None:
    built = count_calls(triton_plan, "_documents")
    states = [tensor.detach() for tensor in inputs(queries=20, rows=2)]
    layout = layout_of("left", LENGTH, DEVICE)
    first = attention_triton.attention_triton(*states, layout, 0.2, SETTINGS)
    assert torch.equal(attention_triton.attention_triton(*states, layout, 0.2, SETTINGS), first)
    assert len(built) == 1
    layout[0, :, :, :60] = -1
    got = attention_triton.attention_triton(*states, layout, 0.2, SETTINGS)
    assert len(built) == 2
    torch.testing.assert_close(got, attend_by_reference(*states, layout, 0.2, SETTINGS), rtol=1e-4, atol=1e-5)


# --- numerical safety ------------------------------------------------------------------------------------------------


def test_huge_logits_stay_finite() -> None:
    query, key, value = (tensor.detach() for tensor in inputs())
    states = [tensor.requires_grad_() for tensor in (query * 1e4, key * 1e3, value)]
    output = attention_triton.attention_triton(*states, None, 1.0, SETTINGS)
    assert all(tensor.isfinite().all() for tensor in (output, *torch.autograd.grad(output.sum(), states)))


def test_runs_are_bitwise_the_same_whatever_else_is_in_the_batch() -> None:
    states, upstream = inputs(queries=70, rows=2), torch.randn(2, 2, 70, 16, device=DEVICE)
    results = []
    for rows in (slice(0, 2), slice(1, 2), slice(1, 2)):
        output = attention_triton.attention_triton(*(tensor[rows] for tensor in states), None, 0.2, SETTINGS)
        results.append([output, *(grad[rows] for grad in torch.autograd.grad(output, states, upstream[rows]))])
    for together, alone, again in zip(*results, strict=True):
        assert torch.equal(together[1:], alone)
        assert torch.equal(alone, again)


def test_operators_keep_to_their_declarations() -> None:
    """Fake outputs have the shapes, dtypes and strides of true ones; nothing is written to that is not declared."""
    states, sizes = inputs(queries=20, keys=70), (16, 1, 1, 1)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(attention_triton._attend, (*states, None, 0.2, *sizes), test_utils=checks)
    layout = content_layout(torch.rand(1, 70) > 0.2, torch.zeros(1, 70, dtype=torch.bool), 70).to(DEVICE)
    states = [tensor.detach() for tensor in (states[0], states[1].contiguous(), states[2].mT.contiguous().mT)]
    saved = attention_triton._attend(*states, layout, 0.2, *sizes)
    arguments = (saved[0], *states, *saved, layout, 0.2, *sizes)
    torch.library.opcheck(attention_triton._attend_backward, arguments, test_utils=checks[:2])
    states = [states[0][:, :, -1:].detach(), *(tensor.detach() for tensor in states[1:])]
    means = mean_blocks(states[1], None, 16)
    arguments = (*states, None, None, means, 0.2, *sizes)
    torch.library.opcheck(triton_decode._decode, arguments, test_utils=checks[:2])


def test_second_derivative_is_refused() -> None:
    states = inputs(queries=20)
    output = attention_triton.attention_triton(*states, None, 0.2, SETTINGS)
    gradient = torch.autograd.grad(output.sum(), states[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.sum().backward()


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("settings", [SETTINGS, SparseAttentionConfig(16, 0, 1, 2)])
def test_decode_matches_reference(name: str, settings: SparseAttentionConfig) -> None:
    states = [tensor.detach() for tensor in inputs(heads=6, kv_heads=2, head_dim=24, queries=1, value_dim=40, rows=2)]
    layout = layout_of(name, LENGTH, DEVICE)
    got = triton_decode.attention_triton_decode(*states, layout, 0.2, settings)
    torch.testing.assert_close(got, attend_by_reference(*states, layout, 0.2, settings), rtol=1e-4, atol=1e-5)


def test_decode_in_shares_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "PROGRAMS", 4)
    monkeypatch.setattr(triton_decode, "MOST_SPLITS", 2)
    test_decode_matches_reference("left", SparseAttentionConfig(16, 3, 2, 1))


def test_decode_reads_only_chosen_blocks_and_summaries() -> None:
    """What is not chosen may be anything: with cached means, it is never touched."""
    query, key, value = (tensor.detach() for tensor in inputs(queries=1))
    means = mean_blocks(key, None, 16)
    expected = triton_decode.attention_triton_decode(query, key, value, None, 0.2, SETTINGS, means)
    allowed = explicit_mask(query, key, None, SETTINGS)[:, ::2, 0]  # [B, K, S]
    assert allowed.sum(-1).max() <= 64 < LENGTH
    for states in (key, value):
        states[~allowed] = float("nan")
    got = triton_decode.attention_triton_decode(query, key, value, None, 0.2, SETTINGS, means)
    assert torch.equal(got, expected)


def test_decode_equals_prefill() -> None:
    query, key, value = (tensor.detach() for tensor in inputs())
    prefill = attention_triton.attention_triton(query, key, value, None, 0.2, SETTINGS)
    for length in (LENGTH, 144, 145):
        states = query[:, :, length - 1 : length], key[:, :, :length], value[:, :, :length]
        got = triton_decode.attention_triton_decode(*states, None, 0.2, SETTINGS)
        torch.testing.assert_close(got, prefill[:, :, length - 1 : length], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not HAS_GPU, reason="CUDA graphs need a GPU")
def test_decode_runs_in_a_cuda_graph() -> None:
    states, layout = [tensor.detach() for tensor in inputs(queries=1, rows=2)], layout_of("left", LENGTH, DEVICE)
    means = mean_blocks(states[1], None, 16)

    def step() -> Tensor:
        return triton_decode.attention_triton_decode(*states, layout, 0.2, SETTINGS, means)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    states[0].copy_(torch.randn_like(states[0]))
    graph.replay()
    assert torch.equal(got, step())


# --- in the model ----------------------------------------------------------------------------------------------------


def test_model_runs_on_the_kernels_forward_backward_and_decoding(count_calls) -> None:
    """Asked for by name, in training with gradient checkpointing and in generation; nothing else computes."""
    ids = tokens(1, 90).to(DEVICE)
    results = {}
    for backend in ("stock", "triton"):
        model = tiny_model(num_attention_heads=2, num_key_value_heads=1, head_dim=8).to(DEVICE).train()
        model.gradient_checkpointing_enable()
        with sparse_backend(backend):
            model(ids, labels=ids).loss.backward()
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model.eval()(ids, cache=cache)
                logits = model(ids[:, :1], cache=cache).logits
        results[backend] = [logits, *(parameter.grad for parameter in model.parameters())]
        if backend == "stock":
            forward, backward = count_calls(attention_triton, "attend"), count_calls(attention_triton, "differentiate")
            decode = count_calls(triton_decode, "_decode")
            stock = [count_calls(attention, name) for name in ("attention_blockwise", "attention_gathered")]
    torch.testing.assert_close(results["triton"], results["stock"], rtol=1e-3, atol=1e-5)
    assert (len(forward), len(backward), len(decode)) == (2 * 3, 2, 2)  # two layers; recomputed once
    assert not any(stock)


def test_compiled_attention_is_the_same() -> None:
    states = inputs(queries=70, keys=70)
    module = torch.nn.Module()
    module.config = tiny_model().config

    def attend(*states: Tensor) -> Tensor:
        return attention.masked_sparse_attention_forward(module, *states, None, scaling=0.25)[0]

    with sparse_backend("triton"):
        expected = attend(*states)
        got = torch.compile(attend, backend="aot_eager", fullgraph=True)(*states)
        decoded = torch.compile(torch.no_grad()(attend), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(decoded(states[0][:, :, -1:], *states[1:]), expected[:, -1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(got, expected)
    for one, other in zip(*(torch.autograd.grad(out.sum(), states) for out in (got, expected)), strict=True):
        assert torch.equal(one, other)


def test_autocast_takes_its_dtype() -> None:
    query, key, value = (tensor.detach() for tensor in inputs(queries=70, keys=70))
    settings = SparseAttentionConfig(16, 1, 1, 1)
    with sparse_backend("triton"), torch.autocast(DEVICE, torch.float16):
        got = attention.sparse_attention(query, key, value.half(), None, 0.25, settings, None)
    assert got.dtype == torch.float32
    expected = attention_triton.attention_triton(query.half(), key.half(), value.half(), None, 0.25, settings)
    assert torch.equal(got, expected.float())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "bfloat16, float16 or float32, got float64"),
        ({"head_dim": 320}, "head dimensions of at most 256, got 320"),
        ({"heads": 130, "kv_heads": 1}, "at most 32 query heads per key-value head, got 130"),
    ],
)
def test_explicit_requests_that_cannot_be_met_raise(change: dict, message: str) -> None:
    states = [tensor.detach() for tensor in inputs(**{"queries": 3, "keys": 70, **change})]
    with sparse_backend("triton"), pytest.raises(ValueError, match=message) as error:
        attention.sparse_attention(*states, None, 0.25, SETTINGS, None)
    assert 'sparse_backend("auto")' in str(error.value)
    assert attention.sparse_attention(*states, None, 0.25, SETTINGS, None).shape == states[0].shape


def test_other_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (tensor.detach().cpu() for tensor in inputs(queries=1))
    large = SparseAttentionConfig(256)

    def unmet(query: Tensor, key: Tensor, value: Tensor, settings: SparseAttentionConfig) -> str | None:
        return attention_triton.unmet_condition(query, key, value, settings, True, torch.float32)

    assert "at most 128 tokens of this width and dtype, got 256" in unmet(query, key, value, large)
    assert "quantized cache" in unmet(query, key.to(torch.int8), value, SETTINGS)
    monkeypatch.setattr(attention_triton, "IS_INTERPRETED", False)
    assert "need CUDA tensors, got cpu; move" in unmet(query, key, value, SETTINGS)
    monkeypatch.setattr(attention_triton, "HAS_TRITON", False)
    assert "pip install triton" in unmet(query, key, value, SETTINGS)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from whisper_hf.model.attention_triton import unmet_condition
from whisper_hf.model.attention import sparse_backend, SparseAttentionConfig
states = [torch.zeros(1, 1, 1, 8)] * 3
print(unmet_condition(*states, SparseAttentionConfig(), False, torch.float32))
"""


def test_files_can_be_imported_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout


# --- on the hardware it is for ---------------------------------------------------------------------------------------


SHAPES = ["128-16", "64-4"]  # width of a head, query heads per key-value head


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, int]]]:
    """Return what each kernel takes of an H100, by shape."""
    nvidia = importlib.util.find_spec("triton.backends.nvidia")
    if nvidia is None or not os.access(nvidia.submodule_search_locations[0] + "/bin/ptxas", os.X_OK):
        pytest.skip("needs a triton that brings ptxas along")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.triton_ahead_of_time", *SHAPES]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_compiles_for_an_h100_and_fits_its_memory(shape: str, compiled) -> None:
    resources = compiled[shape]
    assert len(resources) == 15
    for name, used in resources.items():
        assert used["shared"] <= 227 * 1024, name
        assert used["registers"] * used["warps"] * 32 <= 65536, name


# --- its benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's module, made small."""
    module = importlib.import_module("examples.benchmarks.attention_cuda")
    monkeypatch.setattr(module, "SETTINGS", SETTINGS)
    monkeypatch.setattr(module, "HEAD_DIM", 16)
    return module


def test_benchmark_measures_every_pass_of_every_competitor(benchmark: Any) -> None:
    """With a clock that counts: 2 for the sparse run, which comes first in each round, 3 for the next."""

    def timer(run: benchmark.Run) -> float:
        run()
        clock.append(len(clock) % 2 + 2.0)
        return clock[-1]

    rows = []
    for what in benchmark.PASSES:
        clock: list[float] = []
        rows.append(benchmark.measure_row(what, 80, (2, 1), timer, rounds=1, device="cpu"))
        assert rows[-1]["milliseconds"] == {"sparse": 2.0, "flash2": 3.0}
        assert rows[-1]["ratios"] == {"flash2": 1.5}
        assert rows[-1]["failed"].keys() == {"cudnn"}  # on a CPU
    table = benchmark.report([{**row, "length": 8192} for row in rows])
    assert "| forward + backward, 2 heads: flash2 / sparse | 1.50 |" in " ".join(table.split()).replace("| |", "|\n|")


@pytest.mark.skipif(HAS_GPU, reason="a GPU is there")
def test_benchmark_without_a_gpu_says_so_and_writes_nothing(benchmark: Any, tmp_path: Path) -> None:
    options = argparse.Namespace(longest=8192, only=None, output=tmp_path / "results")
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(options)
    assert "needs a CUDA device, got none" in str(exit_.value.code)
    assert not options.output.exists()
