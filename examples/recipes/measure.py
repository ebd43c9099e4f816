"""Measure the models that a recipe made, together with their teacher, and write results files for a model card.

    pip install -e ".[examples,metrics]"
    python examples/recipes/measure.py runs/whisper-lm-135m                    # the output of a recipe

Each task has a results file, and each model a column: the dense teacher; the model; its int8 and nf4 forms, with and
without their adapters; and the models that were trained without a teacher, if there are any.

- perplexity: of the first 1k to 8k tokens of held-out works (a novel and source code, or `--works`),
- retrieval: a pass key hidden at five depths of 2k to 8k tokens of the works, and five people's pass keys at once,
- repetition: of greedy and nucleus-sampled continuations of a novel, and of the author's own continuation,
- size: bytes of the weights on disk and in the linear layers, in the dtype of the files,
- speed: how many times faster than the dense teacher a model is, for a prompt and for new tokens, on one CPU thread.

Earlier results are kept. `--tasks` names the tasks to measure, all by default. `card.py` writes the card.
"""

import argparse
import dataclasses
import itertools
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, DynamicCache, set_seed
from transformers.utils import logging

from examples.recipes.recipe import DTYPE, RECIPES, load_in, teacher_source
from examples.support.long_texts import ROOM, facts, hide, losses, pass_key, read_works, share_found, tokens_found
from whisper_hf.cards.results import Record, load_results, save_results
from whisper_hf.repetition import metrics
from whisper_hf.training.generation import continue_prompts

DENSE = "dense teacher"
PEOPLE = "human text"
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
# folder of a model that was trained without a teacher -> its name in the tables
ALONE = {"random-without-teacher": "no teacher, random start", "cut-without-teacher": "no teacher, cut start"}
PREFIX, NEW = 32, 96  # tokens of a prompt, and of its continuation
DECODED = 32  # new tokens whose time is measured


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Args:
        name: name of the column in the tables.
        folder: folder or Hub id of the model.
        adapter: folder of an adapter on it, if any.
    """

    name: str
    folder: str | Path
    adapter: Path | None = None

    def load(self, dtype: torch.dtype) -> Any:
        """Load the model, with its adapter, to compute in a dtype."""
        model = load_in(dtype, self.folder)
        return (model if self.adapter is None else PeftModel.from_pretrained(model, self.adapter)).eval()

    @property
    def files(self) -> list[Path]:
        """The files with the weights of the model and its adapter."""
        folders = [Path(self.folder), *([self.adapter] if self.adapter else [])]
        return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def subjects(output: Path, teacher: str) -> list[Subject]:
    """Return the teacher and the models that a recipe has made, in the order of a card's columns."""
    name = output.name
    found = [Subject(DENSE, teacher), Subject(name, output / "model")]
    for form in RECIPES:
        base = output / f"model-{form}"
        found += [
            Subject(f"{name} {form}", base, output / f"model-{form}-adapter"),
            Subject(f"{name} {form} alone", base),
        ]
    found += [Subject(title, output / folder) for folder, title in ALONE.items()]
    return [subject for subject in found if subject.name == DENSE or Path(subject.folder).is_dir()]


@dataclass(frozen=True)
class Setting:
    """The data and options of a measurement.

    Args:
        tokenizer: the models' tokenizer.
        works: token ids of held-out works by name, each `[T]` int64.
        options: the command line's.
    """

    tokenizer: Any
    works: dict[str, Tensor]
    options: argparse.Namespace


