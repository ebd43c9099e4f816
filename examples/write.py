"""Continue a text in four ways, side by side, and look at what the model looked at: one small HTML page.

    pip install -e ".[examples,metrics]"
    python examples/write.py                                       # some three minutes on a free CPU core
    python examples/write.py --text my_novel.txt --model Qwen/Qwen3-0.6B --output runs/write/mine.html
    python examples/write.py --prompt "$(cat letter.txt)" --sparse_attention '{"topk_blocks": 4, "local_blocks": 2}'

The text is the opening of a novel that no example trains on, several times as long as the tokens that each token may
attend to. The page puts greedy decoding, nucleus sampling, contrastive search and beam search beside what the author
wrote, with measures of diversity, and shows for every written token which blocks of the text the model chose. It is one
file without links to anything. All texts have the same length, as their measures would not be comparable: none may end
before.
"""

import base64
import copy
import json
import logging
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    HfArgumentParser,
    StoppingCriteria,
)
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.support.attention_map import attending_heads, block_roles, recorded_blocks
from examples.support.contrastive import contrastive_search
from examples.support.smollm2 import smollm2_checkpoint
from whisper_hf import SparseAttentionConfig, from_dense
from whisper_hf.conversion import FAMILIES
from whisper_hf.repetition.metrics import distinct, diversity, looping_share, self_bleu, sequence_repetition
from whisper_hf.training.generation import end_tokens, writing

try:
    # on some CPUs bitsandbytes, which peft imports, asks for a package that only 4-bit products need: none happen here
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import sacrebleu  # noqa: F401 (for self_bleu)
    from tabulate import tabulate
    from transformers import set_seed
except ImportError as error:
    raise SystemExit(f"write.py: {error}; pip install 'whisper-hf[examples,metrics]'") from error

HERE = Path(__file__).parent
# control characters, but for tab and newline, as the symbols for them: HTML has no way to write them
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
MEASURES = {  # title -> what it says; all are ratios
    "seq-rep-4": "sequences of four tokens that came before in the same text",
    "distinct-1": "different tokens among all",
    "distinct-2": "different pairs of tokens among all",
    "diversity": "product of the distinct pairs, triples and fours",
    "looping": "whether the text ends in a loop",
    "self-BLEU": "how alike several texts of this setting are",
}


