"""A Trainer callback that measures how much a model repeats itself while it trains, beside human text.

Legend: `B` rows of `T` tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..model.labels import IGNORED
from ..training.generation import end_tokens, writing
from ..training.seeds import step_seed
from .metrics import distinct, looping_share, sequence_repetition

logger = logging.get_logger(__name__)

BATCHES_TO_CHECK = 32  # number of first batches in which labels of the end of text are searched


class DiversityCallback(TrainerCallback):
    """Log how much a model's continuations of held-out text repeat themselves, beside the text itself.

    The model continues prefixes greedily and by nucleus sampling: before the first step, every `every` steps, and after
    the last step. The callback logs `diversity/{greedy,sampled,data}_{seq_rep_4,looping_share,distinct_2,mean_tokens}`
    and prints some examples. The first three are ratios from `whisper_hf.repetition.metrics`. `mean_tokens` is the mean
    length in tokens, because ratios are comparable at equal length only. A ratio is left out while all continuations
    are too short for it (4 tokens for seq-rep-4, 2 tokens for distinct-2). `data` is the text that truly follows the
    prefixes: to repeat less than this text is as wrong as to repeat more.

    Training is the same with and without the callback. The callback also warns if texts of the first batches end, but
    no label is an end-of-text token. This happens if padding has the id of the end of text and is masked by its id. A
    model that does not learn to stop writes loops.

    Example: `trainer.add_callback(DiversityCallback(trainer, held_out, every=200))`

    Args:
        trainer (`Trainer`): any Trainer of a causal language model. It logs the values, and its processes share the
            prefixes.
        held_out: rows of token ids that are not trained on, such as a `datasets.Dataset` with `input_ids`.
        every (`int`): number of optimizer steps between two measurements.
        rows (`int`): number of prefixes, which are the beginnings of the first rows that are long enough.
        prompt_tokens (`int`): number of tokens of a prefix.
        new_tokens (`int`): largest number of tokens of a continuation, at least 4.
        top_p (`float`), temperature (`float`): the settings of nucleus sampling. Its seed depends on the Trainer's seed
            and on the step.
        batch_size (`int`): number of prefixes that a process continues at once.
        samples (`int`): number of examples to print each time.

    Raises:
        ValueError: an argument out of range, a model that cannot generate, or no held-out row that is long enough.
    """

    def __init__(
        self,
        trainer: Trainer,
        held_out: Iterable,
        every: int = 200,
        *,
        rows: int = 64,
        prompt_tokens: int = 32,
        new_tokens: int = 64,
        top_p: float = 0.95,
        temperature: float = 1.0,
        batch_size: int = 16,
        samples: int = 2,
    ) -> None:
        if not hasattr(getattr(trainer, "model", None), "generate"):
            model = type(getattr(trainer, "model", None)).__name__
            raise ValueError(
                "trainer must be a Trainer of a model that can generate, such as an AutoModelForCausalLM, got "
                f"{type(trainer).__name__} with the model {model}"
            )
        least = {"every": 1, "rows": 1, "prompt_tokens": 1, "new_tokens": 4, "batch_size": 1, "samples": 0}
        given = (every, rows, prompt_tokens, new_tokens, batch_size, samples)
        for (name, smallest), value in zip(least.items(), given, strict=True):
            if not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name} must be an integer of {smallest} or more, got {value!r}")
        if not 0 < top_p <= 1 or not temperature > 0:
            raise ValueError(f"expected 0 < top_p <= 1 and temperature > 0, got {top_p=} and {temperature=}")
        self.trainer = trainer
        self.every = every
        self.batch_size = batch_size
        self.samples = samples
        whole = _long_rows(held_out, rows, prompt_tokens, new_tokens)
        self.prefixes = [ids[:prompt_tokens] for ids in whole]
        self.continuations = [ids[prompt_tokens:] for ids in whole]
        nucleus = {"do_sample": True, "top_p": top_p, "temperature": temperature, "top_k": 0}
        self._decoding: dict[str, dict] = {"greedy": {"do_sample": False}, "sampled": nucleus}
        self._last_step = -1
        self._is_watching = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model before the first step, and start the check of the first batches."""
        if not self._is_watching:
            self._watch_batches()
        if state.global_step == 0:
            self._report(state.global_step, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after steps that are multiples of `every`, also in a resumed training."""
        if state.global_step % self.every == 0:
            self._report(state.global_step, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after the last step; `on_train_end` would be too late, because some loggers are closed then."""
        if control.should_training_stop and state.global_step != self._last_step:
            self._report(state.global_step, control)

    def _report(self, step: int, control: Any) -> None:
        """Measure on all processes, and log and print on the main process."""
        self._last_step = step
        texts = self._write(step)
        should_log = control.should_log
        values = {f"{kind}_{name}": value for kind, rows in texts.items() for name, value in _measure(rows).items()}
        self.trainer.log({f"diversity/{name}": value for name, value in values.items()})
        control.should_log = should_log  # any log resets it, and the Trainer would then not log the loss
        if self.trainer.is_world_process_zero():
            decode = getattr(self.trainer.processing_class, "decode", str)  # prints ids if there is no tokenizer
            for row, prefix in enumerate(self.prefixes[: self.samples]):
                lines = [f"  {kind:>7}: {decode(rows[row])!r}" for kind, rows in texts.items()]
                tqdm.write("\n".join([f"[diversity, step {step}] {decode(prefix)!r}", *lines]))

    def _write(self, step: int) -> dict[str, list[list[int]]]:
        """Return the continuations of each kind of decoding and of the data, cut off at the end of text."""
        model = self._model()
        length = len(self.continuations[0])
        ends = end_tokens(model)
        texts = {}
        for kind, decoding in self._decoding.items():
            with _undisturbed(self.trainer, model), writing(model, max_new_tokens=length, **decoding):
                texts[kind] = self._continue_all(model, step)
        texts["data"] = self.continuations
        return {kind: [_up_to(ends, ids) for ids in rows] for kind, rows in texts.items()}

    def _continue_all(self, model: Any, step: int) -> list[list[int]]:
        """Continue all prefixes, with the batches shared among processes.

        Each batch has its own seed, so the continuations do not depend on the number of processes.
        """
        trainer = self.trainer
        size = self.batch_size
        batches = [self.prefixes[first : first + size] for first in range(0, len(self.prefixes), size)]
        # under tensor parallelism, all processes work on the same batch
        shares = trainer.accelerator.num_processes if trainer.get_tp_size() == 1 else 1
        written = {}
        for first in range(0, len(batches), shares):
            # All processes generate equally often, because they gather sharded weights together. A process without a
            # batch of its own repeats the last batch.
            number = min(first + trainer.accelerator.process_index % shares, len(batches) - 1)
            prompts = torch.tensor(batches[number], device=trainer.accelerator.device)
            torch.manual_seed(step_seed(trainer.args.seed, step, "monitor", number))
            rows = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                synced_gpus=trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or None,  # None: `generate` decides
            )
            written[number] = rows[:, prompts.shape[1] :].tolist()
        gathered = dict(gather_object(list(written.items())))
        return [ids for number in range(len(batches)) for ids in gathered[number]]

    def _model(self) -> Any:
        """Return the model without wrappers other than peft's."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped, keep_torch_compile=False)

    def _watch_batches(self) -> None:
        """Wrap the Trainer's `training_step`, to check the first batches without reading the data set a second time."""
        self._is_watching = True
        trainer = self.trainer
        step = self.trainer.training_step
        left = BATCHES_TO_CHECK

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left:
                is_hidden = _is_end_hidden(inputs, end_tokens(self._model()))
                left = left - 1 if is_hidden is None else 0
                if is_hidden and trainer.is_world_process_zero():
                    self._warn()
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step

    def _warn(self) -> None:
        """Log a warning that the model does not learn to stop."""
        pad = getattr(self.trainer.processing_class, "pad_token_id", None)
        ends = end_tokens(self._model())
        logger.warning(
            f"texts of this batch end with an end-of-text token (one of {ends}), but no label is one, so the model "
            "does not learn to stop, and writes loops instead. A frequent cause is padding that has the same id (here "
            f"{pad}) and is masked by its id: give the tokenizer a padding token of its own, or use a collator that "
            "sets labels to -100 where the attention mask is 0"
        )