def perplexity(name: str, model: Any, to: Setting) -> Iterator[Record]:
    """Yield the perplexity of works at each length; one pass over the longest windows serves all lengths."""
    longest = max(to.options.lengths)
    for work, ids in to.works.items():
        windows = min(to.options.windows, len(ids) // longest)
        starts = [i * (len(ids) // windows) for i in range(windows)]
        found = torch.stack([losses(model, ids[start : start + longest]) for start in starts])
        for length in to.options.lengths:
            value = found[:, : length - 1].mean().exp().item()
            yield Record(name, "perplexity by length", work, "perplexity", value, settings={"tokens": length})


def retrieval(name: str, model: Any, to: Setting) -> Iterator[Record]:
    """Yield the shares of hidden digits and keys that the model finds in the works, which alternate."""
    works = ", ".join(to.works)
    lengths = [length for length in to.options.lengths if length > min(to.options.lengths)]
    for number, length in enumerate(lengths):
        texts = itertools.cycle([ids[: length - ROOM] for ids in to.works.values()])
        keys: list[Tensor] = []
        for seed, depth in enumerate(DEPTHS):
            keys += tokens_found(model, *hide(to.tokenizer, next(texts), [pass_key(depth, seed)]))
            where = {"tokens": length, "depth": depth}
            yield Record(name, "pass key", works, "digits found", share_found(keys[-1:]), settings=where)
        share = sum(bool(key.all()) for key in keys) / len(keys)
        whole = {"tokens": length, "depth": "all"}
        yield Record(name, "pass key", works, "whole keys found", share, settings=whole)
        yield Record(name, "pass key", works, "digits found", share_found(keys), settings=whole)
        text = list(to.works.values())[number % len(to.works)][: length - ROOM]
        recalled = tokens_found(model, *hide(to.tokenizer, text, facts(DEPTHS, length)))
        where = {"tokens": length}
        yield Record(name, "associative recall", works, "digits of five facts", share_found(recalled), settings=where)


def repetition(name: str, model: Any, to: Setting) -> Iterator[Record]:
    """Yield the repetition in a model's continuations of a work, or (model `None`) in the author's text."""
    work, ids = next(iter(to.works.items()))
    places = torch.arange(to.options.prompts) * (len(ids) // to.options.prompts)
    texts = ids[places[:, None] + torch.arange(PREFIX + NEW)]
    decodings: dict[str, dict[str, Any]] = {"greedy": {}, "sampled, top-p 0.95": {"temperature": 1.0, "top_p": 0.95}}
    for decoding, how in decodings.items():
        written = texts[:, PREFIX:]
        if model is not None:
            set_seed(0)
            quiet = {"eos_token_id": None, "pad_token_id": 0}
            prompts = texts[:, :PREFIX].to(model.device)
            written = continue_prompts(model, prompts, torch.ones_like(prompts), NEW, **how, **quiet)["input_ids"]
            written = written[:, PREFIX:].cpu()
        values = {
            "seq-rep-4": metrics.sequence_repetition(written),
            "looping share": metrics.looping_share(written),
            "distinct-2": metrics.distinct(written),
            "diversity": metrics.diversity(written),
        }
        for metric, value in values.items():
            yield Record(name, "repetition and diversity", work, metric, value, settings={"decoding": decoding})


def size(name: str, model: Any, to: Setting, files: list[Path]) -> Iterator[Record]:
    """Yield the bytes of the weights on disk, and of the linear layers in memory, in MB."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    linear = [module for module in base.get_decoder().layers.modules() if isinstance(module, nn.Linear)]
    held = sum(tensor.nbytes for layer in linear for tensor in layer.state_dict().values() if torch.is_tensor(tensor))
    for metric, value in (("on disk", sum(file.stat().st_size for file in files)), ("linear layers", held)):
        yield Record(name, "size", "weights", metric, value / 1e6, unit="MB")


def speed(models: dict[str, Any], to: Setting) -> Iterator[Record]:
    """Yield how many times faster than the dense teacher each model is; all read the same tokens, after a warm-up."""
    ids = next(iter(to.works.values()))[None]
    shortest = min(to.options.lengths) * 2
    longest = max(to.options.lengths)
    for model in models.values():
        read_and_go_on(model, ids[:, :shortest].to(model.device))  # a warm-up
    for length in dict.fromkeys((shortest, longest)):
        seconds = {name: read_and_go_on(model, ids[:, :length].to(model.device)) for name, model in models.items()}
        for metric, where in (("prompt", {"tokens": length}), ("new tokens", {"tokens before": length})):
            for name, times in seconds.items():
                ratio = seconds[DENSE][metric] / times[metric]
                yield Record(name, "speed", "time of the dense teacher over own", metric, ratio, settings=where)


@torch.no_grad()
def read_and_go_on(model: Any, ids: Tensor) -> dict[str, float]:
    """Return the seconds for reading a prompt, `[1, T]` int64, and for reading its last DECODED tokens one by one."""
    cache = DynamicCache(config=model.config)
    start = now()
    model(ids, cache=cache, logits_to_keep=1)
    read = now() - start
    cache.crop(-DECODED)  # the last tokens are read again, as the model may not support longer sequences
    start = now()
    for token in ids[0, -DECODED:]:
        model(token.view(1, 1), cache=cache)
    return {"prompt": read, "new tokens": now() - start}


def now() -> float:
    """Return the process time in seconds; on a GPU the wall time after all its work is done."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


TASKS: dict[str, Callable[..., Iterator[Record]]] = {
    "perplexity": perplexity,
    "retrieval": retrieval,
    "repetition": repetition,
    "size": size,
    "speed": speed,
}
FULL = ("perplexity", "repetition")  # tasks that also measure the models that only serve for comparison


def measure(task: str, subject: Subject, to: Setting) -> list[Record]:
    """Return the records of one task (other than speed) for one model."""
    if task == "size":
        saved = AutoConfig.from_pretrained(subject.folder).dtype or torch.float32
        return list(size(subject.name, subject.load(saved), to, subject.files))
    return list(TASKS[task](subject.name, subject.load(to.options.dtype), to))


def run(task: str, of: list[Subject], to: Setting) -> None:
    """Measure the models without results in one task, and write the results after each model."""
    path = to.options.output / f"{task}.json"
    records = list(load_results(path).records) if path.exists() else []
    known = {record.model for record in records}
    if task not in FULL:
        of = [subject for subject in of if subject.name not in ALONE.values() and not subject.name.endswith(" alone")]
    missing = [s for s in of if s.name not in known and s.name in (to.options.models or [s.name])]
    if task == "speed":
        if missing:
            models = {subject.name: subject.load(to.options.dtype) for subject in of}
            keep(path, list(speed(models, to)), to.options)
        return
    column = {
        subject.name: number for number, subject in enumerate(of)
    }  # keeps the order of columns, also if several runs fill the file
    for subject in missing:
        found = measure(task, subject, to)
        print(*(f"{r.model}: {r.metric} {r.value:.4g} {r.settings}" for r in found), sep="\n", flush=True)
        records = sorted(records + found, key=lambda record: column.get(record.model, len(column)))
        keep(path, records, to.options)
    if task == "repetition" and PEOPLE not in known:
        keep(path, records + list(repetition(PEOPLE, None, to)), to.options)


def keep(path: Path, records: list[Record], options: argparse.Namespace) -> None:
    """Write a results file, with the ratios of perplexities to the teacher's added."""
    dense = {record.what[2:]: record.value for record in records if record.model == DENSE}
    ratios = [
        dataclasses.replace(record, metric="over the teacher's", value=record.value / dense[record.what[2:]])
        for record in records
        if record.metric == "perplexity" and record.model != DENSE and record.what[2:] in dense
    ]
    kept = [record for record in records if record.metric != "over the teacher's"]
    save_results(path, kept + ratios, command=options.command, device=device(options.dtype))


def device(dtype: torch.dtype) -> str:
    """Describe the device and the dtype of a measurement."""
    threads = torch.get_num_threads()
    cpu = f"a CPU, {threads} thread{'s'[: threads > 1]}"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{where}, {str(dtype).removeprefix('torch.')}"


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, and build the command that the results files name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("made", type=Path, help="output folder of a recipe")
    add("--teacher", help="path or Hub id of the teacher (default: SmolLM2-135M-Instruct)")
    add("--output", type=Path, help="folder of the results files (default: results, beside the models)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks to measure (default: all)")
    add("--models", nargs="+", help="columns to measure (default: all; speed always compares all)")
    add("--works", type=Path, nargs="+", default=[], help="held-out texts (default: a novel and source code)")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096, 8192],
        help="lengths of texts in tokens (default: %(default)s)",
    )
    add("--windows", type=int, default=1, help="windows in each work (default: %(default)s)")
    add("--prompts", type=int, default=32, help="number of texts to continue (default: %(default)s)")
    add(
        "--dtype",
        type=lambda name: getattr(torch, name),
        default=DTYPE,
        help="dtype of computations (default on this machine: %(default)s)",
    )
    add("--threads", type=int, default=1, help="threads on a CPU (default: %(default)s)")
    options = parser.parse_args()
    options.output = options.output or options.made / "results"
    # the command without --tasks and --models, as several runs may fill one results file
    options.command = f"python examples/recipes/measure.py {options.made}"
    for name in ("teacher", "works", "lengths", "windows", "prompts", "threads"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            options.command += f" --{name} {shlex.join(map(str, value if isinstance(value, list) else [value]))}"
    return options


def main() -> None:
    """Run all tasks."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    logging.get_logger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every call that inputs are cast to float16
    teacher = teacher_source(options.teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    options.output.mkdir(parents=True, exist_ok=True)
    to = Setting(tokenizer, read_works(tokenizer, options.works), options)
    for task in options.tasks:
        run(task, subjects(options.made, teacher), to)


if __name__ == "__main__":
    main()
