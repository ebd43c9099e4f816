"""Continue a text by greedy decoding and nucleus sampling, and show what the model attended to on an HTML page.

    pip install -e ".[examples]"
    python examples/write.py                                       # a minute on a free CPU core
    python examples/write.py --text my_novel.txt --model Qwen/Qwen3-0.6B --output runs/write/mine.html
    python examples/write.py --prompt "$(cat letter.txt)" --sparse_attention '{"topk_blocks": 4, "local_blocks": 2}'

The text is the opening of a novel that no example trains on. It has several times as many tokens as each token may
attend to. The page shows both continuations beside the author's, with measures of diversity, and for every written
token the blocks of the text that it attended to. All texts have the same length, which makes their measures comparable.
"""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    HfArgumentParser,
    TextStreamer,
    set_seed,
)
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.support.attention_map import ROLES, attending_heads, block_roles, recorded_blocks
from examples.support.smollm2 import smollm2_checkpoint
from whisper_hf import SparseAttentionConfig, from_dense
from whisper_hf.conversion import FAMILIES
from whisper_hf.repetition.metrics import distinct, looping_share, sequence_repetition
from whisper_hf.training.generation import end_tokens, writing

HERE = Path(__file__).parent
# the symbols of control characters, except tab and newline, in their place: HTML has no way to write them
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
TAIL = 8  # tokens of the context before each text, enough for tokenizers that look at what stands before
SPARSE = {"block_size": 32, "topk_blocks": 8, "local_blocks": 4, "sink_blocks": 1}
MEASURES = {  # title -> meaning and function of the token ids; all values are ratios in [0, 1]
    "seq-rep-4": ("share of sequences of four tokens that came before in the same text", sequence_repetition),
    "distinct-1": ("share of different tokens among all", lambda texts: distinct(texts, 1)),
    "distinct-2": ("share of different pairs of tokens among all", lambda texts: distinct(texts, 2)),
    "looping": ("1 if the text ends in a loop, else 0", looping_share),
}