def _is_end_hidden(batch: Any, ends: list[int]) -> bool | None:
    """Return whether labelled texts of a batch end, but no label is an end-of-text token; `None` if no text ends.

    Args:
        batch: a mapping with `input_ids`, `attention_mask` and `labels`, `[B, T]` each; for other batches the result is
            `None`.
        ends: the end-of-text tokens.
    """
    names = ("input_ids", "attention_mask", "labels")
    columns: list[Any] = [batch.get(name) for name in names] if isinstance(batch, Mapping) else [None]
    if not all(isinstance(column, Tensor) and column.shape == columns[0].shape for column in columns):
        return None
    ids, shown, labels = columns
    tokens = torch.tensor(ends, dtype=ids.dtype, device=ids.device)
    if torch.isin(labels, tokens).any():
        return False
    # an end of text after a token without label, such as a question, need not be learned
    ended = torch.isin(ids[..., 1:], tokens) & shown[..., 1:].bool() & (labels[..., :-1] != IGNORED)
    return True if ended.any() else None


def _whole_root(model: Any) -> AbstractContextManager:
    """Gather the parameters that FSDP 1 keeps at the root, such as embeddings; other models do not change."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False)


@contextmanager
def _undisturbed(trainer: Trainer, model: Any) -> Iterator[None]:
    """Run a block under the Trainer's precision and with gathered weights, and restore the random states after it."""
    device = trainer.accelerator.device
    used = {device, *(parameter.device for parameter in model.parameters())}
    randomness = torch.random.fork_rng([d for d in used if d.type == device.type != "cpu"], device_type=device.type)
    root = _whole_root(trainer.model_wrapped) if trainer.is_fsdp_enabled else nullcontext()
    with randomness, root, trainer.compute_loss_context_manager():
        yield