@dataclass
class Arguments:
    """What to continue, with what, and how."""

    text: str = field(default=str(HERE / "data" / "northanger_abbey.txt"), metadata={"help": "file to continue"})
    prompt: str | None = field(default=None, metadata={"help": "text to continue instead; then no author is shown"})
    context_tokens: int = field(default=2048, metadata={"help": "how many tokens of the file the model reads"})
    max_new_tokens: int = field(default=128, metadata={"help": "how many each setting writes"})
    model: str | None = field(
        default=None,
        metadata={
            "help": "path or Hub id of a WhisperLM or of another model, which is converted or else run with "
            "masked_sparse attention; by default SmolLM2-135M-Instruct"
        },
    )
    sparse_attention: str | None = field(
        default=None,
        metadata={
            "help": "block size and budget, as JSON; by default a WhisperLM's own, and for other models blocks of 32: "
            "1 sink, 4 local, 8 chosen"
        },
    )
    top_p: float = field(default=0.9, metadata={"help": "probability that nucleus sampling draws from"})
    samples: int = field(default=4, metadata={"help": "texts to sample, for self-BLEU; the first is shown"})
    candidates: int = field(default=4, metadata={"help": "tokens that contrastive search chooses from"})
    penalty: float = field(default=0.6, metadata={"help": "of contrastive search on resemblance, from 0 to 1"})
    beams: int = field(default=4, metadata={"help": "of beam search"})
    seed: int = field(default=0, metadata={"help": "of sampling"})
    output: str = field(default="runs/write/page.html", metadata={"help": "the page; a .json of figures lies beside"})

    def __post_init__(self) -> None:
        least = {"context_tokens": 2, "max_new_tokens": 4, "samples": 2, "candidates": 2, "beams": 2, "seed": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name} must be at least {minimum}, got {getattr(self, name)}")
        for name in ("top_p", "penalty"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if Path(self.output).suffix not in (".html", ".htm"):
            raise ValueError(f"--output must be an .html file, got {self.output!r}; try runs/write/page.html")


@dataclass
class Setting:
    """A way to write: its name, a line about it, and what `generate` is told."""

    title: str
    about: str
    config: dict[str, Any]  # of the GenerationConfig
    options: dict[str, Any] = field(default_factory=dict)  # of generate

    @property
    def rows(self) -> int:
        """Texts that are written at the same time."""
        return max(self.config.get("num_beams", 1), self.config.get("num_return_sequences", 1))


@dataclass
class Written:
    """What came out: `texts`, ids of each without the prompt, and the attention behind the first, `[W, L, H, N]`."""

    texts: list[list[int]]
    shares: Tensor
    is_sparse: list[bool]  # by layer
    kv_heads: int
    seconds: float


@dataclass
class Run:
    """All that the page and the figures are made of; `author` holds passages that follow the context, if known."""

    name: str
    tokenizer: Tokenizer
    budget: SparseAttentionConfig
    context: list[int]
    author: list[list[int]]
    settings: dict[str, Setting]
    written: dict[str, Written]


def settings_from(args: Arguments, states: Tensor) -> dict[str, Setting]:
    """Return the four ways to write.

    Args:
        states (`[1, context - 1, hidden_size]`): last hidden states of the context, which contrastive search compares
            with.
    """
    nucleus = {"do_sample": True, "top_p": args.top_p, "top_k": 0, "num_return_sequences": args.samples}
    contrastive = {"candidates": args.candidates, "penalty": args.penalty, "context_states": states}
    beams = {"num_beams": args.beams, "num_return_sequences": args.beams}
    return {
        "greedy": Setting("Greedy", "always the likeliest token", {"do_sample": False}),
        "nucleus": Setting("Nucleus", f"drawn from the likeliest tokens that hold {args.top_p:.0%}", nucleus),
        "contrastive": Setting(
            "Contrastive",
            f"of the {args.candidates} likeliest, one unlike all before (penalty {args.penalty:g})",
            {"do_sample": False},
            {"custom_generate": contrastive_search, **contrastive},
        ),
        "beam": Setting("Beam", f"the likeliest of {args.beams} texts kept at a time", {"do_sample": False, **beams}),
    }


def load(args: Arguments) -> tuple[Model, Tokenizer]:
    """Load the model, in float32 and with masked sparse attention, and its tokenizer."""
    source = smollm2_checkpoint() if args.model is None else args.model
    config = AutoConfig.from_pretrained(source)
    sparse = {"block_size": 32, "topk_blocks": 8, "local_blocks": 4, "sink_blocks": 1}
    given = sparse if args.sparse_attention is None else json.loads(args.sparse_attention)
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


def read_text(args: Arguments, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """Return the ids of the context, and of passages of the author that follow it, the continuation first."""
    if args.prompt is not None:
        ids = tokenizer(args.prompt).input_ids
        if len(ids) < 2:
            raise ValueError(f"--prompt must have at least 2 tokens, got {len(ids)}")
        return ids, []
    needed = args.context_tokens + args.samples * args.max_new_tokens
    text = Path(args.text).read_text(encoding="utf-8")
    ids = tokenizer(text, truncation=True, max_length=needed).input_ids
    if len(ids) < needed:
        raise ValueError(
            f"--text must have {needed} tokens (--context_tokens and --samples times --max_new_tokens), "
            f"got {len(ids)}; lower one of them"
        )
    starts = range(args.context_tokens, needed, args.max_new_tokens)
    return ids[: args.context_tokens], [ids[i : i + args.max_new_tokens] for i in starts]


@torch.no_grad()
def read_context(model: Model, context: list[int]) -> tuple[Cache, Tensor]:
    """Read all of the context but its last token, once for all settings; return the cache and last hidden states."""
    ids = torch.tensor([context[:-1]], device=model.device)
    cache = DynamicCache(config=model.config)
    output = model(ids, cache=cache, use_cache=True, output_hidden_states=True, logits_to_keep=1)
    return cache, output.hidden_states[-1]


class Progress(StoppingCriteria):
    """Moves a bar by one with each token; stops nothing."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return `False` for each row."""
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def write(model: Model, context: list[int], cache: Cache, setting: Setting, args: Arguments) -> Written:
    """Continue the context, and record what was attended to."""
    cache = copy.deepcopy(cache)
    if setting.rows > 1:
        cache.batch_repeat_interleave(setting.rows)
    ids = torch.tensor([context], device=model.device)
    length = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.max_new_tokens}
    outputs = {"return_dict_in_generate": True, "output_scores": setting.config.get("num_beams", 1) > 1}
    set_seed(args.seed)
    start = time.monotonic()
    with (
        tqdm(total=args.max_new_tokens, desc=f"{setting.title:>11}", unit="token") as bar,
        recorded_blocks(SparseAttentionConfig.from_value(model.config.sparse_attention)) as record,
        writing(model, **setting.config, **length, **outputs),
    ):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            stopping_criteria=[Progress(bar)],
            **setting.options,
        )
    beams = getattr(output, "beam_indices", None)
    rows = [0] * args.max_new_tokens if beams is None else beams[0].tolist()
    is_sparse = [record.is_sparse[layer] for layer in sorted(record.is_sparse)]
    if not any(is_sparse):
        raise ValueError(f"{type(model).__name__} must have a layer with masked sparse attention, got none")
    texts = output.sequences[:, len(context) :].tolist()
    return Written(texts, record.shares(rows), is_sparse, record.kv_heads, time.monotonic() - start)


