"""Compare a model with a cache, in random sequences of calls, with the reference on the whole text.

Models are tiny and in float64. Hooks round queries, keys and values to multiples of 1/4 that 8 bits hold exactly, and
RoPE to right angles. The scores of blocks are then exact in float32, also in ties, and the quantized cache is exact.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, Qwen3Config, StaticCache

from whisper_hf import SparseAttentionConfig
from whisper_hf.model import cache
from whisper_hf.model.cache_quantized import QuantizedSparseCache

from ..conftest import SIZES, VOCABULARY, tiny_model

LONGEST, MOST_ROWS = 260, 5
FIRST = 127 / 4  # the first number of each key and value, which makes the scale of a row in 8 bits 1/4
FAMILIES = ("sparse", "mixed", "llama", "qwen3")
KINDS = ("dynamic", "plain", "static", "int8", "offloaded")
SETTINGS = [(1, 1, 1), (1, 1, 0), (2, 1, 0), (0, 1, 1)]  # numbers of topk, local and sink blocks, of 16 tokens
LENGTHS = st.one_of(st.integers(65, 150), st.integers(65, 150), st.integers(1, 150))  # mostly longer than every budget
seen: Counter[str] = Counter()


def rounded_model(family: str) -> PreTrainedModel:
    """Return a tiny model whose queries, keys and values are multiples of 1/4."""
    if family in ("llama", "qwen3"):
        config_class = LlamaConfig if family == "llama" else Qwen3Config
        model = AutoModelForCausalLM.from_config(config_class(**SIZES, head_dim=8), attn_implementation="masked_sparse")
    else:
        types = ["full_attention", "masked_sparse_attention"] if family == "mixed" else None
        model = tiny_model(layer_types=types)
    model = model.eval().double().requires_grad_(False)
    for layer in model.model.layers:
        attention = layer.self_attn
        for name, first in (("q", 0.0), ("k", FIRST), ("v", FIRST)):
            module = getattr(attention, f"{name}_norm", getattr(attention, f"{name}_proj"))
            module.register_forward_hook(_quarters(first, attention.head_dim))
    model.model.rotary_emb.register_forward_hook(_right_angles)
    return model


def _quarters(first: float, head_dim: int) -> Any:
    def hook(_module: object, _args: object, states: Tensor) -> Tensor:
        heads = (states * 4).round().clamp(-15, 15).div(4).unflatten(-1, (-1, head_dim))
        heads[..., 0] = first
        return heads.reshape(states.shape)

    return hook


def _right_angles(_module: object, _args: object, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cosine, sine = (part.round() for part in angles)
    for index in (0, cosine.shape[-1] // 2):  # the first pair of numbers is not rotated, so that FIRST stays
        cosine[..., index], sine[..., index] = 1.0, 0.0
    return cosine, sine


class Caches(RuleBasedStateMachine):
    """A state machine of Hypothesis: a cache, and the tokens that each of its rows has read."""

    kind = "dynamic"
    models: dict[str, PreTrainedModel] = {}

    @initialize(
        family=st.sampled_from(FAMILIES),
        settings=st.sampled_from(SETTINGS),
        masks=st.sampled_from(["none", "ones", "left", "holes"]),
        counts_positions=st.booleans(),
        spare=st.sampled_from([16, 24, 256]),
        rows=st.integers(1, 3),
        first=LENGTHS,
        seed=st.integers(0, 2**32 - 1),
    )
    def start(
        self,
        family: str,
        settings: tuple[int, int, int],
        masks: str,
        counts_positions: bool,
        spare: int,
        rows: int,
        first: int,
        seed: int,
    ) -> None:
        """Make a cache, and read a first piece of text."""
        if family not in self.models:
            self.models[family] = rounded_model(family)
        self.model, self.masks, self.counts_positions = self.models[family], masks, counts_positions
        self.settings, self.spare = SparseAttentionConfig(16, *settings), spare
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = self._new_cache()
        self._forget(rows)
        seen[f"{self.kind}, {family}"] += 1
        self._read(first)

    def _new_cache(self) -> Any:
        config = self.model.config
        if self.kind == "plain":
            return DynamicCache()
        if self.kind == "static":
            return StaticCache(config, max_cache_len=LONGEST)
        if self.kind == "int8":
            return QuantizedSparseCache(config)
        with without_streams():
            return DynamicCache(config=config, offloading=self.kind == "offloaded")

    def _forget(self, rows: int) -> None:
        self.ids = torch.empty(rows, 0, dtype=torch.long)
        self.shown = torch.empty(rows, 0, dtype=torch.long)

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _read(self, count: int) -> None:
        """Read new tokens with the cache, and compare the logits with the reference."""
        rows, start = self.ids.shape
        shown = torch.ones(rows, count, dtype=torch.long)
        if self.masks == "left" and not start:
            shown = (self._random(rows, 1) * count <= torch.arange(count)[None] + 1).long()
        elif self.masks == "holes":
            shown = (self._random(rows, count) > 0.2).long()
        ids = (self._random(rows, count) * (VOCABULARY - 3)).long() + 3
        self.ids, self.shown = torch.cat([self.ids, ids], 1), torch.cat([self.shown, shown], 1)
        inputs: dict[str, Any] = {"attention_mask": None if self.masks == "none" else self.shown}
        positions = (self.shown.cumsum(-1) - 1).clamp(min=0)
        if self.counts_positions and self.masks != "none":
            inputs["position_ids"] = positions
        expected = self._logits(self.ids, **inputs, reference=True, use_cache=False)[:, start:]
        if "position_ids" in inputs:
            inputs["position_ids"] = positions[:, start:]
        with without_streams(), mock.patch.object(cache, "SPARE_TOKENS", self.spare):
            got = self._logits(ids, **inputs, cache=self.cache)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
        seen["comparisons"] += 1
        seen["single tokens"] += count == 1
        seen["longer than the budget"] += not self.settings.covers(int(self.shown.sum(-1).max()))

    def _logits(self, ids: Tensor, reference: bool = False, **inputs: Any) -> Tensor:
        self.model.config.sparse_attention = self.settings
        with torch.no_grad():
            outputs = self.model(ids, output_attentions=reference, **inputs)
        assert not reference or outputs.attentions[0] is not None  # only the reference returns attention weights
        return outputs.logits

    def _room(self) -> bool:
        return LONGEST - self.ids.shape[1] >= 60

    def _is_dynamic(self) -> bool:
        return self.kind != "static"

    @precondition(_room)
    @rule(count=st.one_of(st.integers(1, 60), st.sampled_from([15, 16, 17, 31, 32, 33])))
    def read(self, count: int) -> None:
        """Read a piece of any length."""
        self._read(count)

    @precondition(_room)
    @rule(beyond=st.integers(-1, 1))
    def read_to_a_boundary(self, beyond: int) -> None:
        """Read until the first row ends at a block boundary, or one token before or after it."""
        self._read(int(beyond - self.shown[0].sum()) % 16 or 16)

    @precondition(_room)
    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        """Read single tokens."""
        for _ in range(count):
            self._read(1)

    @precondition(lambda self: self.ids.shape[1] > 1)
    @rule(share=st.integers(1, 100), at_once=st.booleans())
    def crop(self, share: int, at_once: bool) -> None:
        """Remove some of the last tokens, at most all but one."""
        count = math.ceil((self.ids.shape[1] - 1) * share / 100)
        self.cache.crop(-count)
        self.ids, self.shown = self.ids[:, :-count], self.shown[:, :-count]
        self._changed("crops", at_once)

    @rule(at_once=st.booleans())
    def reorder(self, at_once: bool) -> None:
        """Replace each row by a random one."""
        rows = len(self.ids)
        self._take((self._random(rows) * rows).long(), self.cache.reorder_cache)
        self._changed("reorders", at_once)

    @precondition(lambda self: self._is_dynamic() and len(self.ids) * 2 <= MOST_ROWS)
    @rule(at_once=st.booleans())
    def repeat(self, at_once: bool) -> None:
        """Double every row."""
        self.cache.batch_repeat_interleave(2)
        self.ids, self.shown = (each.repeat_interleave(2, dim=0) for each in (self.ids, self.shown))
        self._changed("repeats", at_once)

    @precondition(_is_dynamic)
    @rule(count=st.integers(1, 3), at_once=st.booleans())
    def select(self, count: int, at_once: bool) -> None:
        """Keep some rows."""
        self._take((self._random(min(count, len(self.ids))) * len(self.ids)).long(), self.cache.batch_select_indices)
        self._changed("selections", at_once)

    def _changed(self, what: str, at_once: bool) -> None:
        """Count a change of the cache, and with `at_once` read a token now, before further changes."""
        seen[what] += 1
        if at_once and self._room():
            self._read(1)

    def _take(self, rows: Tensor, change: Any) -> None:
        change(rows)
        self.ids, self.shown = self.ids[rows], self.shown[rows]

    @rule(rows=st.integers(1, 3), first=LENGTHS)
    def reset(self, rows: int, first: int) -> None:
        """Reset the cache, and read a first piece of text, with another number of rows if the cache allows it."""
        self.cache.reset()
        self._forget(rows if self._is_dynamic() else len(self.ids))
        seen["resets"] += 1
        self._read(first)

    def teardown(self) -> None:
        """Read one more token after the last call."""
        if hasattr(self, "cache"):
            seen["orders of calls"] += 1
            if self._room():
                self._read(1)


@contextmanager
def without_streams() -> Iterator[None]:
    """Replace the streams of an accelerator, which offloading needs, in a `with` block."""
    with mock.patch.object(torch, "Stream", mock.MagicMock()), mock.patch.object(torch.cuda, "default_stream"):
        yield
