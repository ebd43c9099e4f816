"""Measure the overhead of a WhisperLM in a training step under FSDP 2, against a Llama with the same weights.

    torchrun --nproc_per_node 2 examples/benchmarks/fsdp.py                              # two CPU processes: 2 minutes
    torchrun --nproc_per_node 8 examples/benchmarks/fsdp.py --hidden-size 4096 --layers 16 --length 1536      # on GPUs

Both models are sharded layer by layer, with activation checkpointing. They are trained in turns with AdamW on the same
random tokens. The budget covers the sequence, so both compute the same attention (SDPA). The difference of their times
is the overhead of this package. The script prints the ratio of the medians (WhisperLM time / Llama time; 1 is no
overhead), and writes it to `--output`. On CPUs (gloo) it measures process time, summed over processes; on GPUs (NCCL)
it measures wall time.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedModel as Model

from examples.benchmarks.measuring import Run, alternate
from whisper_hf import from_dense

HEADS, KEY_HEADS, VOCABULARY = 8, 4, 8192


def shard(model: Model) -> Model:
    """Shard a model in place: each layer, then the head with the last norm, then the remaining parameters."""
    model.activation_checkpointing_enable()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    return fully_shard(model)


def training_step(model: Model, ids: torch.Tensor, losses: list[float]) -> Run:
    """Return a function that runs a training step on `ids`, `[B, T]` int64, and appends the loss to a list."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> None:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # `.item()` waits for the GPU

    return run


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the median seconds of a training step of each model: summed over processes on CPUs, their mean on GPUs.

    Raises:
        AssertionError: the losses of the models differ.
    """
    sizes = {"hidden_size": options.hidden_size, "num_hidden_layers": options.layers, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, intermediate_size=3 * options.hidden_size))
    models = {"llama": llama, "whisper_lm": from_dense(llama)}
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(VOCABULARY, (options.batch, options.length), device=device)
    losses: dict[str, list[float]] = {name: [] for name in models}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    runs = {
        name: training_step(shard(model.to(device, dtype).train()), ids, losses[name]) for name, model in models.items()
    }
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = alternate(runs, rounds=options.rounds, clock=clock)
    torch.testing.assert_close(
        *map(torch.tensor, losses.values()), rtol=1e-2 if device.type == "cuda" else 1e-4, atol=0
    )
    shared = torch.tensor(list(seconds.values()), device=device)
    dist.all_reduce(shared)
    if device.type == "cuda":
        shared /= dist.get_world_size()
    return dict(zip(seconds, shared.tolist(), strict=True))


def main() -> None:
    """Run the command line: measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--length",
        type=int,
        default=512,
        help="tokens of a sequence, at most the budget of 1600 (default: %(default)s)",
    )
    add("--batch", type=int, default=2, help="sequences of each process (default: %(default)s)")
    add("--layers", type=int, default=4, help="(default: %(default)s)")
    add("--hidden-size", type=int, default=512, help="(default: %(default)s)")
    add("--rounds", type=int, default=20, help="steps of each model that are counted (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/fsdp"), help="folder for fsdp.json (default: %(default)s)")
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("needs the processes of torchrun, found none; start it with torchrun --nproc_per_node N")
    if not 0 < options.length <= 1600:
        parser.error(f"--length must be at most 1600, the tokens of the budget, got {options.length}; lower it")
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if is_gpu else "gloo")
    try:
        seconds = measure(options, device)
        if dist.get_rank() == 0:
            report(options, seconds, device)
    finally:
        dist.destroy_process_group()


def report(options: argparse.Namespace, seconds: dict[str, float], device: torch.device) -> None:
    """Print the times and their ratio, and write them to a file."""
    ratio = seconds["whisper_lm"] / seconds["llama"]
    shown = ", ".join(f"{name} {value:.4f} s" for name, value in seconds.items())
    print(f"{dist.get_world_size()} processes, a training step: whisper_lm / llama {ratio:.3f}: {shown}")
    sizes = {name: getattr(options, name) for name in ("length", "batch", "layers", "hidden_size", "rounds")}
    results = {**seconds, "ratio": ratio, "processes": dist.get_world_size(), "device": device.type, **sizes}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "fsdp.json").write_text(json.dumps({**results, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
