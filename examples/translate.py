"""Teach a language model to translate: LoRA on verses in English and Spanish, BLEU and chrF on whole books held out.

    pip install -e ".[examples,metrics]"
    python examples/translate.py --max_steps 20                           # some eight minutes on a CPU
    accelerate launch examples/translate.py --model Qwen/Qwen3-0.6B --bf16 --max_steps -1 --num_train_epochs 3 \\
        --verses_per_example 24 --eval_examples 0 --per_device_train_batch_size 8 --output_dir runs/qwen3-translate

The model is SmolLM2-135M-Instruct unless another one is named; a dense one is converted to a WhisperLM. An example is a
passage of consecutive verses, in the model's chat format or as a plain instruction, and only the translation is learnt,
not the prompt. Four verses are some 360 tokens, beyond the default budget of 208, so attention is sparse in training
and in most of each translation. Shorter passages, or a larger `--sparse_attention`, may fit into the budget, and
attention is then simply dense: how many examples exceed it is printed, and kept with the results.

Other data: `--pairs` takes any file of tab-separated pairs, or a data set, whose consecutive rows make a passage
(`--verses_per_example 1` if they are not a text), and `--held_out 500` its last pairs to evaluate on, or another file:

    python examples/translate.py --pairs Helsinki-NLP/opus_books --config en-fr --target_language French \\
        --columns translation.en translation.fr --held_out 500 --verses_per_example 1

Arguments of transformers' TrainingArguments can be given too: `--resume_from_checkpoint last` goes on after an
interruption. Run it with `--help` for the list. Translations of one batch come from one process, so FSDP and ZeRO 3 are
refused; several GPUs with a whole model each are fine.
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
    # on some CPUs bitsandbytes, which peft imports, asks for a package that only 4-bit products need: none happen here
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

RESULTS, TRANSLATIONS = "translate.json", "translations.json"  # numbers; texts, with all that an interrupted run needs
NAME = "SmolLM2-135M-Instruct"
IGNORED = -100  # label of tokens that are not learnt
SPARSE = '{"block_size": 16, "topk_blocks": 8, "local_blocks": 4, "sink_blocks": 1}'
DEFAULTS = {
    "output_dir": "runs/translate",
    "max_steps": 200,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "label_names": ["labels"],  # behind an adapter the Trainer cannot find them out
    "logging_steps": 5,
    "save_steps": 20,
    "save_total_limit": 2,
    "report_to": "none",
}
METRICS = {"bleu": ("BLEU", None), "chrf": ("chrF", None), "loss": ("loss", "nats/token")}  # and their units


@dataclass
class ScriptArguments:
    """Model, text and translations; what concerns training is in transformers' TrainingArguments."""

    model: str | None = field(
        default=None, metadata={"help": "path or Hub id, of a WhisperLM or dense; by default SmolLM2-135M-Instruct"}
    )
    sparse_attention: str | None = field(
        default=None, metadata={"help": f"as JSON; by default a WhisperLM's own, for a dense model {SPARSE}"}
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "file of tab-separated pairs (may be .gz), or path or Hub id of a data set; by default verses"
        },
    )
    config: str | None = field(default=None, metadata={"help": "of a data set that has several, such as en-fr"})
    split: str = field(default="train", metadata={"help": "of a data set"})
    columns: list[str] = field(
        default_factory=lambda: ["source", "target"],
        metadata={"help": "of a data set: those of source and target; of nested ones as translation.en"},
    )
    held_out: list[str] | None = field(
        default=None,
        metadata={
            "help": f"what to evaluate on and never train on: of the verses, books among {', '.join(BOOKS)} (default: "
            f"all); of other pairs, their last N (default: {LAST}), or another file"
        },
    )
    source_language: str = field(default="English", metadata={"help": "as prompts name it"})
    target_language: str = field(default="Spanish", metadata={"help": "as prompts name it"})
    reverse: bool = field(default=False, metadata={"help": "translate from the target language into the source one"})
    verses_per_example: int = field(default=4, metadata={"help": "consecutive pairs in an example, a line each"})
    eval_examples: int = field(default=16, metadata={"help": "evenly spread over what is held out; 0: all"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "of a translation; by default 16 and twice the longest source of its batch"}
    )
    lora_rank: int = field(default=16, metadata={"help": "of the adapter; its alpha is twice that"})
    save: Literal["merged", "adapter"] = field(
        default="merged",
        metadata={"help": "the whole model, or the adapter alone, to be loaded onto the same converted model"},
    )
    samples: int = field(default=3, metadata={"help": "translations to print"})


