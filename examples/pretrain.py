"""Pretrain a language model with sparse attention from nothing but text: tokenizer, model, training.

    python examples/pretrain.py                                              # some minutes on a CPU
    accelerate launch examples/pretrain.py --train_data HuggingFaceFW/fineweb-edu --eval_data my/texts.parquet --bf16 \\
        --vocab_size 32768 --model '{"hidden_size": 768, "num_hidden_layers": 12}' --row_tokens 4096 --max_steps 100000

Text is streamed: Hub data sets, and files of text, JSON lines or Parquet. Documents are packed into rows in which they
do not see each other. All arguments of Trainer can be given; `--resume_from_checkpoint last` goes on after
an interruption without losing or repeating a document, `--save_steps` says how much may have to be done again.
`--diversity '{}'` trains against repetition, too. Run it with `--help` for the list.
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
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "weight_decay": 0.1,
    "train_sampling_strategy": "sequential",  # documents are put in random order before they are packed
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 2,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": "none",
}


@dataclass
class ScriptArguments:
    """Text, tokenizer and model; what concerns training is in transformers' `TrainingArguments`."""

    train_data: list[str] = field(
        default_factory=lambda: (
            [str(BOOKS / f"{name}.txt") for name in ("emma", "pride_and_prejudice")]
            + [str(BOOKS / "sense_and_sensibility.txt")]
        ),
        metadata={"help": "files (.txt, .jsonl, .parquet; patterns such as 'text/*.parquet'), or Hub id of a data set"},
    )
    eval_data: list[str] = field(
        default_factory=lambda: [str(BOOKS / "northanger_abbey.txt")], metadata={"help": "likewise"}
    )
    train_split: str = field(default="train", metadata={"help": "of a data set"})
    eval_split: str = field(default="train", metadata={"help": "of a data set"})
    text_column: str = field(default="text", metadata={"help": "of a data set, or of JSON lines and Parquet"})
    cut_before: str = field(
        default="(?i:chapter) ",
        metadata={"help": "a new document begins with each line of a text file that matches; '' leaves files whole"},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "path or Hub id; by default trained on the text"})
    vocab_size: int = field(default=4096, metadata={"help": "tokens of a trained tokenizer"})
    tokenizer_documents: int = field(default=10_000, metadata={"help": "documents to train it on, the first ones"})
    chat_template: str | None = field(default=None, metadata={"help": "file with a Jinja template for the tokenizer"})
    model: str = field(default="{}", metadata={"help": f"fields of WhisperLMConfig as JSON, over {json.dumps(MODEL)}"})
    sparse_attention: str = field(
        default='{"block_size": 16, "topk_blocks": 4, "local_blocks": 4, "sink_blocks": 1}',
        metadata={"help": "block size and budget, as JSON"},
    )
    diversity: str | None = field(
        default=None,
        metadata={"help": "train against repetition: DiversityConfig as JSON, '{}' for defaults"},
    )
    row_tokens: int = field(default=512, metadata={"help": "tokens of a row, which documents are packed into"})
    shuffled: int = field(default=1024, metadata={"help": "documents put in random order at a time"})
    eval_documents: int = field(default=8, metadata={"help": "to measure perplexity on, the first ones"})
    prompt_tokens: int = field(default=32, metadata={"help": "of held-out text, for the model to go on from"})
    new_tokens: int = field(default=96, metadata={"help": "to write at the end"})