def measure(texts: list[list[int]], tokenizer: Tokenizer) -> dict[str, float | None]:
    """Measure the diversity of the first of some texts, and how alike they all are; names are those of `MEASURES`."""
    shown = texts[:1]
    decoded = [tokenizer.decode(ids) for ids in texts]
    values = (
        sequence_repetition(shown, 4),
        distinct(shown, 1),
        distinct(shown, 2),
        diversity(shown),
        looping_share(shown),
        self_bleu(decoded) if len(decoded) > 1 else None,
    )
    return dict(zip(MEASURES, values, strict=True))


def pieces(tokenizer: Tokenizer, before: Sequence[int], parts: Sequence[Sequence[int]]) -> list[str]:
    """Return the text that each part adds, so that all of them joined are the text.

    A character of which a part holds but the first bytes belongs to the part that completes it. Control characters are
    made visible.
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


def attention_shares(written: Written, length: int, budget: SparseAttentionConfig) -> np.ndarray:
    """Return the attention of all heads to the sink and to chosen blocks, `[L, 2, W]`; the rest is local."""
    shares = written.shares.mean(2).numpy()  # [W, L, N]
    roles = np.array([block_roles(length - 1 + i, shares.shape[2], budget) for i in range(len(shares))])
    parts = [np.where((roles == role)[:, None], shares, 0).sum(-1) for role in ("sink", "past")]
    return np.stack(parts).transpose(2, 0, 1)


def packed(array: np.ndarray) -> str:
    """Compress an array, as bytes in base64."""
    return base64.b64encode(zlib.compress(array.astype(np.uint8).tobytes(), 9)).decode()


def page_data(run: Run) -> tuple[dict[str, Any], list[float]]:
    """Return what the page's script reads, and how often each block was chosen where it could be, in [0, 1]."""
    length, first = len(run.context), next(iter(run.written.values()))
    blocks = max(one.shares.shape[-1] for one in run.written.values())
    chosen, open_to = np.zeros(blocks), np.zeros(blocks)
    maps = []
    for one in run.written.values():
        heads = attending_heads(one.shares, one.kv_heads).numpy()  # [W, L, N]
        heads = np.pad(heads, ((0, 0), (0, 0), (0, blocks - heads.shape[2])))
        is_past = np.array([block_roles(length - 1 + i, blocks, run.budget) for i in range(len(heads))]) == "past"
        chosen += (heads[:, one.is_sparse].sum(1) * is_past).sum(0)
        open_to += is_past.sum(0) * sum(one.is_sparse) * one.kv_heads
        shares = np.rint(255 * attention_shares(one, length, run.budget))
        maps.append({"tokens": len(heads), "heads": packed(heads.transpose(1, 2, 0)), "shares": packed(shares)})
    data = {
        **{"context": length, "blocks": blocks, "kvHeads": first.kv_heads, "layers": len(first.is_sparse)},
        **{"isSparse": first.is_sparse, "size": run.budget.block_size},
        **{"sink": run.budget.sink_blocks, "local": run.budget.local_blocks, "maps": maps},
    }
    return data, (chosen / np.maximum(open_to, 1)).tolist()


