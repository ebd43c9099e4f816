"""Fine-tune a language model to translate, by LoRA on English and Spanish verses, and measure BLEU and chrF.

    pip install -e ".[examples,metrics]"
    python examples/translate.py --max_steps 20                           # about eight minutes on a CPU
    accelerate launch examples/translate.py --model Qwen/Qwen3-0.6B --bf16 --max_steps -1 --num_train_epochs 3 \\
        --verses_per_example 24 --eval_examples 0 --per_device_train_batch_size 8 --output_dir runs/qwen3-translate

The model is SmolLM2-135M-Instruct unless `--model` names another; a dense model is converted to a WhisperLM. Whole
books of the verses are held out for the measurements. An example is a passage of consecutive verses, in the model's
chat format or as a plain instruction. The loss counts only the translation, not the prompt. Four verses are about 360
tokens, beyond the default budget of 208, so attention is sparse in training and in most of each translation. Shorter
passages, or a larger `--sparse_attention`, may fit into the budget, where attention is dense. The script prints what
share of the examples exceeds the budget, and saves it with the results.

For other data, `--pairs` takes a file of tab-separated pairs or a data set. Consecutive rows form a passage; use
`--verses_per_example 1` if the rows are not a continuous text. `--held_out` takes the number of last pairs to evaluate
on, or another file:

    python examples/translate.py --pairs Helsinki-NLP/opus_books --config en-fr --target_language French \\
        --columns translation.en translation.fr --held_out 500 --verses_per_example 1

All arguments of transformers' TrainingArguments can be given: `--resume_from_checkpoint last` resumes after an
interruption. `--help` lists all arguments. Each process translates its own batches with a whole model, so several GPUs
are fine, but FSDP and ZeRO 3 are refused.
"""

import json
import logging
import shlex
import sys
import warnings
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.support.pairs import BOOKS, LAST, VERSES, Pair, passages, read_pairs, split_pairs, spread
from examples.support.smollm2 import smollm2_checkpoint
from whisper_hf import SparseAttentionConfig, from_dense
from whisper_hf.cards.results import save_results
from whisper_hf.training.generation import continue_prompts, end_tokens

try:
    # peft imports bitsandbytes, which on some CPUs logs that a package is missing; only 4-bit products need it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import datasets
    from accelerate.utils import gather_object
    from peft import LoraConfig, get_peft_model
    from sacrebleu.metrics import BLEU, CHRF
    from tabulate import tabulate
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed
    from transformers.integrations import is_deepspeed_zero3_enabled

    from examples.support import resuming
except ImportError as error:
    raise SystemExit(f"translate.py: {error}; pip install 'whisper-hf[examples,metrics]'") from error

RESULTS = "translate.json"  # the scores
TRANSLATIONS = "translations.json"  # the translated texts, with all that an interrupted run needs
NAME = "SmolLM2-135M-Instruct"
IGNORED = -100  # label of tokens that the loss does not count
SPARSE = '{"block_size": 16, "topk_blocks": 8, "local_blocks": 4, "sink_blocks": 1}'
DEFAULTS = {
    "output_dir": "runs/translate",
    "max_steps": 200,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a value below 1 is a share of all steps
    "label_names": ["labels"],  # the Trainer cannot infer them from a model with an adapter
    "logging_steps": 5,
    "save_steps": 20,
    "save_total_limit": 2,
    "report_to": "none",
}
# key of a score -> its name and unit in the results file
METRICS = {"bleu": ("BLEU", None), "chrf": ("chrF", None), "loss": ("loss", "nats/token")}


