"""Train in processes that are killed at random moments, for `test_kills.py`; write `FOLDER/result.json`.

One process imports everything and forks the processes that train. They report their progress as events through a pipe,
and write each file in two halves, so that some are killed in the middle of a file.
"""

import gc
import json
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # imported before forking, as the Trainer imports it and that takes long
import torch
import transformers.modeling_utils
from datasets import load_dataset
from transformers import (
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from examples.support import resuming
from whisper_hf import PackedStream, convert_checkpoint, last_checkpoint

from ..conftest import LENGTH, tiny_model, tokens

KILLS, STEPS, SAVE_STEPS, ROWS_PER_STEP = 20, 44, 2, 4
Event = tuple[Any, ...]

fork = multiprocessing.get_context("fork")


class Reporter(TrainerCallback):
    """A callback that reports the rows of each training step, and when a checkpoint is complete."""

    def __init__(self, tell: Connection) -> None:
        self.tell = tell
        self.rows: list[int] = []

    def see(self, _: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Store the checksums of the rows of a forward pass."""
        self.rows += [zlib.crc32(row.numpy().tobytes()) for row in kwargs["input_ids"]]

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        model.register_forward_pre_hook(self.see, with_kwargs=True)
        self.tell.send(("begin", state.global_step))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.tell.send(("step", state.global_step, self.rows))
        self.rows = []

    def on_save(self, args, state, control, **kwargs) -> None:
        self.tell.send(("saved", state.global_step))


class DiskFills(TrainerCallback):
    """A callback that lets the third checkpoint fail as on a full disk.

    Args:
        limit: largest size of a file in bytes; `None` makes one of the files a link to a full device instead.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step != 3 * SAVE_STEPS - 1:
            return
        if self.limit:
            limit_files(self.limit)
        else:
            folder = Path(args.output_dir, f"checkpoint-{3 * SAVE_STEPS}")
            folder.mkdir()
            (folder / "optimizer.pt").symlink_to("/dev/full")


def limit_files(size: int) -> None:
    """Limit the files that this process writes to a size in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def write_in_halves(write: Callable, tell: Connection) -> Callable:
    """Wrap a function that writes a file: it writes two halves with a pause, and reports both."""

    def slow(content: Any, path: str, **options: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(content, Path(folder, "file"), **options)
            written = Path(folder, "file").read_bytes()
        with open(path, "wb") as file:
            file.write(written[: len(written) // 2])
            file.flush()
            tell.send(("half", Path(path).name))
            time.sleep(0.01)
            file.write(written[len(written) // 2 :])
        tell.send(("whole", Path(path).name))

    return slow


def make_trainer(folder: Path, output: Path, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    """Return a stock Trainer on a stream of packed documents, with noise, which needs the random state to resume."""
    args = TrainingArguments(
        str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        dataloader_num_workers=2,
        learning_rate=3e-3,
        neftune_noise_alpha=1.0,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        resume_from_checkpoint="last",
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = sorted(map(str, folder.glob("*.jsonl")))
    documents = load_dataset("json", data_files=files, split="train", streaming=True)
    return Trainer(
        model=tiny_model(initializer_range=0.02, num_hidden_layers=1),
        args=args,
        train_dataset=PackedStream(documents, tokenizer, args, row_tokens=LENGTH, shuffled=8),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def train(folder: Path, output: Path, tell: Connection) -> None:
    """Train from the last complete checkpoint to the end, unless the process is killed."""
    tell.send(("start",))
    torch.save = write_in_halves(torch.save, tell)
    transformers.modeling_utils.safe_save_file = write_in_halves(transformers.modeling_utils.safe_save_file, tell)
    TrainerState.save_to_json = write_in_halves(TrainerState.save_to_json, tell)
    trainer = make_trainer(folder, output, [Reporter(tell)])
    resuming.train(trainer)
    trainer.save_model()


def fill_disk(folder: Path, output: Path, tell: Connection, limit: int | None = None) -> None:
    """Train until a checkpoint cannot be written, and report the error."""
    try:
        resuming.train(make_trainer(folder, output, [DiskFills(limit)]))
    except OSError as error:
        tell.send(str(error))


def convert(source: Path, target: Path, tell: Connection, size: int) -> None:
    """Convert a checkpoint with a limit on the size of files, and report the error."""
    limit_files(size)
    try:
        convert_checkpoint(source, target)
    except OSError as error:
        tell.send(str(error))


@dataclass
class Story:
    """The history of a training over all its attempts.

    Attributes:
        lineage: checksums of the rows of step 1, 2, ..., for the steps from which the weights result.
        begun: the step from which each attempt has started or resumed.
        steps: number of steps that were trained, including steps that a kill has lost.
        in_save: number of kills while a checkpoint was being saved.
        in_file: number of kills with half of a file written.
        misleading: number of kills after which the newest checkpoint was not complete.
    """

    lineage: list[list[int]] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    steps: int = 0
    in_save: int = 0
    in_file: int = 0
    misleading: int = 0

    def add(self, told: list[Event]) -> None:
        """Add the events of an attempt."""
        for name, *event in told:
            if name == "begin":
                self.begun.append(event[0])
                del self.lineage[event[0] :]
            elif name == "step":
                assert event[0] == len(self.lineage) + 1
                self.lineage.append(event[1])
                self.steps += 1

    def add_kill(self, told: list[Event], output: Path) -> None:
        """Add the events of an attempt that was killed."""
        self.add(told)
        name, *event = told[-1]
        self.in_file += name == "half"
        self.in_save += name in ("half", "whole") or (name == "step" and event[0] % SAVE_STEPS == 0)
        newest = get_last_checkpoint(str(output)) if output.is_dir() else None
        self.misleading += newest != last_checkpoint(output)


def start(target: Callable, *args: Any) -> tuple[Any, Connection]:
    """Start a process, and return it with the connection through which it reports."""
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=target, args=(*args[:2], sender, *args[2:]))
    process.start()
    sender.close()
    return process, receiver


def told(receiver: Connection) -> Iterator[Event]:
    """Yield the remaining events of a process that has ended; its workers may still be running."""
    while receiver.poll():
        try:
            yield receiver.recv()
        except EOFError:
            return


def run(target: Callable, *args: Any) -> list[Event]:
    """Run a process to its end, and return its events."""
    process, receiver = start(target, *args)
    events = []
    while process.is_alive() or receiver.poll():
        try:
            events.append(receiver.recv())
        except EOFError:
            break
    process.join()
    assert process.exitcode == 0
    return events


def kill(chance: random.Random, folder: Path, output: Path) -> list[Event]:
    """Start a training, kill it at a random moment, often within a file, and return its events."""
    process, receiver = start(train, folder, output)
    moments = [("half", chance.randint(1, 12)), ("step", chance.randint(1, 5)), ("", chance.randint(1, 20))]
    kind, left = chance.choice(moments)
    events = []
    while left:
        events.append(receiver.recv())
        left -= events[-1][0].startswith(kind)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return [*events, *told(receiver)]


def main(folder: Path) -> None:
    """Train once without and once with kills, and then with full disks."""
    torch.set_num_threads(1)
    tiny_model()(
        tokens(), labels=tokens()
    ).loss.backward()  # imports modules that torch loads at first use, before forking
    gc.freeze()
    chance, whole, broken = random.Random(0), Story(), Story()
    for _ in range(KILLS):
        broken.add_kill(kill(chance, folder, folder / "broken"), folder / "broken")
    broken.add(run(train, folder, folder / "broken"))
    whole.add(run(train, folder, folder / "whole"))
    errors = {
        "device": run(fill_disk, folder, folder / "device"),
        "limit": run(fill_disk, folder, folder / "limit", 60_000),
        "conversion": run(convert, folder / "dense", folder / "sparse", 60_000),
    }
    found = {"whole": asdict(whole), "broken": asdict(broken), "errors": errors}
    (folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