def read(data: list[str], split: str, script: ScriptArguments) -> datasets.IterableDataset:
    """Return a stream of documents."""
    paths = [path for pattern in data for path in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        if len(data) != 1 or Path(data[0]).suffix in BUILDERS:
            raise ValueError(f"there must be files, or one Hub data set, got {' '.join(data)}")
        return datasets.load_dataset(data[0], split=split, streaming=True)
    kinds = {BUILDERS.get(Path(path).suffix, path) for path in paths}
    if len(kinds) > 1 or not kinds <= {*BUILDERS.values()}:
        raise ValueError(f"files must all be of one kind among {', '.join(BUILDERS)}, got {' '.join(paths)}")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    documents = datasets.load_dataset(kind, data_files=paths, split="train", streaming=True, **options)
    if kind != "text" or not script.cut_before:
        return documents
    places = re.compile(rf"^(?={script.cut_before})", re.MULTILINE)

    def cut(batch: dict[str, list]) -> dict[str, list]:
        return {"text": [part for text in batch["text"] for part in places.split(text) if part]}

    return documents.map(cut, batched=True, batch_size=1)


def texts_of(documents: datasets.IterableDataset, script: ScriptArguments, count: int) -> Iterator[str]:
    """Yield the text of the first documents."""
    for row in islice(documents, count):
        if script.text_column not in row:
            raise ValueError(f"--text_column must be one of {', '.join(row)}, got {script.text_column}")
        yield row[script.text_column] or ""


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, to which no text is unknown."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [END, PADDING]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END, pad_token=PADDING)


def load_tokenizer(documents: datasets.IterableDataset, folder: Path, script: ScriptArguments) -> AnyTokenizer:
    """Return the tokenizer: the one that this training has begun with, if it has."""
    if script.tokenizer is None and not folder.is_dir():
        with new_folder(folder) as draft:
            texts = texts_of(documents, script, script.tokenizer_documents)
            train_tokenizer(texts, script.vocab_size).save_pretrained(draft)
    tokenizer = AutoTokenizer.from_pretrained(script.tokenizer or folder)
    if script.chat_template is not None:
        tokenizer.chat_template = Path(script.chat_template).read_text(encoding="utf-8")
    return tokenizer


def make_model(tokenizer: AnyTokenizer, script: ScriptArguments) -> WhisperLMForCausalLM:
    """Return a model of random weights."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    longest = {"max_position_embeddings": max(2048, script.row_tokens)}
    options = {**MODEL, **longest, **ids, "vocab_size": len(tokenizer), **json.loads(script.model)}
    options["sparse_attention"] = json.loads(script.sparse_attention)
    options["diversity"] = script.diversity and json.loads(script.diversity)
    return WhisperLMForCausalLM(WhisperLMConfig(**options))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each token in nats, `[B, T - 1]`: zero where there is no label."""
    predicted, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:]
    return torch.nn.functional.cross_entropy(predicted, labels.flatten(), reduction="none").view(labels.shape)


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Return the perplexity per token; rows predict different numbers of them."""
    count = (prediction.label_ids[:, 1:] != -100).sum()
    return {"perplexity": math.exp(prediction.predictions.sum() / count)}


def write(trainer: Trainer, tokenizer: AnyTokenizer, text: str, script: ScriptArguments) -> str:
    """Return how the model goes on from the beginning of a text."""
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, : script.prompt_tokens].to(trainer.args.device)
    options = {"do_sample": True, "top_p": 0.9, "max_new_tokens": script.new_tokens}
    written = trainer.accelerator.unwrap_model(trainer.model).eval().generate(prompt, **options)[0]
    begun, rest = (tokenizer.decode(part) for part in (written[: prompt.shape[1]], written[prompt.shape[1] :]))
    return f"{begun} || {rest}"


def parse_arguments() -> tuple[ScriptArguments, TrainingArguments]:
    """Read the command line."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=(__doc__ or "").split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_into_dataclasses()


def prepare(script: ScriptArguments, args: TrainingArguments) -> tuple[Trainer, AnyTokenizer, list[str]]:
    """Return the trainer, the tokenizer and held-out texts."""
    documents = read(script.train_data, script.train_split, script)
    held_out = read(script.eval_data, script.eval_split, script)
    with args.main_process_first(desc="training a tokenizer"):
        tokenizer = load_tokenizer(documents, Path(args.output_dir, "tokenizer"), script)
    set_seed(args.seed)  # of the model's weights
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
    """Read, train, evaluate, write and save."""
    script, args = parse_arguments()
    try:
        trainer, tokenizer, texts = prepare(script, args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"pretrain.py: {' '.join(str(error).split())}") from error
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # for training only, and not before
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
