"""Compare ways of quantizing SmolLM2-135M-Instruct: bytes and time that they save, quality that they cost.

    python examples/benchmarks/quantization.py                          # everything: about an hour on one core
    python examples/benchmarks/quantization.py --only int8 nf4-double --tokens 1024

The model is a WhisperLM with a budget of 416 tokens, on one CPU thread. The ways are the recipes of
`whisper_hf.quantization` and `Int8CpuConfig`, with these additions:

- `kept` leaves the most sensitive layers in float32,
- `cache` stores keys and values in 8 bits,
- `compensated` adds a LoRA adapter that is initialised as the best correction of its rank,
- `recovered` then trains this adapter for `--steps` steps to predict what the float32 model predicts.

Layers are chosen and adapters are made on another novel than the one for the measurements. The script measures

- the bytes on disk, and the bytes in memory of the linear layers and of keys and values; adapters are included,
- the perplexity of a novel, read in chunks of 256 tokens with the cache, and the mean KL divergence from float32, in
  nats per token,
- the repetition (seq-rep-4) of 16 greedy continuations of 96 tokens,
- how many times faster than float32 the model reads a prompt of 1,024 tokens, and then decodes a token.

Results of ways that `--only` does not name are kept from earlier runs with the same settings.
"""

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers.utils import logging

from examples.benchmarks.measuring import Run, alternate

try:
    # peft imports bitsandbytes, which on some CPUs logs that a package for faster 4-bit products is missing
    logging.get_logger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from peft import LoraConfig, PeftModel, get_peft_model
    from tabulate import tabulate
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PrinterCallback, set_seed
    from transformers import PreTrainedModel as Model
    from transformers import default_data_collator as collate

    from whisper_hf import DistillationConfig, DistillationTrainer, Int8CpuConfig, QuantizedSparseCache, from_dense
    from whisper_hf.quantization import compensate, layer_divergences, most_sensitive, recipe
    from whisper_hf.quantization.int8_linear import Int8Linear
    from whisper_hf.quantization.sensitivity import keep_layers
    from whisper_hf.repetition.metrics import sequence_repetition
    from whisper_hf.training.generation import continue_prompts
except ImportError as error:
    raise SystemExit(f"quantization.py: {error}; pip install 'whisper-hf[examples]'") from error

from examples.support.smollm2 import smollm2_checkpoint

BOOKS = Path(__file__).resolve().parents[1] / "data"
SPARSE = {"block_size": 32, "topk_blocks": 8, "local_blocks": 4, "sink_blocks": 1}
CHUNK, PROMPT, NEW = 256, 1024, 16  # tokens
WRITTEN, PREFIX, LENGTH = 16, 64, 96  # number of continuations, tokens of their prefix, tokens that they add
# share of the linear layers' weights that stays in float32; their bytes are then at most 0.30 and 0.17 of float32
KEPT = {"int8": 0.06, "nf4-double": 0.045}
MEASURED = 512  # tokens on which the layers to keep are chosen
RANK, CALIBRATION = 12, 2048  # rank of adapters, tokens from which they are initialised
ROW, RATE = 384, 1e-3  # tokens of a row and learning rate of the recovery


@dataclass(frozen=True)
class Way:
    """A way to quantize a model.

    Args:
        recipe: how the weights are quantized; `None` leaves them in `dtype`.
        dtype: dtype of the weights that are not quantized.
        kept: whether the most sensitive layers stay in float32.
        cache: whether keys and values are stored in 8 bits.
        compensated: whether an adapter corrects the quantization.
        recovered: whether this adapter is trained.
    """

    recipe: str | Int8CpuConfig | None = None
    dtype: torch.dtype = torch.float32
    kept: bool = False
    cache: bool = False
    compensated: bool = False
    recovered: bool = False

    def new_cache(self, model: Model) -> Any:
        """Return an empty cache for a model."""
        return QuantizedSparseCache(model.config) if self.cache else DynamicCache(config=model.config)


WAYS = {
    "float32": Way(),
    "bfloat16": Way(dtype=torch.bfloat16),
    "float32, cache": Way(cache=True),
    "int8": Way("int8"),
    "int8, kept": Way("int8", kept=True),
    "int8-cpu": Way(Int8CpuConfig()),
    "int8-cpu and head": Way(Int8CpuConfig(quantize_head=True)),
    "int8-cpu, 8 bits": Way(Int8CpuConfig(activation_bits=8)),
    "nf4": Way("nf4"),
    "nf4, cache": Way("nf4", cache=True),
    "nf4-double": Way("nf4-double"),
    "nf4-double, kept": Way("nf4-double", kept=True),
    "nf4-double, compensated": Way("nf4-double", compensated=True),
    "nf4-double, recovered": Way("nf4-double", compensated=True, recovered=True),
    "nf4-double, recovered, cache": Way("nf4-double", compensated=True, recovered=True, cache=True),
}


