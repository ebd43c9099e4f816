"""What vLLM's Transformers backend asks of a model, done by an engine in miniature: exact for a model that is dense
anyway, refused for one that is not."""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, DynamicCache, PreTrainedModel

from whisper_hf import to_dense
from whisper_hf.model.modeling_whisper_lm import WhisperLMAttention

from ..conftest import LENGTH, tiny_model, tokens

BUDGET = 48
FULL = {"layer_types": ["full_attention"] * 2}
COVERED = {"max_position_embeddings": BUDGET}
STYLES = {"colwise", "rowwise", "replicate", "colwise_gather_output", "rowwise_split_input"}  # of vLLM's linear layers


@dataclass
class Engine:
    """Keeps keys and values of every layer and sequence, and attends densely, one sequence after the other.

    `batch` says what the one row of tokens is made of: a sequence's name, and how many of its tokens.
    """

    batch: list[tuple[str, int]] = field(default_factory=list)
    kept: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        """Return `[tokens, H * D]` for one row of queries, keys and values."""
        assert mask is None
        outputs, start = [], 0
        for name, length in self.batch:
            queries, keys, values = (states[:, :, start : start + length] for states in (query, key, value))
            if (module.layer_idx, name) in self.kept:
                old_keys, old_values = self.kept[module.layer_idx, name]
                keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
            self.kept[module.layer_idx, name] = keys, values
            causal = torch.ones(length, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - length)
            attended = nn.functional.scaled_dot_product_attention(
                queries, keys, values, causal, scale=scaling, enable_gqa=True
            )
            outputs.append(attended[0].transpose(0, 1).flatten(1))
            start += length
        return torch.cat(outputs), None


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine whose attention is registered under vLLM's name, without masks, as vLLM does it."""
    engine = Engine()
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", engine.attend)
    return engine


def loaded_by_engine(folder: Path) -> PreTrainedModel:
    """Build a base model without weights from its config, replace linear layers by the plan, and fill in weights."""
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "vllm"
    with init_empty_weights():
        model = AutoModel.from_config(config, dtype=torch.float32)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        styles = [style for pattern, style in model.tp_plan.items() if re.match(pattern, name)]
        assert len(styles) == 1
        assert styles[0] in STYLES
        parent, _, child = name.rpartition(".")
        replaced = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        setattr(model.get_submodule(parent), child, replaced)
    weights = {name.removeprefix("model."): w for name, w in load_file(folder / "model.safetensors").items()}
    weights.pop("lm_head.weight", None)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@pytest.mark.parametrize(
    ("options", "lengths", "steps"), [(FULL, (LENGTH, 70, 113), 5), (COVERED, (40, 7, 23), 8)], ids=["full", "covered"]
)
def test_an_engine_writes_what_generate_writes(options: dict, lengths: tuple, steps: int, tmp_path, engine) -> None:
    """Sequences come one after another in one row, without a mask or a cache; then a token of each at a time."""
    model = tiny_model(**options, attention_bias=True)
    model.save_pretrained(tmp_path)
    prompts = {f"sequence {length}": tokens(1, length)[0] for length in lengths}
    base = loaded_by_engine(tmp_path)
    written = {name: prompt.tolist() for name, prompt in prompts.items()}
    unread = dict(prompts)
    for _ in range(steps):
        engine.batch = [(name, len(part)) for name, part in unread.items()]
        positions = [torch.arange(len(written[name]) - len(part), len(written[name])) for name, part in unread.items()]
        with torch.no_grad():
            (states,) = base(
                input_ids=torch.cat(list(unread.values()))[None],
                inputs_embeds=None,
                use_cache=False,
                position_ids=torch.cat(positions)[None],
                return_dict=False,
            )
            last = torch.tensor([length for _, length in engine.batch]).cumsum(0) - 1
            following = model.lm_head(states[0, last]).argmax(-1)
        unread = {name: token.view(1) for name, token in zip(written, following, strict=True)}
        for name, token in unread.items():
            written[name].append(int(token))
    for name, prompt in prompts.items():
        alone = model.generate(prompt[None], max_new_tokens=steps, do_sample=False, eos_token_id=None)
        assert written[name] == alone[0].tolist()


def test_what_the_engine_reads_from_source_is_there() -> None:
    """One call of a variable that comes from the interface, with an attribute as the scale; and the layer's number."""
    attention = tiny_model().model.layers[1].self_attn
    tree = ast.parse(textwrap.dedent(inspect.getsource(WhisperLMAttention.forward)))
    lookups = [
        node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    ]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in lookups
    ]
    assert len(lookups) == len(calls) == 1
    passed = {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}
    assert passed["scaling"] == "self.scaling"
    assert isinstance(attention.scaling, float)
    assert passed[None] == "kwargs"
    assert attention.layer_idx == 1
    assert attention.is_causal


def test_a_checkpoint_says_what_the_registry_asks(tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(saved["auto_map"])
    assert saved["architectures"] == ["WhisperLMForCausalLM"]
    assert model.is_backend_compatible()
    assert model.supports_pp_plan
    assert model.base_model_prefix == "model"


def test_a_sparse_model_is_refused_with_both_remedies(tmp_path, engine) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=rf"to_dense.*{BUDGET} tokens.*max_position_embeddings={BUDGET}"):
        AutoModel.from_config(config)
    with pytest.raises(ValueError, match="to_dense"):
        tiny_model().set_attn_implementation("vllm")
    with pytest.raises(ValueError, match="to_dense"):
        tiny_model(layer_types=["full_attention", "masked_sparse_attention"], attn_implementation="vllm")
    config.max_position_embeddings = BUDGET  # as by vLLM's option --hf-overrides
    assert AutoModel.from_config(config).config._attn_implementation == "vllm"
    assert type(to_dense(tiny_model())).__name__ == "Qwen3ForCausalLM"  # which vLLM has a model of its own for


def test_without_an_engine_its_name_is_refused() -> None:
    for name in ("vllm", "flash_attention_2", "flex_attention", "paged|eager"):
        with pytest.raises(ValueError, match="not supported"):
            tiny_model(**FULL, attn_implementation=name)


def test_what_the_engine_keeps_is_not_passed_to_it(engine) -> None:
    model = tiny_model(**FULL, attn_implementation="vllm", use_cache=False)
    cache = DynamicCache(config=model.config)
    for options in ({"attention_mask": torch.ones_like(tokens())}, {"cache": cache}, {"use_cache": True}):
        with pytest.raises(ValueError, match=f"got {next(iter(options))}.*masked_sparse"):
            model(tokens(), **options)
