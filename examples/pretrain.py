"""Pretrain a language model with sparse attention on text: train a tokenizer, then a model with random weights.

    pip install -e ".[examples]"
    python examples/pretrain.py                                              # about five minutes on a CPU
    accelerate launch examples/pretrain.py --train_data HuggingFaceFW/fineweb-edu --eval_data my/texts.parquet --bf16 \\
        --vocab_size 32768 --model '{"hidden_size": 768, "num_hidden_layers": 12}' --row_tokens 4096 --max_steps 100000

Text is streamed from data sets on the Hub, or from files of text, JSON lines or Parquet. Documents are packed into
rows, in which they do not attend to each other. All arguments of transformers' Trainer can be given.
`--resume_from_checkpoint last` resumes after an interruption without losing or repeating a document, and `--save_steps`
sets how many steps may have to be repeated. `--diversity '{}'` also trains against repetition. `--help` lists all
arguments.
"""

import glob
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast, TrainingArguments, set_seed
from transformers import PreTrainedTokenizerBase as AnyTokenizer

try:
    import datasets
    from tabulate import tabulate
    from transformers import EvalPrediction, Trainer, default_data_collator

    from examples.support import resuming
    from whisper_hf import PackedStream, WhisperLMConfig, WhisperLMForCausalLM, packed_rows
    from whisper_hf.checkpoint_io import new_folder
except ImportError as error:
    raise SystemExit(f"pretrain.py: {error}; pip install 'whisper-hf[examples]'") from error

BOOKS = Path(__file__).parent / "data"
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
END, PADDING = "<|endoftext|>", "<|padding|>"
MODEL = {  # 2.9 million parameters
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "use_qk_norm": True,
}
DEFAULTS = {
    "output_dir": "runs/pretrain",
    "max_steps": 200,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a value below 1 is a share of all steps
    "weight_decay": 0.1,
    "train_sampling_strategy": "sequential",  # PackedStream has shuffled the documents already
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 2,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": "none",
}


@dataclass
class ScriptArguments:
    """The arguments of text, tokenizer and model; the arguments of training are `TrainingArguments`."""

    train_data: list[str] = field(
        default_factory=lambda: (
            [str(BOOKS / f"{name}.txt") for name in ("emma", "pride_and_prejudice", "sense_and_sensibility")]
        ),
        metadata={"help": "files (.txt, .jsonl, .parquet; patterns such as 'text/*.parquet'), or Hub id of a data set"},
    )
    eval_data: list[str] = field(
        default_factory=lambda: [str(BOOKS / "northanger_abbey.txt")],
        metadata={"help": "held-out text, in the form of --train_data"},
    )
    train_split: str = field(default="train", metadata={"help": "split of a Hub data set to train on"})
    eval_split: str = field(default="train", metadata={"help": "split of a Hub data set to evaluate on"})
    text_column: str = field(
        default="text", metadata={"help": "column of a data set, or of JSON lines or Parquet, that holds the text"}
    )
    cut_before: str = field(
        default="(?i:chapter) ",
        metadata={"help": "a new document begins with each line of a text file that matches; '' leaves files whole"},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "path or Hub id of a tokenizer; by default one is trained on the text"}
    )
    vocab_size: int = field(default=4096, metadata={"help": "vocabulary size of the tokenizer that is trained"})
    tokenizer_documents: int = field(
        default=10_000, metadata={"help": "number of first documents to train the tokenizer on"}
    )
    chat_template: str | None = field(default=None, metadata={"help": "file with a Jinja template for the tokenizer"})
    model: str = field(default="{}", metadata={"help": f"fields of WhisperLMConfig as JSON, over {json.dumps(MODEL)}"})
    sparse_attention: str = field(
        default='{"block_size": 16, "topk_blocks": 4, "local_blocks": 4, "sink_blocks": 1}',
        metadata={"help": "block size and budget of sparse attention, as JSON"},
    )
    diversity: str | None = field(
        default=None,
        metadata={"help": "train against repetition: DiversityConfig as JSON, '{}' for defaults"},
    )
    row_tokens: int = field(default=512, metadata={"help": "tokens of a row, into which documents are packed"})
    shuffled: int = field(default=1024, metadata={"help": "number of documents that are shuffled at a time"})
    eval_documents: int = field(
        default=8, metadata={"help": "number of first held-out documents to measure perplexity on"}
    )
    prompt_tokens: int = field(
        default=32, metadata={"help": "tokens of held-out text that the model continues at the end"}
    )
    new_tokens: int = field(default=96, metadata={"help": "tokens that the model generates at the end"})


def read(data: list[str], split: str, script: ScriptArguments) -> datasets.IterableDataset:
    """Return a stream of documents from files or a Hub data set; text files are cut at `script.cut_before`."""
    paths = [path for pattern in data for path in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        if len(data) != 1 or Path(data[0]).suffix in BUILDERS:
            raise ValueError(
                f"the data must be files that exist, or one Hub data set, got {' '.join(data)}; check the paths"
            )
        return datasets.load_dataset(data[0], split=split, streaming=True)
    kinds = {BUILDERS.get(Path(path).suffix, path) for path in paths}
    if len(kinds) > 1 or not kinds <= {*BUILDERS.values()}:
        raise ValueError(
            f"files must all be of one kind among {', '.join(BUILDERS)}, got {' '.join(paths)}; convert them"
        )
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    documents = datasets.load_dataset(kind, data_files=paths, split="train", streaming=True, **options)
    if kind != "text" or not script.cut_before:
        return documents
    boundaries = re.compile(rf"^(?={script.cut_before})", re.MULTILINE)

    def cut(batch: dict[str, list]) -> dict[str, list]:
        return {"text": [part for text in batch["text"] for part in boundaries.split(text) if part]}

    return documents.map(cut, batched=True, batch_size=1)


def texts_of(documents: datasets.IterableDataset, script: ScriptArguments, count: int) -> Iterator[str]:
    """Yield the texts of the first `count` documents of a stream."""
    for row in islice(documents, count):
        if script.text_column not in row:
            raise ValueError(
                f"--text_column must be one of {', '.join(row)}, got {script.text_column}; name one of these"
            )
        yield row[script.text_column] or ""


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END, PADDING], initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END, pad_token=PADDING)


