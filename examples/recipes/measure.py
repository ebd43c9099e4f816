"""Measures what a recipe made beside its teacher, and writes results files and the model card.

    python examples/recipes/measure.py runs/whisper-lm-135m

Each task has a results file, and every model a column: the dense teacher, the model, its forms in int8 and nf4 with
their adapters, the same without, and what was trained without a teacher, as far as they are there.

- perplexity: of held-out works (a novel and program text, or `--works`), their beginnings of 1k to 8k tokens,
- retrieval: a pass key hidden at five depths of 2k to 8k tokens of the works, which take turns, and five names with
  their numbers, all asked for,
- repetition: of greedy and nucleus-sampled continuations of a novel, next to the author's own,
- size: bytes of weights on disk and of the linear layers, in the dtype of the files,
- speed: time of the dense teacher over a model's, measured in turns on one thread, for a prompt and for new tokens.

What has been measured is kept; `--tasks` names what shall be measured, all by default.
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
ALONE = {"random-without-teacher": "no teacher, random start", "cut-without-teacher": "no teacher, cut start"}
PREFIX, NEW = 32, 96  # tokens of a continued text, and of its continuation
DECODED = 32  # tokens whose time is measured


@dataclass(frozen=True)
class Subject:
    """A model to measure: a folder, and an adapter on it."""

    name: str
    folder: str | Path
    adapter: Path | None = None

    def load(self, dtype: torch.dtype) -> Any:
        """Return the model."""
        model = load_in(dtype, self.folder)
        return (model if self.adapter is None else PeftModel.from_pretrained(model, self.adapter)).eval()

    @property
    def files(self) -> list[Path]:
        """All files of weights."""
        folders = [Path(self.folder), *([self.adapter] if self.adapter else [])]
        return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def subjects(output: Path, teacher: str) -> list[Subject]:
    """Return the teacher and what a recipe has made, in the order of a card's columns."""
    name, found = output.name, [Subject(DENSE, teacher), Subject(output.name, output / "model")]
    for form in RECIPES:
        base = output / f"model-{form}"
        found += [
            Subject(f"{name} {form}", base, output / f"model-{form}-adapter"),
            Subject(f"{name} {form} alone", base),
        ]
    found += [Subject(title, output / folder) for folder, title in ALONE.items()]
    return [subject for subject in found if subject.name == DENSE or Path(subject.folder).is_dir()]


# --- tasks: each yields the records of one model ---


@dataclass(frozen=True)
class Setting:
    """What is measured on."""

    tokenizer: Any
    works: dict[str, Tensor]
    options: argparse.Namespace