@dataclass
class ScriptArguments:
    """The arguments of model, text and translations; the arguments of training are `TrainingArguments`."""

    model: str | None = field(
        default=None,
        metadata={"help": "path or Hub id of a WhisperLM or a dense model; by default SmolLM2-135M-Instruct"},
    )
    sparse_attention: str | None = field(
        default=None,
        metadata={
            "help": f"block size and budget, as JSON; by default those of a WhisperLM, or {SPARSE} for a dense model"
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "file of tab-separated pairs (may be .gz), or path or Hub id of a data set; by default the verses"
        },
    )
    config: str | None = field(
        default=None, metadata={"help": "configuration of a data set that has several, such as en-fr"}
    )
    split: str = field(default="train", metadata={"help": "split of a data set"})
    columns: list[str] = field(
        default_factory=lambda: ["source", "target"],
        metadata={
            "help": "columns of a data set with source and target; nested columns have names such as translation.en"
        },
    )
    held_out: list[str] | None = field(
        default=None,
        metadata={
            "help": f"what to evaluate on and never train on: books of the verses among {', '.join(BOOKS)} (default: "
            f"all); or the number of last pairs of other data (default: {LAST}); or another file"
        },
    )
    source_language: str = field(default="English", metadata={"help": "name of the source language in prompts"})
    target_language: str = field(default="Spanish", metadata={"help": "name of the target language in prompts"})
    reverse: bool = field(
        default=False, metadata={"help": "translate from the target language into the source language"}
    )
    verses_per_example: int = field(default=4, metadata={"help": "consecutive pairs in an example, one line each"})
    eval_examples: int = field(
        default=16,
        metadata={"help": "number of examples to evaluate on, evenly spread over the held-out passages; 0: all"},
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "most tokens of a translation; by default 16 + twice the longest source of its batch"},
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapter; its alpha is twice the rank"})
    save: Literal["merged", "adapter"] = field(
        default="merged",
        metadata={"help": "what to save: the whole model, or only the adapter, which needs the same converted model"},
    )
    samples: int = field(default=3, metadata={"help": "number of translations to print"})


