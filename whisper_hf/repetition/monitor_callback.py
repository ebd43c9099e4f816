"""What a model writes while it trains, measured for repetition beside what people wrote: a callback for any Trainer.

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

BATCHES_TO_CHECK = 32  # for labels that say where a text ends, from the start


class DiversityCallback(TrainerCallback):
    """Logs how much the continuations of held-out text repeat themselves, beside those that people wrote.

    Before the first step, every `every` steps and after the last, prefixes are continued greedily and by nucleus
    sampling. Logged as `diversity/{greedy,sampled,data}_{seq_rep_4,looping_share,distinct_2,mean_tokens}`: ratios, see
    `whisper_hf.repetition.metrics`, and the mean length in tokens, as they are comparable at equal length alone. A
    ratio is left out while all continuations are too short for it (seq-rep-4: 4 tokens, distinct-2: 2 tokens). `data`
    is how the text itself goes on after these prefixes: to repeat less than that is as wrong as more. Some examples are
    printed.

    Training is the same with and without it. It also warns if texts end in the first batches but no label says so, as
    where padding is masked by an id that it shares with the end of text: a model that cannot stop goes round in loops.

    Example: `trainer.add_callback(DiversityCallback(trainer, held_out, every=200))`

    Args:
        trainer (`Trainer`): of any kind, with a causal language model; it logs, and its processes share the prefixes.
        held_out: rows of token ids, such as a `datasets.Dataset` with `input_ids`, that are not trained on.
        every (`int`): optimizer steps.
        rows (`int`): prefixes, the beginnings of the first rows that are long enough.
        prompt_tokens, new_tokens (`int`): of a prefix, and of a continuation that does not end before.
        top_p (`float`), temperature (`float`): of sampling; its seed comes from the Trainer's and the step.
        batch_size (`int`): prefixes that a process continues at once.
        samples (`int`): examples to print each time.
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
                "trainer must be a Trainer of a model that can generate, such as those of AutoModelForCausalLM, got "
                f"{type(trainer).__name__} with the model {model}"
            )
        least = {"every": 1, "rows": 1, "prompt_tokens": 1, "new_tokens": 4, "batch_size": 1, "samples": 0}
        given = (every, rows, prompt_tokens, new_tokens, batch_size, samples)
        for (name, smallest), value in zip(least.items(), given, strict=True):
            if not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name} must be an integer of {smallest} or more, got {value!r}")
        if not 0 < top_p <= 1 or not temperature > 0:
            raise ValueError(f"expected 0 < top_p <= 1 and temperature > 0, got {top_p=} and {temperature=}")
        self.trainer, self.every, self.batch_size, self.samples = trainer, every, batch_size, samples
        whole = _long_rows(held_out, rows, prompt_tokens, new_tokens)
        self.prefixes = [ids[:prompt_tokens] for ids in whole]
        self.continuations = [ids[prompt_tokens:] for ids in whole]
        nucleus = {"do_sample": True, "top_p": top_p, "temperature": temperature, "top_k": 0}
        self._decoding: dict[str, dict] = {"greedy": {"do_sample": False}, "sampled": nucleus}
        self._last_step = -1
        self._is_watching = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model that training starts from, and have the first batches checked."""
        if not self._is_watching:
            self._watch_batches()
        if state.global_step == 0:
            self._report(state.global_step, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at multiples of `every`, also after resuming."""
        if state.global_step % self.every == 0:
            self._report(state.global_step, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after the last step; when `on_train_end` comes, some loggers are closed."""
        if control.should_training_stop and state.global_step != self._last_step:
            self._report(state.global_step, control)

    def _report(self, step: int, control: Any) -> None:
        """Log and print, on the main process; all others take part."""
        self._last_step = step
        texts = self._write(step)
        should_log = control.should_log
        values = {f"{kind}_{name}": value for kind, rows in texts.items() for name, value in _measure(rows).items()}
        self.trainer.log({f"diversity/{name}": value for name, value in values.items()})
        control.should_log = should_log  # the Trainer takes any log for that of the loss, and would leave this out
        if self.trainer.is_world_process_zero():
            decode = getattr(self.trainer.processing_class, "decode", str)  # ids, without a tokenizer
            for row, prefix in enumerate(self.prefixes[: self.samples]):
                lines = [f"  {kind:>7}: {decode(rows[row])!r}" for kind, rows in texts.items()]
                tqdm.write("\n".join([f"[diversity, step {step}] {decode(prefix)!r}", *lines]))

    def _write(self, step: int) -> dict[str, list[list[int]]]:
        """Return the continuations of each kind, each up to its end of text."""
        model = self._model()
        length, ends = len(self.continuations[0]), end_tokens(model)
        texts = {}
        for kind, decoding in self._decoding.items():
            with _undisturbed(self.trainer, model), writing(model, max_new_tokens=length, **decoding):
                texts[kind] = self._continue_all(model, step)
        texts["data"] = self.continuations
        return {kind: [_up_to(ends, ids) for ids in rows] for kind, rows in texts.items()}

    def _continue_all(self, model: Any, step: int) -> list[list[int]]:
        """Share the batches among processes; each has its own seed, so any number of processes writes the same."""
        trainer, size = self.trainer, self.batch_size
        batches = [self.prefixes[first : first + size] for first in range(0, len(self.prefixes), size)]
        # under tensor parallelism, processes work on one and the same batch
        shares = trainer.accelerator.num_processes if trainer.get_tp_size() == 1 else 1
        written = {}
        for first in range(0, len(batches), shares):
            # all write equally often, the last batch again if need be: sharded weights are gathered by all together
            number = min(first + trainer.accelerator.process_index % shares, len(batches) - 1)
            prompts = torch.tensor(batches[number], device=trainer.accelerator.device)
            torch.manual_seed(step_seed(trainer.args.seed, step, number))
            rows = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                synced_gpus=trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or None,  # None: it finds out
            )
            written[number] = rows[:, prompts.shape[1] :].tolist()
        gathered = dict(gather_object(list(written.items())))
        return [ids for number in range(len(batches)) for ids in gathered[number]]

    def _model(self) -> Any:
        """Return the model without wrappers, but that of peft."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped, keep_torch_compile=False)

    def _watch_batches(self) -> None:
        """Have the first batches checked as they are trained on: the dataset and random states are left alone."""
        self._is_watching = True
        trainer, step, left = self.trainer, self.trainer.training_step, BATCHES_TO_CHECK

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
        """Say that the model does not learn to stop."""
        pad, ends = getattr(self.trainer.processing_class, "pad_token_id", None), end_tokens(self._model())
        logger.warning(
            f"texts of this batch end with an end-of-text token (one of {ends}), but no label is one, so the model "
            f"does not learn to stop, and goes round in loops instead. Often padding has the same id (here {pad}) and "
            "is masked by that: give the tokenizer a padding token of its own, or use a collator that sets labels to "
            "-100 where the attention mask is 0"
        )


def _is_end_hidden(batch: Any, ends: list[int]) -> bool | None:
    """Tell whether labelled texts end without a label for that, in `[B, T]` tensors; `None` where no text ends."""
    names = ("input_ids", "attention_mask", "labels")
    columns: list[Any] = [batch.get(name) for name in names] if isinstance(batch, Mapping) else [None]
    if not all(isinstance(column, Tensor) and column.shape == columns[0].shape for column in columns):
        return None
    ids, shown, labels = columns
    tokens = torch.tensor(ends, dtype=ids.dtype, device=ids.device)
    if torch.isin(labels, tokens).any():
        return False
    # an end after what is not learned, such as a question, need not be learned
    ended = torch.isin(ids[..., 1:], tokens) & shown[..., 1:].bool() & (labels[..., :-1] != IGNORED)
    return True if ended.any() else None


def _whole_root(model: Any) -> AbstractContextManager:
    """Gather what FSDP1 keeps at the root, such as embeddings; other models are left as they are."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False)


@contextmanager
def _undisturbed(trainer: Trainer, model: Any) -> Iterator[None]:
    """Run under the Trainer's precision, with all weights at hand, and leave the random states as they were."""
    device = trainer.accelerator.device
    used = {device, *(parameter.device for parameter in model.parameters())}
    randomness = torch.random.fork_rng([d for d in used if d.type == device.type != "cpu"], device_type=device.type)
    root = _whole_root(trainer.model_wrapped) if trainer.is_fsdp_enabled else nullcontext()
    with randomness, root, trainer.compute_loss_context_manager():
        yield


def _measure(rows: list[list[int]]) -> dict[str, float]:
    """Return the metrics for which some row is long enough."""
    longest, values = max(map(len, rows)), {}
    if longest >= 4:
        values["seq_rep_4"] = sequence_repetition(rows, 4)
    if longest >= 2:
        values["distinct_2"] = distinct(rows, 2)
    return {**values, "looping_share": looping_share(rows), "mean_tokens": sum(map(len, rows)) / len(rows)}


def _up_to(ends: list[int], ids: list[int]) -> list[int]:
    """Cut ids off before the first that ends a text; after it there is padding, which would be a loop."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _long_rows(held_out: Iterable, most: int, prompt_tokens: int, new_tokens: int) -> list[list[int]]:
    """Return the ids of the first rows that have enough, cut to that."""
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
        raise ValueError(f"rows of held_out must be token ids, or have them as input_ids, got {got}; tokenize it first")
    shown = example.get("attention_mask", [1] * len(ids))
    return [token for token, is_shown in zip(ids, shown, strict=True) if is_shown]