def perplexity(name: str, model: Any, to: Setting) -> Iterator[Record]:
    """Read windows of works once; a shorter text is the beginning of a longer one."""
    longest = max(to.options.lengths)
    for work, ids in to.works.items():
        windows = min(to.options.windows, len(ids) // longest)
        starts = [i * (len(ids) // windows) for i in range(windows)]
        found = torch.stack([losses(model, ids[start : start + longest]) for start in starts])
        for length in to.options.lengths:
            value = found[:, : length - 1].mean().exp().item()
            yield Record(name, "perplexity by length", work, "perplexity", value, settings={"tokens": length})


def retrieval(name: str, model: Any, to: Setting) -> Iterator[Record]:
    """Hide facts in works, which take turns, and ask for them."""
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
    """Let the model continue a work, or (without one) take what its author wrote."""
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
    """Count bytes."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    linear = [module for module in base.get_decoder().layers.modules() if isinstance(module, nn.Linear)]
    held = sum(tensor.nbytes for layer in linear for tensor in layer.state_dict().values() if torch.is_tensor(tensor))
    for metric, value in (("on disk", sum(file.stat().st_size for file in files)), ("linear layers", held)):
        yield Record(name, "size", "weights", metric, value / 1e6, unit="MB")


def speed(models: dict[str, Any], to: Setting) -> Iterator[Record]:
    """Time all models in turns, on the same tokens, after reading once what is shorter."""
    ids = next(iter(to.works.values()))[None]
    shortest, longest = min(to.options.lengths) * 2, max(to.options.lengths)
    for model in models.values():
        read_and_go_on(model, ids[:, :shortest].to(model.device))  # warms up
    for length in dict.fromkeys((shortest, longest)):
        seconds = {name: read_and_go_on(model, ids[:, :length].to(model.device)) for name, model in models.items()}
        for metric, where in (("prompt", {"tokens": length}), ("new tokens", {"tokens before": length})):
            for name, times in seconds.items():
                ratio = seconds[DENSE][metric] / times[metric]
                yield Record(name, "speed", "time of the dense teacher over own", metric, ratio, settings=where)


@torch.no_grad()
def read_and_go_on(model: Any, ids: Tensor) -> dict[str, float]:
    """Return the seconds that a prompt takes, `[1, T]`, and those of its last tokens once more, one by one."""
    cache, start = DynamicCache(config=model.config), now()
    model(ids, cache=cache, logits_to_keep=1)
    read = now() - start
    cache.crop(-DECODED)  # a model may be made for no more tokens
    start = now()
    for token in ids[0, -DECODED:]:
        model(token.view(1, 1), cache=cache)
    return {"prompt": read, "new tokens": now() - start}


def now() -> float:
    """Return process time, or on a GPU the time at which it has nothing left to do."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# --- files ---

TASKS: dict[str, Callable[..., Iterator[Record]]] = {
    "perplexity": perplexity,
    "retrieval": retrieval,
    "repetition": repetition,
    "size": size,
    "speed": speed,
}
FULL = ("perplexity", "repetition")  # tasks that also measure what is there for comparison alone


def measure(task: str, subject: Subject, to: Setting) -> list[Record]:
    """Measure one model."""
    if task == "size":
        saved = AutoConfig.from_pretrained(subject.folder).dtype or torch.float32
        return list(size(subject.name, subject.load(saved), to, subject.files))
    return list(TASKS[task](subject.name, subject.load(to.options.dtype), to))


def run(task: str, of: list[Subject], to: Setting) -> None:
    """Measure what has not been measured, and write it after each model."""
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
    column = {subject.name: number for number, subject in enumerate(of)}  # also where several runs fill the file
    for subject in missing:
        found = measure(task, subject, to)
        print(*(f"{r.model}: {r.metric} {r.value:.4g} {r.settings}" for r in found), sep="\n", flush=True)
        records = sorted(records + found, key=lambda record: column.get(record.model, len(column)))
        keep(path, records, to.options)
    if task == "repetition" and PEOPLE not in known:
        keep(path, records + list(repetition(PEOPLE, None, to)), to.options)


def keep(path: Path, records: list[Record], options: argparse.Namespace) -> None:
    """Write a results file, with perplexities relative to the teacher's."""
    dense = {record.what[2:]: record.value for record in records if record.model == DENSE}
    ratios = [
        dataclasses.replace(record, metric="over the teacher's", value=record.value / dense[record.what[2:]])
        for record in records
        if record.metric == "perplexity" and record.model != DENSE and record.what[2:] in dense
    ]
    kept = [record for record in records if record.metric != "over the teacher's"]
    save_results(path, kept + ratios, command=options.command, device=device(options.dtype))


def device(dtype: torch.dtype) -> str:
    """Describe what is measured on."""
    threads = torch.get_num_threads()
    cpu = f"a CPU, {threads} thread{'s'[: threads > 1]}"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{where}, {str(dtype).removeprefix('torch.')}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("made", type=Path, help="what a recipe made")
    add("--teacher", help="path or Hub id (default: SmolLM2-135M-Instruct)")
    add("--output", type=Path, help="folder of results files and card (default: results, beside the models)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to measure (default: all)")
    add("--models", nargs="+", help="columns to measure (default: all; speed compares all in any case)")
    add("--works", type=Path, nargs="+", default=[], help="held-out texts (default: a novel and program text)")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens (default: %(default)s)")
    add("--windows", type=int, default=1, help="beginnings in each work (default: %(default)s)")
    add("--prompts", type=int, default=32, help="texts to continue (default: %(default)s)")
    add("--dtype", type=lambda name: getattr(torch, name), default=DTYPE, help="(default here: %(default)s)")
    add("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    options = parser.parse_args()
    options.output = options.output or options.made / "results"
    # of all parts alike: a results file may be filled by several runs
    options.command = f"python examples/recipes/measure.py {options.made}"
    for name in ("teacher", "works", "lengths", "windows", "prompts", "threads"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            options.command += f" --{name} {shlex.join(map(str, value if isinstance(value, list) else [value]))}"
    return options


def main() -> None:
    """Measure."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    logging.get_logger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a rounding on every call
    teacher = teacher_source(options.teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    options.output.mkdir(parents=True, exist_ok=True)
    to = Setting(tokenizer, read_works(tokenizer, options.works), options)
    for task in options.tasks:
        run(task, subjects(options.made, teacher), to)


if __name__ == "__main__":
    main()