@dataclass
class Task:
    """The translation task: formats pairs of texts as prompts and training examples of a tokenizer.

    Args:
        tokenizer: the model's tokenizer, which pads on the left.
        target_language: name of the target language in prompts.
    """

    tokenizer: Tokenizer
    target_language: str

    def prompt(self, source: str) -> list[int]:
        """Return the token ids of the prompt that asks for the translation of a text."""
        request = f"Translate into {self.target_language}:\n\n{source}"
        if self.tokenizer.chat_template is None:
            return self.tokenizer(f"{request}\n\n{self.target_language}:\n").input_ids
        chat = [{"role": "user", "content": request}]
        # Qwen3's template reads `enable_thinking`, and would let the model think first; other templates ignore it
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        return self.tokenizer.apply_chat_template(chat, **options)

    def example(self, pair: Pair) -> dict[str, list[int]]:
        """Return `input_ids` and `labels` of a pair; only the translation and the end of text have labels."""
        prompt = self.prompt(pair[0])
        answer = [*self.tokenizer(pair[1], add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    def examples(self, pairs: list[Pair], longest: int) -> datasets.Dataset:
        """Tokenize pairs to a data set of examples of at most `longest` tokens.

        Raises:
            ValueError: an example is longer.
        """
        rows = [self.example(pair) for pair in tqdm(pairs, desc="tokenizing", unit="example")]
        length = max(len(row["input_ids"]) for row in rows)
        if length > longest:
            raise ValueError(f"examples must have at most {longest} tokens, got {length}; lower --verses_per_example")
        return datasets.Dataset.from_list(rows)


def load_model(name: str, script: ScriptArguments, dtype: torch.dtype) -> Model:
    """Load a WhisperLM, or load a dense model and convert it to a WhisperLM."""
    try:
        given = json.loads(script.sparse_attention or SPARSE)
    except json.JSONDecodeError as error:
        raise ValueError(f"--sparse_attention must be JSON like {SPARSE}, got {script.sparse_attention!r}") from error
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "whisper_lm":
        return from_dense(name, sparse_attention=given, dtype=dtype)
    if script.sparse_attention:
        config.sparse_attention = SparseAttentionConfig.from_value(given)
    return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer that pads on the left, so that the prompts of a batch end at the same column."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer must have an end-of-text token, got none in {name}; choose another model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def translate(model: Model, task: Task, sources: list[str], args: TrainingArguments, limit: int | None) -> list[str]:
    """Translate texts by greedy decoding, in batches of similar length that are divided among the processes.

    Args:
        model: the model, possibly with an adapter.
        task: how to prompt it.
        sources: the texts to translate.
        args: the batch size, the device and the processes.
        limit: most tokens of a translation; by default 16 + twice the longest source of its batch.

    Returns:
        the translations, in the order of `sources`.
    """
    tokenizer = task.tokenizer
    size = args.per_device_eval_batch_size
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    found: list[tuple[int, str]] = []
    for batch in progress(batches, "translating", args):
        padded = tokenizer.pad({"input_ids": [task.prompt(sources[i]) for i in batch]}, return_tensors="pt")
        padded = padded.to(args.device)
        longest = max(len(tokenizer(sources[i]).input_ids) for i in batch)
        room = limit or 16 + 2 * longest
        ids = padded["input_ids"]
        mask = padded["attention_mask"]
        written = continue_prompts(model, ids, mask, room, pad_token_id=tokenizer.pad_token_id)["labels"]
        texts = tokenizer.batch_decode([row[row != IGNORED] for row in written], skip_special_tokens=True)
        found += zip(batch, map(str.strip, texts), strict=True)
    found = gather_object(found) if args.world_size > 1 else found
    return [text for _, text in sorted(found)]


@torch.no_grad()
def reference_loss(model: Model, rows: datasets.Dataset, args: TrainingArguments) -> float:
    """Return the mean loss on the human translations, in nats per token, over all processes."""
    model.eval()
    found: list[tuple[float, int]] = []
    for row in progress(list(rows), "reading", args):
        ids, labels = (torch.tensor([row[name]], device=args.device) for name in ("input_ids", "labels"))
        count = int((labels != IGNORED).sum())
        found.append((count * model(input_ids=ids, labels=labels).loss.item(), count))
    found = gather_object(found) if args.world_size > 1 else found
    return sum(loss for loss, _ in found) / sum(count for _, count in found)


def progress(items: list, what: str, args: TrainingArguments) -> tqdm:
    """Return the items that this process has to handle, wrapped in a progress bar."""
    return tqdm(items[args.process_index :: args.world_size], desc=what, disable=args.process_index > 0)


def score(hypotheses: list[str], references: list[str]) -> dict[str, float]:
    """Return corpus BLEU and chrF, from 0 to 100, by sacrebleu with its default settings; each passage is a segment."""
    return {
        "bleu": BLEU().corpus_score(hypotheses, [references]).score,
        "chrf": CHRF().corpus_score(hypotheses, [references]).score,
    }


def prepare(script: ScriptArguments, args: TrainingArguments) -> tuple[Trainer, Task, list[Pair]]:
    """Load text and model; return a Trainer whose model has a new adapter, the task, and the pairs to evaluate on."""
    languages = (script.target_language, script.source_language)
    with args.main_process_first(desc="fetching model and text"):
        pairs = read_pairs(script.pairs, script.config, script.split, script.columns)
        runs, held_out = split_pairs(pairs, script.held_out, script.pairs is None)
        train = passages(runs, script.verses_per_example, script.reverse)
        held_out = spread(passages(held_out, script.verses_per_example, script.reverse), script.eval_examples)
        name = smollm2_checkpoint() if script.model is None else script.model
        task = Task(load_tokenizer(name), languages[script.reverse])
        model = load_model(name, script, torch.bfloat16 if args.bf16 else torch.float32)
    if task.tokenizer.eos_token_id not in end_tokens(model):
        model.generation_config.eos_token_id = [task.tokenizer.eos_token_id, *end_tokens(model)]
    set_seed(args.seed)  # the seed of the adapter's initial weights
    adapter = LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank, target_modules="all-linear")
    trainer = Trainer(
        model=get_peft_model(model, adapter),
        args=args,
        train_dataset=task.examples(train, model.config.max_position_embeddings),
        eval_dataset=task.examples(held_out, model.config.max_position_embeddings),
        processing_class=task.tokenizer,
        data_collator=DataCollatorForSeq2Seq(task.tokenizer),  # it pads the labels too
    )
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        raise ValueError("each process must hold the whole model to translate, got a sharded one; launch without FSDP")
    return trainer, task, held_out


def start(path: Path, script: ScriptArguments, held_out: list[Pair], resume: bool) -> dict[str, Any]:
    """Return the results so far: of an interrupted run with the same arguments, or those of copying the source."""
    if resume and path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["script"] == asdict(script):
            return found
    sources, references = map(list, zip(*held_out, strict=True))
    samples = [{"source": source, "reference": reference} for source, reference in held_out]
    return {"script": asdict(script), "scores": {"copy": score(sources, references)}, "samples": samples}


def measure(moment: str, known: dict[str, Any], trainer: Trainer, task: Task, limit: int | None) -> None:
    """Measure the model before or after training, and add translations, scores and loss to the results so far.

    Args:
        moment: the name under which they are added, "before" or "after".
        known: the results so far, which are changed in place.
        trainer: the model, the arguments and the data.
        task: how to prompt the model.
        limit: most tokens of a translation, see [`translate`].
    """
    model = trainer.model
    args = trainer.args
    rows = known["samples"]
    hypotheses = translate(model, task, [row["source"] for row in rows], args, limit)
    scores = score(hypotheses, [row["reference"] for row in rows])
    known["scores"][moment] = {**scores, "loss": reference_loss(model, trainer.eval_dataset, args)}
    for row, hypothesis in zip(rows, hypotheses, strict=True):
        row[moment] = hypothesis


def keep(known: dict[str, Any], path: Path) -> None:
    """Write the results so far, with the translations, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(script: ScriptArguments, trainer: Trainer) -> dict[str, Any]:
    """Return the settings on which the scores depend, by name."""
    args = trainer.args
    sparse = trainer.model.config.sparse_attention
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    held_out = script.held_out or ([LAST] if script.pairs else BOOKS)
    return {
        "held out": ", ".join(Path(name).name for name in held_out),
        "passages": len(trainer.eval_dataset),
        "verses each": script.verses_per_example,
        "tokens each": round(sum(lengths) / len(lengths)),
        "longer than the budget": f"{sum(not sparse.covers(length) for length in lengths) / len(lengths):.0%}",
        **asdict(sparse),
        "lora rank": script.lora_rank,
        "learning rate": args.learning_rate,
        "examples a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "examples to train on": len(lengths),
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "bf16": args.bf16,
        "sacrebleu": version("sacrebleu"),
    }


def short(name: str | Path) -> str:
    """Return the last part of a path that exists, and any other name (a Hub id) unchanged."""
    return Path(name).name if Path(name).exists() else str(name)


def save_numbers(known: dict[str, Any], script: ScriptArguments, trainer: Trainer) -> None:
    """Write the scores as a results file, from which a model card can be made."""
    base = short(script.model or NAME)
    models = {"copy": "the source copied", "before": f"{base}, sparse", "after": f"{base}, sparse, fine-tuned"}
    languages = (script.source_language, script.target_language)
    about = {
        "task": "translation from {} into {}".format(*languages[:: -1 if script.reverse else 1]),
        "dataset": short(script.pairs or VERSES),
        "settings": describe(script, trainer),
    }
    records = [
        {"model": models[moment], "metric": METRICS[name][0], "unit": METRICS[name][1], "value": value, **about}
        for moment, scores in known["scores"].items()
        for name, value in scores.items()
    ]
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else f"CPU, {threads} thread(s)"
    command = shlex.join(["python", "examples/translate.py", *sys.argv[1:]])
    save_results(Path(trainer.args.output_dir, RESULTS), records, command=command, device=device)


def save(trainer: Trainer, kind: str) -> None:
    """Save the tokenizer, and the model with the merged adapter or (`kind="adapter"`) only the adapter."""
    if kind == "adapter":
        trainer.save_model()
    elif trainer.args.should_save:
        trainer.model.merge_and_unload().save_pretrained(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(trainer.args.output_dir)


def report(known: dict[str, Any], count: int) -> None:
    """Print some translations, and the scores before and after training."""
    for sample in spread(known["samples"], count) if count else []:
        print("\n" + tabulate(sample.items(), tablefmt="grid", maxcolwidths=[None, 100]))
    rows = [[name, *scores.values()] for name, scores in known["scores"].items()]
    print("\n" + tabulate(rows, ["", "BLEU", "chrF", "loss, nats per token"], floatfmt=("", ".1f", ".1f", ".3f")))
    print(f"{len(known['samples'])} held-out passages; copy: the source as its own translation")


def parse_arguments() -> tuple[ScriptArguments, TrainingArguments]:
    """Parse the command line."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=(__doc__ or "").split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_into_dataclasses()


def main() -> None:
    """Load, translate and score, train, translate and score again, and save."""
    # peft reads a property that transformers has renamed, and warns that it saves merged weights, which is intended
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "All adapters are already merged", UserWarning)
    script, args = parse_arguments()
    try:
        trainer, task, held_out = prepare(script, args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"translate.py: {' '.join(str(error).split())}") from error
    path = Path(args.output_dir, TRANSLATIONS)
    limit = script.max_new_tokens
    known = start(path, script, held_out, bool(args.resume_from_checkpoint))
    is_main = trainer.is_world_process_zero()
    if is_main:
        print("{examples to train on} examples of {tokens each} tokens".format(**describe(script, trainer)), end=", ")
        print("{longer than the budget} of them longer than the budget".format(**describe(script, trainer)))
    if "before" not in known["scores"]:
        with trainer.model.disable_adapter():  # a new adapter changes no output, but takes time
            measure("before", known, trainer, task, limit)
        if is_main:
            keep(known, path)
    resuming.train(trainer)
    trainer.model.merge_adapter()
    measure("after", known, trainer, task, limit)
    save(trainer, script.save)
    if is_main:
        keep(known, path)
        save_numbers(known, script, trainer)
        report(known, script.samples)


if __name__ == "__main__":
    main()