def _measure(rows: list[list[int]]) -> dict[str, float]:
    """Compute the metrics of some texts; a metric is left out if all texts are too short for it."""
    longest = max(map(len, rows))
    values = {}
    if longest >= 4:
        values["seq_rep_4"] = sequence_repetition(rows, 4)
    if longest >= 2:
        values["distinct_2"] = distinct(rows, 2)
    return {**values, "looping_share": looping_share(rows), "mean_tokens": sum(map(len, rows)) / len(rows)}


def _up_to(ends: list[int], ids: list[int]) -> list[int]:
    """Cut ids off before the first end-of-text token, because the padding after it would count as a loop."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _long_rows(held_out: Iterable, most: int, prompt_tokens: int, new_tokens: int) -> list[list[int]]:
    """Return the ids of the first rows that are long enough, cut to `prompt_tokens + new_tokens`."""
    rows: list[list[int]] = []
    longest = 0
    for row in held_out:
        ids = _token_ids(row)
        longest = max(longest, len(ids))
        if len(ids) >= prompt_tokens + new_tokens:
            rows.append(ids[: prompt_tokens + new_tokens])
        if len(rows) == most:
            break
    if not rows:
        raise ValueError(
            f"held_out must have rows of prompt_tokens + new_tokens = {prompt_tokens} + {new_tokens} tokens, got "
            f"{longest} at most; join short texts, or ask for fewer tokens"
        )
    return rows


def _token_ids(row: Any) -> list[int]:
    """Return the ids of a row of held-out text, without padding."""
    example = row if isinstance(row, Mapping) else {"input_ids": row}
    ids: Any = example.get("input_ids")
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, list | tuple) or not all(isinstance(token, int) for token in ids):
        got = repr(ids)[:80] if "input_ids" in example else f"columns {sorted(example)}"
        raise ValueError(f"rows of held_out must be token ids, or have input_ids, got {got}; tokenize it first")
    shown = example.get("attention_mask", [1] * len(ids))
    return [token for token, is_shown in zip(ids, shown, strict=True) if is_shown]