def load(source: Path, way: Way) -> Any:
    """Load the model, quantized in a way, without adapter."""
    if way.recipe is None:
        return AutoModelForCausalLM.from_pretrained(source, dtype=way.dtype).eval()
    config: Any = way.recipe
    if isinstance(config, str):
        config = recipe(config, None if config == "int8" else torch.float32)
    if way.kept:
        choose_layers(source, way, config)
    return AutoModelForCausalLM.from_pretrained(source, dtype=way.dtype, quantization_config=config).eval()


def choose_layers(source: Path, way: Way, config: Any) -> None:
    """Change a config such that it leaves the most sensitive layers in float32; they are measured only once."""
    path = source.parent / f"divergences-{way.recipe}.json"
    model = load(source, Way())
    if not path.exists():
        ids = read_book(source, "sense_and_sensibility")[None, :MEASURED]
        path.write_text(json.dumps(layer_divergences(model, config, ids)))
    keep_layers(model, config, most_sensitive(model, json.loads(path.read_text()), KEPT[way.recipe]))


def read_book(source: Path, name: str) -> Tensor:
    """Return the token ids of a novel, `[tokens]` int64, whose file has one paragraph per line."""
    lines = (BOOKS / f"{name}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    tokenized = AutoTokenizer.from_pretrained(source)(lines, add_special_tokens=False).input_ids
    return torch.tensor([token for ids in tokenized for token in ids])


def bytes_on_disk(model: Any) -> int:
    """Return the bytes of the saved weights of a model or adapter."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def linear_bytes(model: Model) -> int:
    """Return the bytes of all linear layers but the head, with their scales, code books and biases."""
    layers = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear | Int8Linear)]
    return sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())


@torch.no_grad()
def measure_quality(model: Model, reference: Model, way: Way, ids: Tensor) -> dict[str, float]:
    """Return perplexity and KL divergence (nats per token) on `ids`, `[T]` int64, and the cache's bytes per token."""
    own = way.new_cache(model)
    exact = DynamicCache(config=reference.config)
    losses = []
    divergences = []
    for part, targets in zip(ids[:-1].split(CHUNK), ids[1:].split(CHUNK), strict=True):
        logits = model(part[None], cache=own).logits[0].float()
        wanted = reference(part[None], cache=exact).logits[0].log_softmax(-1)
        losses.append(cross_entropy(logits, targets, reduction="sum"))
        divergences.append(kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum"))
    count = len(ids) - 1
    held = sum(states.nbytes for layer in own.layers for states in (layer.keys, layer.values, layer.block_means))
    loss = torch.stack(losses).sum().item() / count
    return {
        "perplexity": math.exp(loss),
        "divergence": torch.stack(divergences).sum().item() / count,
        "cache_bytes": held / count,
    }


def repetition(model: Any, way: Way, ids: Tensor) -> float:
    """Return the repetition (seq-rep-4, in [0, 1]) of greedy continuations of parts of `ids`, `[T]` int64."""
    prompts = ids[torch.arange(WRITTEN)[:, None] * (len(ids) // WRITTEN) + torch.arange(PREFIX)]
    settings = {"pad_token_id": 0, "eos_token_id": None}
    if way.cache:
        settings |= {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}
    written = continue_prompts(model, prompts, torch.ones_like(prompts), LENGTH, **settings)
    return sequence_repetition(written["input_ids"][:, PREFIX:], 4)


def prefill(model: Model, way: Way, ids: Tensor) -> Run:
    """Return a function that reads a prompt, the first tokens of `ids`."""
    return torch.no_grad()(lambda: model(ids[None, :PROMPT], cache=way.new_cache(model), logits_to_keep=1))


def decode(model: Model, way: Way, ids: Tensor) -> Run:
    """Return a function that reads NEW single tokens after a prompt, which is read only once."""
    cache = way.new_cache(model)
    with torch.no_grad():
        model(ids[None, :PROMPT], cache=cache, logits_to_keep=1)

    @torch.no_grad()
    def run() -> None:
        for token in ids[PROMPT : PROMPT + NEW]:
            model(token.view(1, 1), cache=cache)
        cache.crop(-NEW)

    return run


def measure_speed(model: Model, reference: Model, way: Way, ids: Tensor, seconds: float) -> dict[str, float]:
    """Return how many times faster than the float32 reference the model is, for prefill and decoding."""
    speeds = {}
    for name, what in (("prefill", prefill), ("decode", decode)):
        times = alternate({"own": what(model, way, ids), "float32": what(reference, Way(), ids)}, seconds)
        speeds[name] = times["float32"] / times["own"]
    return speeds


def adapt(model: Model, teacher: Model, way: Way, ids: Tensor, options: argparse.Namespace) -> PeftModel:
    """Return the model with an adapter that corrects quantization; a trained adapter is saved and loaded later."""
    adapter = options.output / f"adapter-{options.steps}"
    if way.recovered and adapter.exists():
        return PeftModel.from_pretrained(model, adapter, is_trainable=False)
    set_seed(0)
    student = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    compensate(student, teacher, ids[:CALIBRATION].split(ROW))
    if way.recovered:
        recover(student, teacher, ids, options.steps, options.output)
        student.save_pretrained(adapter)
    return student.eval()


def recover(student: PeftModel, teacher: Model, ids: Tensor, steps: int, folder: Path) -> None:
    """Train the adapter of a quantized model by distillation from the float32 model."""
    rows = ids[: len(ids) // ROW * ROW].view(-1, ROW).tolist()
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    schedule = {"max_steps": steps, "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": steps // 10}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    device = {"use_cpu": True, "dataloader_pin_memory": False, "bf16": False, "per_device_train_batch_size": 2}
    args = DistillationConfig(str(folder), **schedule, **quiet, **device)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=data, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def run(name: str, source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one way to quantize, and return a row of results."""
    way = WAYS[name]
    reference = load(source, Way())
    book = read_book(source, "northanger_abbey")
    model = load(source, way)
    base = model
    disk_bytes = bytes_on_disk(base)
    if way.compensated:
        model = adapt(model, reference, way, read_book(source, "sense_and_sensibility"), options)
        disk_bytes += bytes_on_disk(model)
    measured = {"disk_bytes": disk_bytes, "linear_bytes": linear_bytes(base)}
    measured |= measure_quality(model, reference, way, book[: options.tokens])
    measured["repetition"] = repetition(model, way, book)
    measured |= measure_speed(model, reference, way, book, options.seconds)
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in measured.items()), flush=True)
    return {"way": name, **measured}


def report(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, with sizes as shares of float32's bytes."""
    base = next(row for row in rows if row["way"] == "float32")
    table = []
    for row in sorted(rows, key=lambda row: list(WAYS).index(row["way"])):
        sizes = [row[key] / base[key] for key in ("disk_bytes", "linear_bytes", "cache_bytes")]
        change = 100 * (row["perplexity"] / base["perplexity"] - 1)
        cells = [f"{row['perplexity']:.2f} ({change:+.2f} %)", f"{row['divergence']:.4f}", f"{row['repetition']:.3f}"]
        speed = [f"{row[key]:.2f}" for key in ("prefill", "decode")]
        table.append([row["way"], *(f"{size:.3f}" for size in sizes), *cells, *speed])
    headers = ["", "on disk", "linear layers", "cache", "perplexity", "KL", "seq-rep-4", "prefill", "decode"]
    return tabulate(table, headers, "github", disable_numparse=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot perplexity against bytes on disk."""
    axis = Figure(figsize=(7, 4), layout="constrained").subplots()
    for row in rows:
        axis.plot(row["disk_bytes"] / 1e6, row["perplexity"], "o", label=row["way"])
    axis.set_xlabel("checkpoint, MB")
    axis.set_ylabel("perplexity")
    axis.legend(fontsize="small")
    axis.figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--tokens",
        type=int,
        default=4096,
        help="tokens of the novel on which quality is measured (default: %(default)s)",
    )
    add("--steps", type=int, default=200, help="training steps of the recovery (default: %(default)s)")
    add("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="; ".join(WAYS))
    add("--model", help="another dense checkpoint: Hub id or folder (default: SmolLM2-135M-Instruct)")
    add("--seconds", type=float, default=20.0, help="time for each comparison (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("runs/quantization"),
        help="folder for the results of one model (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.tokens <= PROMPT + NEW or options.steps < 10:
        parser.error(
            f"--tokens must exceed {PROMPT + NEW}, and --steps must be at least 10, got {vars(options)}; raise them"
        )
    return options


def main() -> None:
    """Run the ways without results, print the table, and write the results."""
    options = parse_arguments()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.get_logger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every call that inputs are cast to float16
    datasets.disable_progress_bars()
    options.output.mkdir(parents=True, exist_ok=True)
    source = options.output / "model"
    path = options.output / "quantization.json"
    made = {"tokens": options.tokens, "steps": options.steps, "torch": torch.__version__}
    made |= {"model": options.model} if options.model else {}
    found = json.loads(path.read_text()) if path.exists() else {}
    results = found if found.get("settings") == made else {"settings": made, "rows": []}
    if not source.exists():
        dense = options.model or smollm2_checkpoint()
        tokenizer = AutoTokenizer.from_pretrained(dense)
        model = from_dense(dense, sparse_attention=SPARSE)
        path.write_text(json.dumps(results, indent=1) + "\n")  # records which model the folder holds
        tokenizer.save_pretrained(source)
        model.save_pretrained(source)
    elif (held := found.get("settings", {}).get("model")) != options.model:
        name = "SmolLM2-135M-Instruct"
        raise SystemExit(
            f"--output must be a folder of --model {options.model or name}, got one of {held or name}: "
            f"{options.output}; name another folder"
        )
    for name in dict.fromkeys(["float32", *options.only]):  # float32: the baseline of all other ways
        if name not in {row["way"] for row in results["rows"]}:
            results["rows"].append(run(name, source, options))
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{report(results['rows'])}")
    plot(results["rows"], options.output / "quantization.svg")


if __name__ == "__main__":
    main()
