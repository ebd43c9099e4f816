"""Training against loops in the model's own text, which stops where it repeats itself as often as people do.

Legend: `R` continuations of `L` tokens, of prefixes of `P` tokens; `B` rows of `T` tokens.
"""

import inspect
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..model.labels import IGNORED, documents_from_positions
from ..model.repetition_loss import without_adapter
from ..objectives.unlikelihood import repeated_ngrams, sequence_unlikelihood
from ..training.generation import continue_prompts
from ..training.seeds import step_seed
from .metrics import sequence_repetition

logger = logging.get_logger(__name__)

HALVINGS = 4  # a batch without documents long enough has its prefixes and continuations halved, at most so often


class SequenceUnlikelihoodCallback(TrainerCallback, ExportableState):
    """Adds to any Trainer: every few steps the model continues prefixes of the batch, and unlearns its loops.

    The gradient of `alpha * mean(-log(1 - p(x_t)))`, over tokens `x_t` of the n-grams that repeat within a greedy
    continuation, joins that of the step's loss, whatever this is (Welleck et al. 2019, https://arxiv.org/abs/1908.04319,
    where such steps take the place of others, without end). Here

        alpha = weight * max(0, 1 - human / own)

    with `own` the repetition (seq-rep-n) of the continuations, a running mean over the latest, and `human` that of the
    true ones, the mean over all: the share of repetition that people do not have. So it stops by itself.

    Prefixes are of one document, begin anywhere, and are continued where labels are: a prompt is never unlearnt. All
    processes do so in the same steps, and agree on `alpha`; resuming goes on exactly. `loops_own`, `loops_human` and
    `loops_alpha` are logged with the loss.

    Needs a model that can `generate`; not with DeepSpeed, FSDP version 1 or `nn.DataParallel`.

    Args:
        every (`int`): optimizer steps from one time to the next. A time costs about as much as generating `L` tokens.
        rows (`int`): `R`, for each process.
        prefix_tokens, new_tokens (`int`): `P` and `L`, halved where no document of the batch is long enough.
        ngram (`int`): tokens of an n-gram.
        weight (`float`): of the penalty beside the loss per token. Larger than 1 as it joins few steps.
        memory (`float`): in [0, 1), of the running mean from one time to the next.

    Raises:
        ValueError: unusable settings, or (when training begins) a way of training that it cannot join.
    """

    def __init__(
        self,
        every: int = 16,
        rows: int = 16,
        prefix_tokens: int = 32,
        new_tokens: int = 64,
        ngram: int = 4,
        weight: float = 4.0,
        memory: float = 0.9,
    ):
        counts = {"every": every, "rows": rows, "prefix_tokens": prefix_tokens, "ngram": ngram}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if new_tokens <= ngram or not weight > 0 or not 0 <= memory < 1:
            raise ValueError(
                f"expected new_tokens > ngram, weight > 0 and 0 <= memory < 1, got {new_tokens=}, {ngram=}, {weight=}, "
                f"{memory=}"
            )
        self.settings: dict[str, Any] = {**counts, "new_tokens": new_tokens, "weight": weight, "memory": memory}
        self.every, self.rows, self.ngram, self.weight, self.memory = every, rows, ngram, weight, memory
        self.prefix_tokens, self.new_tokens = prefix_tokens, new_tokens
        self.times, self.own, self.human = 0, 0.0, 0.0
        self._generator, self._is_due = torch.Generator(), False

    def state(self) -> dict[str, Any]:
        """Return what is saved in `trainer_state.json`."""
        return {"args": self.settings, "attributes": {"times": self.times, "own": self.own, "human": self.human}}

    @property
    def alpha(self) -> float:
        """The present weight of the penalty."""
        return self.weight * max(0.0, 1 - self.human / self.own) if self.own else 0.0

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Join the training, and go on where a checkpoint left off."""
        model = kwargs["model"]
        if args.deepspeed_plugin or args.n_gpu > 1 or isinstance(model, FullyShardedDataParallel):
            several = f"{args.n_gpu} devices of one process" if args.n_gpu > 1 else "FSDP version 1"
            got = "DeepSpeed" if args.deepspeed_plugin else several
            raise ValueError(f"{type(self).__name__} needs one device, DDP or FSDP version 2, got {got}")
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        for name, value in (saved or {}).get("attributes", {}).items():  # the Trainer restores only on demand
            setattr(self, name, value)
        self._scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        # before FSDP's own hook, which would find itself in the middle of another forward
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._hook.remove()

    def on_step_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide whether the first forward of this step is preceded by continuations."""
        self._is_due = state.global_step % self.every == 0
        self._generator.manual_seed(step_seed(args.seed, state.global_step, args.process_index))

    def on_log(
        self, args: Arguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Add to the line of the loss."""
        if "loss" in logs:
            values = {"loops_own": self.own, "loops_human": self.human, "loops_alpha": self.alpha}
            logs.update(values)
            state.log_history[-1].update(values)

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: tuple, batch: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.join(model, {"input_ids": args[0], **batch} if args else batch)

    def join(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Let the model continue prefixes of a batch, if it is time, and add the gradient of the penalty to the step's.

        It is called before each forward in training; by trainers that have hooks in the model then, before those.
        """
        if not self._is_due:
            return
        self._is_due = False
        if batch.get("input_ids") is None:
            raise ValueError(f"{type(self).__name__} continues input_ids, got a batch of {sorted(batch)}")
        prefixes, true = self._choose(batch)
        length = true.shape[1] or self.new_tokens
        shown = torch.ones_like(prefixes)
        own = continue_prompts(model, prefixes, shown, length, pad_token_id=0)
        self._measure(own["labels"][:, prefixes.shape[1] :], true)
        if not self.alpha:
            return
        targets = own["labels"][:, prefixes.shape[1] :]
        logits = _last_logits(model, own, targets.shape[1] + 1)[:, :-1]
        repeated = repeated_ngrams(targets, n=self.ngram).sum()
        alpha = self.alpha if true.shape[1] else 0.0
        penalty = alpha * sequence_unlikelihood(logits, targets, n=self.ngram).sum() / repeated.clamp(min=1)
        (penalty if self._scaler is None else self._scaler.scale(penalty)).backward()

    def _choose(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return prefixes (`[R, P]`) and how they truly went on (`[R, L]`; `[1, 0]` if the batch has no place)."""
        ids = batch["input_ids"]
        shown = torch.ones_like(ids) if batch.get("attention_mask") is None else batch["attention_mask"]
        labels = ids.masked_fill(shown == 0, IGNORED) if batch.get("labels") is None else batch["labels"]
        documents = documents_of(ids, shown, batch.get("position_ids"))
        for halving in range(HALVINGS):
            prefix, new = max(self.prefix_tokens >> halving, 1), self.new_tokens >> halving
            row, start = places(labels, documents, prefix, new)
            if new > self.ngram and len(row):
                chosen = torch.randperm(len(row), generator=self._generator)[: self.rows].to(row.device)
                columns = start[chosen, None] + torch.arange(prefix + new, device=ids.device)
                return ids[row[chosen, None], columns].split([prefix, new], dim=1)
        logger.warning_once(
            f"{type(self).__name__} found a batch without {prefix} tokens followed by {new} labelled ones of the same "
            "document, and left it out; make prefix_tokens and new_tokens smaller if your documents are short"
        )
        return ids[:1, :1], ids[:1, :0]  # other processes may wait for this one

    def _measure(self, own: Tensor, true: Tensor) -> None:
        """Update both measures of repetition, by continuations of all processes; pairs are cut to equal lengths."""
        pairs = [(mine[mine != IGNORED], theirs) for mine, theirs in zip(own, true, strict=True)]
        pairs = [(mine[: len(theirs)], theirs[: len(mine)]) for mine, theirs in pairs if len(mine) >= self.ngram]
        pairs = [pair for pair in pairs if len(pair[0]) >= self.ngram]
        sums = [sequence_repetition(texts, self.ngram) * len(pairs) for texts in zip(*pairs, strict=True)] or [0.0, 0.0]
        mine, theirs, count = reduce(torch.tensor([*sums, len(pairs)], device=own.device), "sum").tolist()
        if count:
            self.times += 1
            self.own += max(1 - self.memory, 1 / self.times) * (mine / count - self.own)
            self.human += (theirs / count - self.human) / self.times


def _last_logits(model: Any, batch: dict[str, Tensor], count: int) -> Tensor:
    """Return the logits of the last `count` tokens, `[R, count, V]`; most models compute no others."""
    base = without_adapter(model)
    accepts = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    options: dict[str, Any] = {"logits_to_keep": count} if accepts else {}
    shown = batch["attention_mask"]
    return model(batch["input_ids"], attention_mask=shown, use_cache=False, **options).logits[:, -count:]


def documents_of(ids: Tensor, shown: Tensor, position_ids: Tensor | None) -> Tensor:
    """Number the documents of each row, `[B, T]`; hidden tokens belong to none."""
    documents = torch.zeros_like(ids) if position_ids is None else documents_from_positions(position_ids)
    return documents.masked_fill(shown == 0, -1)


def places(labels: Tensor, documents: Tensor, prefix: int, new: int) -> tuple[Tensor, Tensor]:
    """Find where `prefix` tokens are followed by `new` labelled ones, all of one document.

    Args:
        labels (`[B, T]`, int64): -100 where none counts.
        documents (`[B, T]`, int64): ascending; -1 for tokens of none.

    Returns:
        row and first column of each place, `[N]`, int64.
    """
    starts = torch.arange(max(labels.shape[1] - prefix - new + 1, 0), device=labels.device)
    labelled = nn.functional.pad((labels != IGNORED).long().cumsum(1), (1, 0))
    fits = labelled[:, starts + prefix + new] - labelled[:, starts + prefix] == new
    first, last = documents[:, starts], documents[:, starts + prefix + new - 1]
    row, start = (fits & (first == last) & (first >= 0)).nonzero(as_tuple=True)
    return row, start