def load_tokenizer(documents: datasets.IterableDataset, folder: Path, script: ScriptArguments) -> AnyTokenizer:
    """Load the tokenizer, after training it and saving it in `folder` unless a run has done so before."""
    if script.tokenizer is None and not folder.is_dir():
        with new_folder(folder) as draft:
            texts = texts_of(documents, script, script.tokenizer_documents)
            train_tokenizer(texts, script.vocab_size).save_pretrained(draft)
    tokenizer = AutoTokenizer.from_pretrained(script.tokenizer or folder)
    if script.chat_template is not None:
        tokenizer.chat_template = Path(script.chat_template).read_text(encoding="utf-8")
    return tokenizer


def make_model(tokenizer: AnyTokenizer, script: ScriptArguments) -> WhisperLMForCausalLM:
    """Return a new WhisperLM with random weights."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    longest = {"max_position_embeddings": max(2048, script.row_tokens)}
    options = {**MODEL, **longest, **ids, "vocab_size": len(tokenizer), **json.loads(script.model)}
    options["sparse_attention"] = json.loads(script.sparse_attention)
    options["diversity"] = script.diversity and json.loads(script.diversity)
    return WhisperLMForCausalLM(WhisperLMConfig(**options))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each token in nats, `[B, T - 1]`, which is zero where there is no label.

    Args:
        logits: `[B, T, V]`, floats.
        labels: `[B, T]`, int64, -100 for tokens without label.
    """
    predicted = logits[:, :-1].flatten(0, 1).float()
    labels = labels[:, 1:]
    return torch.nn.functional.cross_entropy(predicted, labels.flatten(), reduction="none").view(labels.shape)


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Return the perplexity per token, from the sum of all losses, as rows have different numbers of labels."""
    count = (prediction.label_ids[:, 1:] != -100).sum()
    return {"perplexity": math.exp(prediction.predictions.sum() / count)}


def write(trainer: Trainer, tokenizer: AnyTokenizer, text: str, script: ScriptArguments) -> str:
    """Return the first tokens of a text and, after `||`, how the model continues them."""
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, : script.prompt_tokens].to(trainer.args.device)
    options = {"do_sample": True, "top_p": 0.9, "max_new_tokens": script.new_tokens}
    written = trainer.accelerator.unwrap_model(trainer.model).eval().generate(prompt, **options)[0]
    length = prompt.shape[1]
    return f"{tokenizer.decode(written[:length])} || {tokenizer.decode(written[length:])}"


def parse_arguments() -> tuple[ScriptArguments, TrainingArguments]:
    """Parse the command line."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=(__doc__ or "").split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_into_dataclasses()


def prepare(script: ScriptArguments, args: TrainingArguments) -> tuple[Trainer, AnyTokenizer, list[str]]:
    """Read the data and build the model; return the trainer, the tokenizer and the held-out texts."""
    documents = read(script.train_data, script.train_split, script)
    held_out = read(script.eval_data, script.eval_split, script)
    with args.main_process_first(desc="training a tokenizer"):
        tokenizer = load_tokenizer(documents, Path(args.output_dir, "tokenizer"), script)
    set_seed(args.seed)  # the seed of the model's initial weights
    texts = [text for text in texts_of(held_out, script, script.eval_documents) if text]
    trainer = Trainer(
        model=make_model(tokenizer, script),
        args=args,
        train_dataset=PackedStream(
            documents,
            tokenizer,
            args,
            row_tokens=script.row_tokens,
            text_column=script.text_column,
            shuffled=script.shuffled,
        ),
        eval_dataset=packed_rows(texts, tokenizer, script.row_tokens),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=token_losses,
    )
    return trainer, tokenizer, texts


def main() -> None:
    """Prepare, evaluate, train, evaluate again, save and print a sample."""
    script, args = parse_arguments()
    try:
        trainer, tokenizer, texts = prepare(script, args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"pretrain.py: {' '.join(str(error).split())}") from error
    is_sharded = (
        trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    )  # the model is sharded only when training begins
    found = {} if is_sharded else {"before": trainer.evaluate()["eval_perplexity"]}
    resuming.train(trainer)
    found["after"] = trainer.evaluate()["eval_perplexity"]
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("perplexity", found)
    sample = "" if is_sharded else write(trainer, tokenizer, texts[-1], script)
    if trainer.is_world_process_zero():
        print("\n" + tabulate(found.items(), ["", "perplexity"], floatfmt=".2f"))
        print(f"per token, on {len(texts)} held-out documents of {len(trainer.eval_dataset)} rows")
        print(f"\n{sample}")


if __name__ == "__main__":
    main()