@dataclass
class Task:
    """A tokenizer, and how it formats examples."""

    tokenizer: Tokenizer
    target_language: str

    def prompt(self, source: str) -> list[int]:
        """Return the ids of all that comes before a translation."""
        request = f"Translate into {self.target_language}:\n\n{source}"
        if self.tokenizer.chat_template is None:
            return self.tokenizer(f"{request}\n\n{self.target_language}:\n").input_ids
        chat = [{"role": "user", "content": request}]
        # Qwen3's template would leave it to the model whether to think first; other templates do not know the name
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        return self.tokenizer.apply_chat_template(chat, **options)

    def example(self, pair: Pair) -> dict[str, list[int]]:
        """Return `input_ids` and `labels`, in which only the translation and the end of text count."""
        prompt = self.prompt(pair[0])
        answer = [*self.tokenizer(pair[1], add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    def examples(self, pairs: list[Pair], longest: int) -> datasets.Dataset:
        """Tokenize pairs, which must not exceed the `longest` sequence, in tokens, that the model can read."""
        rows = [self.example(pair) for pair in tqdm(pairs, desc="tokenizing", unit="example")]
        length = max(len(row["input_ids"]) for row in rows)
        if length > longest:
            raise ValueError(f"examples must have at most {longest} tokens, got {length}; lower --verses_per_example")
        return datasets.Dataset.from_list(rows)


def load_model(name: str, script: ScriptArguments, dtype: torch.dtype) -> Model:
    """Return a WhisperLM; a dense model is converted."""
    try:
        given = json.loads(script.sparse_attention or SPARSE)
    except json.JSONDecodeError as error:
        raise ValueError(f"--sparse_attention must be JSON like {SPARSE}, got {script.sparse_attention}") from error
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "whisper_lm":
        return from_dense(name, sparse_attention=given, dtype=dtype)
    if script.sparse_attention:
        config.sparse_attention = SparseAttentionConfig.from_value(given)
    return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)


def load_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer that pads on the left, so that prompts of a batch end together."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer must have an end-of-text token to end translations with, got none in {name}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def translate(model: Model, task: Task, sources: list[str], args: TrainingArguments, limit: int | None) -> list[str]:
    """Translate greedily, in batches of similar length that the processes share.

    Args:
        limit (`int`, *optional*): tokens of a translation; by default 16 and twice the longest source of its batch.
    """
    tokenizer, size = task.tokenizer, args.per_device_eval_batch_size
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    found: list[tuple[int, str]] = []
    for batch in progress(batches, "translating", args):
        padded = tokenizer.pad({"input_ids": [task.prompt(sources[i]) for i in batch]}, return_tensors="pt")
        padded = padded.to(args.device)
        longest = max(len(tokenizer(sources[i]).input_ids) for i in batch)
        ids, mask, room = padded["input_ids"], padded["attention_mask"], limit or 16 + 2 * longest
        written = continue_prompts(model, ids, mask, room, pad_token_id=tokenizer.pad_token_id)["labels"]
        texts = tokenizer.batch_decode([row[row != IGNORED] for row in written], skip_special_tokens=True)
        found += zip(batch, map(str.strip, texts), strict=True)
    found = gather_object(found) if args.world_size > 1 else found
    return [text for _, text in sorted(found)]


@torch.no_grad()
def reference_loss(model: Model, rows: datasets.Dataset, args: TrainingArguments) -> float:
    """Return the loss on people's translations in nats per token; each token counts alike, however many processes."""
    model.eval()
    found: list[tuple[float, int]] = []
    for row in progress(list(rows), "reading", args):
        ids, labels = (torch.tensor([row[name]], device=args.device) for name in ("input_ids", "labels"))
        count = int((labels != IGNORED).sum())
        found.append((count * model(input_ids=ids, labels=labels).loss.item(), count))
    found = gather_object(found) if args.world_size > 1 else found
    return sum(loss for loss, _ in found) / sum(count for _, count in found)


def progress(items: list, what: str, args: TrainingArguments) -> tqdm:
    """Return this process's share of the items, behind a progress bar."""
    return tqdm(items[args.process_index :: args.world_size], desc=what, disable=args.process_index > 0)


def score(hypotheses: list[str], references: list[str]) -> dict[str, float]:
    """Return corpus BLEU and chrF by sacrebleu with its default settings, from 0 to 100; a passage is a segment."""
    return {
        "bleu": BLEU().corpus_score(hypotheses, [references]).score,
        "chrf": CHRF().corpus_score(hypotheses, [references]).score,
    }


def prepare(script: ScriptArguments, args: TrainingArguments) -> tuple[Trainer, Task, list[Pair]]:
    """Read text and model; return a Trainer with an adapter on the model, the task, and the pairs to evaluate on."""
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
    set_seed(args.seed)  # of the adapter
    adapter = LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank, target_modules="all-linear")
    trainer = Trainer(
        model=get_peft_model(model, adapter),
        args=args,
        train_dataset=task.examples(train, model.config.max_position_embeddings),
        eval_dataset=task.examples(held_out, model.config.max_position_embeddings),
        processing_class=task.tokenizer,
        data_collator=DataCollatorForSeq2Seq(task.tokenizer),  # pads labels, too
    )
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        raise ValueError("each process must hold the whole model to translate, got a sharded one; launch without FSDP")
    return trainer, task, held_out


