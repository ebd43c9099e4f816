"""Run tensor-parallel models in each of two processes, for `test_tensor_parallel.py`; write results beside them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.distributed import DistributedConfig

from ..conftest import tokens

HIDDEN = 50  # number of padding tokens on the left of the first row
GENERATIONS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "int8": {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}},
    "beams": {"num_beams": 3},
    "beams, static": {"num_beams": 3, "cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 50},
    "chunked prefill, static": {"prefill_chunk_size": 50, "cache_implementation": "static"},
}


def padded() -> dict[str, torch.Tensor]:
    """Return a batch of two rows several times longer than the budget, the first of which is padded."""
    ids = tokens()
    mask = torch.ones_like(ids)
    ids[0, :HIDDEN], mask[0, :HIDDEN] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor whose parts are in several processes."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def predictions(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the logits, the loss and the gradients of a model, by name."""
    batch = padded()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        found = {"logits": model(tokens()).logits}
    output = model(**batch, labels=labels, use_cache=False)
    output.loss.backward()
    found["padded logits"], found["loss"] = output.logits[:, HIDDEN:].detach(), output.loss.detach()
    for name, parameter in model.named_parameters():
        found[f"gradient of {name}"] = whole(parameter.grad)
    model.zero_grad()
    return found


def generations(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tokens that a model generates with each kind of cache; use float64, where rounding breaks no ties."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    return {kind: model.generate(**padded(), **options, **GENERATIONS[kind]) for kind in GENERATIONS}


def heads(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the attention weights and block means of the heads that this process has, by layer."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        attentions = model(tokens(), cache=cache, output_attentions=True).attentions
    found = {f"attention {i}": weights for i, weights in enumerate(attentions)}
    for i, layer in enumerate(cache.layers):
        if hasattr(layer, "block_means"):
            found[f"means {i}"] = layer.block_means
    return found


def load(folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> PreTrainedModel:
    """Load a model whose weights are divided among the processes."""
    shared = DistributedConfig(**sizes, tp_plan="auto" if not sizes else None)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=shared)


def communications(model: PreTrainedModel) -> int:
    """Return the number of collective operations of a forward pass."""
    with torch.no_grad(), CommDebugMode() as communication:
        model(tokens())
    return communication.get_total_counts()


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """Return all results of a process for a WhisperLM."""
    model = load(folder)
    found = {"rows of q_proj": torch.tensor(model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0])}
    found["communications"] = torch.tensor(communications(model))
    for backend in ("masked_sparse", "sdpa", "eager"):
        model.set_attn_implementation(backend)
        found |= {f"{backend}: {name}": tensor for name, tensor in predictions(model).items()}
    model.set_attn_implementation("masked_sparse")
    model.save_pretrained(folder / "saved")
    return found | heads(model) | generations(load(folder, torch.float64))


def work(parent: str) -> None:
    """Run all models in a folder, and write the results of this process beside each."""
    for folder in sorted(Path(parent).iterdir()):
        if folder.name == "stages":
            model = load(folder, torch.float64, pp_size=2)
            with torch.no_grad():
                found = {"logits": model(**padded()).logits[:, HIDDEN:]}
            found |= generations(model)
        elif folder.name.startswith("foreign"):
            model = AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="masked_sparse", distributed_config=DistributedConfig(tp_plan="auto")
            )
            found = predictions(model) | {"communications": torch.tensor(communications(model))}
        else:
            found = everything(folder)
        found = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(found, folder / f"process{torch.distributed.get_rank()}.safetensors")