def option(default: Any, help: str) -> Any:
    """Return a field of [`Arguments`]."""
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    """What to continue, by which model, and for how long."""

    text: str = option(str(HERE / "data" / "northanger_abbey.txt"), "file to continue")
    prompt: str | None = option(None, "text to continue in place of the file's")
    context_tokens: int = option(2048, "how many tokens of the file the model reads")
    max_new_tokens: int = option(128, "length of each continuation, in tokens")
    model: str | None = option(None, "path or Hub id, of a dense model too; by default SmolLM2-135M-Instruct")
    sparse_attention: str | None = option(
        None, "settings as JSON; by default a WhisperLM's own, and for other models those of SPARSE in this file"
    )
    top_p: float = option(0.9, "probability of the tokens that nucleus sampling draws from")
    seed: int = option(0, "of sampling, at least 0")
    output: str = option("runs/write/page.html", "the page")

    def __post_init__(self) -> None:
        for name, least in {"context_tokens": 2, "max_new_tokens": 4, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        if Path(self.output).suffix not in (".html", ".htm"):
            raise ValueError(f"--output must be an .html file, got {self.output!r}; try runs/write/page.html")

    def settings(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return the ways to write: a title, a line about it, and what the `GenerationConfig` is told."""
        nucleus = f"drawn from the likeliest tokens that together have {self.top_p:.0%}"
        return {
            "Greedy": ("always the likeliest token", {"do_sample": False}),
            "Nucleus": (nucleus, {"do_sample": True, "top_p": self.top_p, "top_k": 0}),
        }


@dataclass
class Written:
    """A text and the attention behind it, of `W` tokens to `N` blocks."""

    tokens: list[int]
    counts: Tensor  # `[W, N]`, int64: how many of `heads` attended to a block
    shares: Tensor  # `[W, 3]`: attention to sink, local and chosen blocks, which adds up to 1
    heads: int  # key-value heads of all sparse layers


def load(args: Arguments) -> tuple[Model, Tokenizer]:
    """Load the model, in float32 and with masked sparse attention, and its tokenizer."""
    source = smollm2_checkpoint() if args.model is None else args.model
    config = AutoConfig.from_pretrained(source)
    given = SPARSE if args.sparse_attention is None else json.loads(args.sparse_attention)
    budget = SparseAttentionConfig.from_value(given)
    is_whisper = config.model_type == "whisper_lm"
    if config.model_type in FAMILIES:
        model = from_dense(source, budget, dtype=torch.float32)
    else:
        options = {} if is_whisper else {"attn_implementation": "masked_sparse"}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        if not is_whisper or args.sparse_attention is not None:
            model.config.sparse_attention = budget
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = next(iter(end_tokens(model)), 0)  # nothing is padded
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(source)


def read_text(args: Arguments, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of the context, and of the author's continuation; of a prompt there is none."""
    if args.prompt is not None:
        ids = tokenizer(args.prompt).input_ids
        if len(ids) < 2:
            raise ValueError(f"--prompt must have at least 2 tokens, got {len(ids)}")
        return ids, []
    needed = args.context_tokens + args.max_new_tokens
    text = Path(args.text).read_text(encoding="utf-8")
    ids = tokenizer(text, truncation=True, max_length=needed).input_ids
    if len(ids) < needed:
        raise ValueError(
            f"--text must have {needed} tokens (--context_tokens and --max_new_tokens), got {len(ids)}; "
            "lower one of them"
        )
    return ids[: args.context_tokens], ids[args.context_tokens :]


@torch.no_grad()
def write(model: Model, tokenizer: Tokenizer, context: list[int], args: Arguments) -> dict[str, Written]:
    """Continue the context in every way, print the texts as they grow, and record what was attended to."""
    length = args.max_new_tokens
    budget = SparseAttentionConfig.from_value(model.config.sparse_attention)
    ids = torch.tensor([context], device=model.device)
    read = DynamicCache(config=model.config)
    model(ids[:, :-1], cache=read, use_cache=True, logits_to_keep=1)  # once for all settings, and not recorded
    texts = {}
    for title, (_, options) in args.settings().items():
        print(f"\n{title}:")
        set_seed(args.seed)
        inputs = {"attention_mask": torch.ones_like(ids), "cache": copy.deepcopy(read)}
        options |= {"max_new_tokens": length, "min_new_tokens": length}
        with recorded_blocks(budget) as record, writing(model, **options):
            output = model.generate(ids, **inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
        is_sparse = [record.is_sparse[layer] for layer in sorted(record.is_sparse)]
        if not any(is_sparse):
            raise ValueError(f"{type(model).__name__} must have a layer with masked sparse attention, got none")
        shares = record.shares()[:, is_sparse]  # [W, L, H, N]
        counts = attending_heads(shares, record.kv_heads).sum(1)
        roles = block_roles(torch.arange(length) + len(context) - 1, counts.shape[1], budget)
        parts = torch.stack([shares.mean((1, 2)).where(roles == role, 0).sum(1) for role in range(len(ROLES))], dim=1)
        texts[title] = Written(output[0, len(context) :].tolist(), counts, parts, record.kv_heads * sum(is_sparse))
    return texts


def pieces(tokenizer: Tokenizer, before: Sequence[int], parts: Sequence[Sequence[int]]) -> list[str]:
    """Return the text that each part adds, such that all of them joined are the text.

    A character whose first bytes end a part belongs to the part that completes it. Control characters are made visible.
    """
    ids = list(before)
    shown = tokenizer.decode(ids)
    texts = []
    for number, part in enumerate(parts):
        ids += part
        whole = tokenizer.decode(ids)
        is_incomplete = whole.endswith("\N{REPLACEMENT CHARACTER}") and number + 1 < len(parts)
        texts.append("" if is_incomplete else whole[len(shown) :])
        shown = shown if is_incomplete else whole
    return [text.translate(VISIBLE) for text in texts]


def render(tokenizer: Tokenizer, context: list[int], texts: dict[str, Written], **page: Any) -> str:
    """Fill the template; it takes `page` as it is."""
    budget, first = page["budget"], next(iter(texts.values()))
    length, blocks = first.counts.shape
    is_open = block_roles(torch.arange(length) + len(context) - 1, blocks, budget) == ROLES.index("chosen")
    counts = torch.stack([text.counts for text in texts.values()]).where(is_open, 0).sum((0, 1))
    chosen = counts / (is_open.sum(0) * len(texts) * first.heads).clamp(min=1)  # how often where it could be, [N]
    parts = [context[start : start + budget.block_size] for start in range(0, len(context), budget.block_size)]
    data = {
        **{"context": len(context), "heads": first.heads},
        **{"size": budget.block_size, "sink": budget.sink_blocks, "local": budget.local_blocks},
        "texts": [
            {"counts": text.counts.tolist(), "shares": text.shares.mul(1000).round().long().tolist()}  # per mille
            for text in texts.values()
        ],
    }
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("write.html").render(
        data=data,
        chosen=chosen.tolist(),
        blocks=pieces(tokenizer, [], parts),
        tokens={
            title: pieces(tokenizer, context[-TAIL:], [[token] for token in text.tokens])
            for title, text in texts.items()
        },
        meanings={name: meaning for name, (meaning, _) in MEASURES.items()},
        **page,
    )


def run(args: Arguments) -> None:
    """Write, measure, and save the page."""
    model, tokenizer = load(args)
    context, author = read_text(args, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and len(context) + args.max_new_tokens > positions:
        given = f"{len(context)} + {args.max_new_tokens}"
        raise ValueError(f"context and new tokens must fit into {positions} positions, got {given}; lower one of them")
    budget = SparseAttentionConfig.from_value(model.config.sparse_attention)
    print(f"reading {len(context)} tokens; each token attends to at most {budget.budget_tokens}")
    if budget.covers(len(context)):
        print("the budget covers them all, so attention is dense: give a longer text or a smaller --sparse_attention")
    texts = write(model, tokenizer, context, args)
    ids = {"Author": author, **{title: text.tokens for title, text in texts.items()}}
    measured = {
        title: {name: measure([one]) for name, (_, measure) in MEASURES.items()} for title, one in ids.items() if one
    }
    page = render(
        tokenizer,
        context,
        texts,
        name=Path(args.model).name if args.model else "SmolLM2-135M-Instruct",
        budget=budget,
        about={title: about for title, (about, _) in args.settings().items()},
        author="".join(pieces(tokenizer, context[-TAIL:], [author])),
        measured=measured,
    )
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    print()
    for title, values in measured.items():
        print(f"{title:>8}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    print(f"{output} ({output.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    """Read the command line, and report what cannot work in one line."""
    parser = HfArgumentParser(Arguments, description=(__doc__ or "").split("\n")[0])
    try:
        args = parser.parse_args_into_dataclasses()[0]
    except ValueError as error:
        parser.error(str(error))
    # on some CPUs bitsandbytes asks for a package that only 4-bit products need, and there are none here
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"write.py: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