def start(path: Path, script: ScriptArguments, held_out: list[Pair], resume: bool) -> dict[str, Any]:
    """Return what is known: all of an interrupted run with the same arguments, or the scores of copying the source."""
    if resume and path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["script"] == asdict(script):
            return found
    sources, references = map(list, zip(*held_out, strict=True))
    samples = [{"source": source, "reference": reference} for source, reference in held_out]
    return {"script": asdict(script), "scores": {"copy": score(sources, references)}, "samples": samples}


def measure(moment: str, known: dict[str, Any], trainer: Trainer, task: Task, limit: int | None) -> None:
    """Add the scores of the model's translations, its loss on people's, and the translations."""
    model, args, rows = trainer.model, trainer.args, known["samples"]
    hypotheses = translate(model, task, [row["source"] for row in rows], args, limit)
    scores = score(hypotheses, [row["reference"] for row in rows])
    known["scores"][moment] = {**scores, "loss": reference_loss(model, trainer.eval_dataset, args)}
    for row, hypothesis in zip(rows, hypotheses, strict=True):
        row[moment] = hypothesis


def keep(known: dict[str, Any], path: Path) -> None:
    """Write the translations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(script: ScriptArguments, trainer: Trainer) -> dict[str, Any]:
    """Return what the numbers depend on."""
    args, sparse = trainer.args, trainer.model.config.sparse_attention
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
    """Return a Hub id as it is, and the last part of a path."""
    return Path(name).name if Path(name).exists() else str(name)


def save_numbers(known: dict[str, Any], script: ScriptArguments, trainer: Trainer) -> None:
    """Write the scores as a results file, which a model card can be made from."""
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
    """Save the model with the adapter merged into it, or the adapter alone, and the tokenizer."""
    if kind == "adapter":
        trainer.save_model()
    elif trainer.args.should_save:
        trainer.model.merge_and_unload().save_pretrained(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(trainer.args.output_dir)


def report(known: dict[str, Any], count: int) -> None:
    """Print what came out, and some translations."""
    for sample in spread(known["samples"], count) if count else []:
        print("\n" + tabulate(sample.items(), tablefmt="grid", maxcolwidths=[None, 100]))
    rows = [[name, *scores.values()] for name, scores in known["scores"].items()]
    print("\n" + tabulate(rows, ["", "BLEU", "chrF", "loss, nats per token"], floatfmt=("", ".1f", ".1f", ".3f")))
    print(f"{len(known['samples'])} held-out passages; copy: the source as its own translation")


def parse_arguments() -> tuple[ScriptArguments, TrainingArguments]:
    """Read the command line."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=(__doc__ or "").split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_into_dataclasses()


def main() -> None:
    """Load, translate, train, translate again and save."""
    # peft still asks for a property that transformers has renamed, and need not say that saving finds merged weights
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "All adapters are already merged", UserWarning)
    script, args = parse_arguments()
    try:
        trainer, task, held_out = prepare(script, args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"translate.py: {' '.join(str(error).split())}") from error
    path, limit = Path(args.output_dir, TRANSLATIONS), script.max_new_tokens
    known = start(path, script, held_out, bool(args.resume_from_checkpoint))
    is_main = trainer.is_world_process_zero()
    if is_main:
        print("{examples to train on} examples of {tokens each} tokens".format(**describe(script, trainer)), end=", ")
        print("{longer than the budget} of them longer than the budget".format(**describe(script, trainer)))
    if "before" not in known["scores"]:
        with trainer.model.disable_adapter():  # which changes nothing yet, but takes time
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