def render(run: Run, results: dict[str, Any]) -> str:
    """Fill the template."""
    data, chosen = page_data(run)
    size, tail = run.budget.block_size, run.context[-8:]  # enough for tokenizers that look at what stands before
    parts = [run.context[i : i + size] for i in range(0, len(run.context), size)]
    cards = [
        {
            "title": setting.title,
            "about": setting.about,
            "tokens": pieces(run.tokenizer, tail, [[token] for token in run.written[key].texts[0]]),
            "attention": results[key]["attention"],
        }
        for key, setting in run.settings.items()
    ]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("write.html").render(
        model=run.name,
        budget=run.budget,
        data=data,
        chosen=chosen,
        blocks=pieces(run.tokenizer, [], parts),
        author="".join(pieces(run.tokenizer, tail, run.author[:1])) if run.author else None,
        cards=cards,
        measures=MEASURES,
        results=results,
    )


def save(files: dict[Path, str]) -> None:
    """Write files, all of them or none."""
    folder = next(iter(files)).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as scratch:
        for path, text in files.items():
            Path(scratch, path.name).write_text(text, encoding="utf-8")
        for path in files:
            Path(scratch, path.name).replace(path)


def write_all(args: Arguments, model: Model, tokenizer: Tokenizer) -> Run:
    """Read the text, and continue it by every setting."""
    context, author = read_text(args, tokenizer)
    needed = len(context) + args.max_new_tokens
    positions = getattr(model.config, "max_position_embeddings", None) or needed
    if needed > positions:
        given = f"{len(context)} + {args.max_new_tokens}"
        raise ValueError(f"context and new tokens must fit into {positions} positions, got {given}; lower one of them")
    budget = SparseAttentionConfig.from_value(model.config.sparse_attention)
    print(f"reading {len(context)} tokens; each token attends to at most {budget.budget_blocks * budget.block_size}")
    if budget.covers(len(context)):
        print("the budget covers them all, so attention is dense: give a longer text or a smaller --sparse_attention")
    cache, states = read_context(model, context)
    settings = settings_from(args, states)
    written = {key: write(model, context, cache, setting, args) for key, setting in settings.items()}
    name = Path(args.model).name if args.model else "SmolLM2-135M-Instruct"
    return Run(name, tokenizer, budget, context, author, settings, written)


def measure_all(run: Run) -> dict[str, Any]:
    """Return the figures of the author, if known, and of every setting."""
    results: dict[str, Any] = (
        {"author": {"title": "Author", **measure(run.author, run.tokenizer)}} if run.author else {}
    )
    for key, one in run.written.items():
        shares = attention_shares(one, len(run.context), run.budget)[one.is_sparse]
        sink, chosen = shares.mean((0, 2)).tolist()
        attention = {"sink": sink, "local": max(1 - sink - chosen, 0.0), "chosen": chosen}
        values = {**measure(one.texts, run.tokenizer), "attention": attention, "seconds": round(one.seconds, 1)}
        results[key] = {"title": run.settings[key].title, **values, "text": run.tokenizer.decode(one.texts[0])}
    return results


def print_table(results: dict[str, Any]) -> None:
    """Print what was measured, author first."""
    rows = [
        [one["title"], *("-" if one[name] is None else f"{one[name]:.3f}" for name in MEASURES)]
        + [f"{share:.0%}" for share in one.get("attention", {}).values()]
        for one in results.values()
    ]
    print("\n" + tabulate(rows, ["", *MEASURES, "sink", "local", "chosen"], disable_numparse=True, stralign="right"))


def parse_arguments() -> Arguments:
    """Read the command line, and refuse what cannot work before anything is loaded."""
    parser = HfArgumentParser(Arguments, description=(__doc__ or "").split("\n")[0])
    try:
        return parser.parse_args_into_dataclasses()[0]
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    """Write, measure and save."""
    args = parse_arguments()
    page = Path(args.output)
    try:
        run = write_all(args, *load(args))
        results = measure_all(run)
        asked = {**asdict(args), "model": run.name, "context_tokens": len(run.context)}
        figures = {"run": {**asked, "sparse_attention": asdict(run.budget)}, "results": results}
        save({page: render(run, results), page.with_suffix(".json"): json.dumps(figures, indent=2) + "\n"})
    except (OSError, ValueError) as error:
        raise SystemExit(f"write.py: {' '.join(str(error).split())}") from error
    print_table(results)
    print(f"\n{page} ({page.stat().st_size / 1000:.0f} kB), {page.with_suffix('.json')}")


if __name__ == "__main__":
    main()
