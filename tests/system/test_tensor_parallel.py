"""Two processes that share a model's weights find what one finds; so do the stages of a pipeline."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config, set_seed
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from whisper_hf import WhisperLMForCausalLM
from whisper_hf.model.attention_masks import layout_from_inputs

from ..conftest import LENGTH, SIZES, SPARSE, tiny_model, tokens
from ..helpers import tensor_parallel_processes
from ..helpers.tensor_parallel_processes import GENERATIONS, HIDDEN, generations, heads, padded, predictions
from ..helpers.warm_processes import run_two_processes

BUDGET = 48
CASES = {
    "norms": {},
    "biases, tied": {
        "use_qk_norm": False,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", "masked_sparse_attention"],
    },
    "three key-value heads": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36},
}
FOREIGN = {"foreign llama": LlamaConfig(**SIZES), "foreign qwen3": Qwen3Config(**SIZES, head_dim=16)}


def model_of(case: str) -> PreTrainedModel:
    """Return a model whose norms and biases are not the ones and zeros that they start from."""
    if case in FOREIGN:
        set_seed(0)
        model = AutoModelForCausalLM.from_config(FOREIGN[case], attn_implementation="masked_sparse").eval()
        model.config.sparse_attention = SPARSE
    else:
        model = tiny_model(**CASES.get(case, {}))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the models are, and beside each what two processes have found."""
    folder = tmp_path_factory.mktemp("shared")
    for case in (*CASES, *FOREIGN, "stages"):
        model_of(case).save_pretrained(folder / case)
    run_two_processes(tensor_parallel_processes.work, folder)
    return folder


def found_by(process: int, folder: Path, case: str) -> dict[str, torch.Tensor]:
    """Return what a process has found."""
    return load_file(folder / case / f"process{process}.safetensors")


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Compare two results in float32 that were summed in another order."""
    worst = 2e-5 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=worst, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["masked_sparse", "sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_predictions_and_gradients_equal_those_of_one_process(case: str, backend: str, folder) -> None:
    model = model_of(case)
    model.set_attn_implementation(backend)
    for process in (0, 1):
        found = found_by(process, folder, case)
        assert found["rows of q_proj"] == model.model.layers[0].self_attn.q_proj.out_features / 2
        for name, expected in predictions(model).items():
            assert_close(found[f"{backend}: {name}"], expected, name)


@pytest.mark.parametrize("case", CASES)
def test_generation_equals_that_of_one_process(case: str, folder) -> None:
    expected = generations(model_of(case).double())
    for process in (0, 1):
        found = found_by(process, folder, case)
        for kind in GENERATIONS:
            assert torch.equal(found[kind], expected[kind]), kind


@pytest.mark.parametrize("case", CASES)
def test_each_process_attends_with_its_own_heads(case: str, folder) -> None:
    """Or with all of them where they cannot be shared evenly; block means of caches are those of the same heads."""
    processes = [found_by(process, folder, case) for process in (0, 1)]
    for name, states in heads(model_of(case)).items():
        shares = [states, states] if case == "three key-value heads" else states.chunk(2, dim=1)
        for found, share in zip(processes, shares, strict=True):
            assert_close(found[name], share, name)
    for found in processes:
        assert int((found["attention 1"] > 0).sum(-1).max()) == BUDGET < LENGTH


def test_choosing_blocks_adds_no_communication(folder) -> None:
    """Llama's layers, as many and as sharded, communicate as often, by the plan of transformers."""
    counts = [found_by(0, folder, case)["communications"].item() for case in ("norms", "foreign llama")]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("case", CASES)
def test_what_processes_save_together_is_the_same_checkpoint(case: str, folder) -> None:
    model, again = model_of(case), WhisperLMForCausalLM.from_pretrained(folder / case / "saved")
    assert {p.name for p in (folder / case / "saved").glob("*.json")} >= {"config.json", "generation_config.json"}
    for (name, mine), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_models_are_shared_too(case: str, folder) -> None:
    model = model_of(case)
    for name, expected in predictions(model).items():
        for process in (0, 1):
            assert_close(found_by(process, folder, case)[name], expected, name)
    sparse = model(tokens()).logits
    model.set_attn_implementation("sdpa")
    assert (model(tokens()).logits - sparse).abs().max() > 0.1


def test_stages_in_two_processes_equal_the_whole(folder) -> None:
    """The cache of a stage holds keys of its own layers only."""
    model = model_of("stages").double()
    expected = generations(model)
    for process in (0, 1):
        found = found_by(process, folder, "stages")
        torch.testing.assert_close(found["logits"], model(**padded()).logits[:, HIDDEN:])
        for kind, written in expected.items():
            assert torch.equal(found[kind], written), kind


def test_following_the_pipeline_plan_gives_the_logits() -> None:
    """What a module gives goes by the name in the plan to those that take it, in that order."""
    model, batch = tiny_model(num_hidden_layers=4), padded()
    names = [name for name, _ in model.named_modules() if name in model.pp_plan]
    assert sorted(names) == sorted(model.pp_plan)
    assert model.supports_pp_plan
    embeds = model.get_input_embeddings()(batch["input_ids"])
    layout = layout_from_inputs(embeds, batch["attention_mask"], None, None)
    rotation = model.model.rotary_emb(embeds, torch.arange(LENGTH)[None])
    values = {"input_ids": batch["input_ids"], "attention_mask": layout}
    for name in names:
        module, (takes, gives) = model.get_submodule(name), model.pp_plan[name]
        is_list = isinstance(module, torch.nn.ModuleList)
        for step in module if is_list else [module]:
            output = step(*(values[taken] for taken in takes), **({"position_embeddings": rotation} if is_list else {}))
            values |= dict.fromkeys(gives, output)
        values["hidden_states"] = output
    with torch.no_grad():
        assert torch.equal(values["logits"], model(**batch).logits)


def test_a_stage_takes_hidden_states_in_the_place_of_embeddings() -> None:
    """Layers of other stages are replaced, as transformers does; documents are packed."""
    model = tiny_model(num_hidden_layers=4)
    position_ids = torch.cat([torch.arange(100), torch.arange(LENGTH - 100)])[None]
    first, second = copy.deepcopy(model.model), copy.deepcopy(model)
    first.norm, second.model.embed_tokens = PipelineIdentityLayer(), PipelineIdentityLayer()
    for layer in (0, 1):
        first.layers[2 + layer], second.model.layers[layer] = PipelineIdentityLayer(), PipelineIdentityLayer()
    options = {"position_ids": position_ids, "use_cache": False}
    passed_on = first(tokens(), **options).last_hidden_state
    assert torch.equal(second(inputs_embeds=passed_on, **options).logits, model(tokens(), **options).logits)
