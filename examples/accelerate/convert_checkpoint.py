"""Convert a Trainer's checkpoint from the layout of one process or DDP to the layout of FSDP 2, or back.

    python examples/accelerate/convert_checkpoint.py runs/distill/checkpoint-20 runs/plain/checkpoint-20
    python examples/distill.py --output_dir runs/plain --resume_from_checkpoint last

A checkpoint of FSDP 2 becomes a checkpoint as one process or DDP saves it, and the reverse. The weights, the state of
the optimizer and the step do not change. Another number of processes needs no conversion in either layout. FSDP 2 must
save with `fsdp_state_dict_type: FULL_STATE_DICT`, as in `fsdp2.yaml`. For checkpoints of DeepSpeed, its own tool
`ds_to_universal.py` does this. The conversion needs memory for the weights and the state of the optimizer.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from whisper_hf.checkpoint_io import new_folder

PLAIN = {"optimizer.pt"}
FSDP = {"pytorch_model_fsdp.bin", "optimizer.bin"}


def renamed(state: dict, names: dict) -> dict:
    """Return the state of an optimizer with its parameters renamed, to names or numbers."""
    groups = [{**group, "params": [names[of] for of in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[of]: values for of, values in state["state"].items()}, "param_groups": groups}


def to_plain(source: Path) -> dict[str, dict]:
    """Return the files of the plain layout: the optimizer's state, with its parameters by number."""
    state = torch.load(source / "optimizer.bin", weights_only=True)
    names = [name for group in state["param_groups"] for name in group["params"]]
    return {"optimizer.pt": renamed(state, {name: number for number, name in enumerate(names)})}


def to_fsdp(source: Path) -> dict[str, dict]:
    """Return the files of the FSDP layout: the weights, and the optimizer's state with its parameters by name."""
    state = torch.load(source / "optimizer.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    trainer = Trainer(model, TrainingArguments(str(source), report_to="none", use_cpu=True))
    parameters = [parameter for group in trainer.create_optimizer().param_groups for parameter in group["params"]]
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {number: parameter.shape for number, parameter in enumerate(parameters)}
    trained = {number for group in state["param_groups"] for number in group["params"]}
    shapes = {number: set(shapes_of(values)) for number, values in state["state"].items()}
    if trained != set(expected) or any(found - {expected[number]} for number, found in shapes.items()):
        raise ValueError(
            f"expected the optimizer's state of all {len(expected)} parameters of a {type(model).__name__}, got "
            f"{len(trained)}, or other shapes; a run that trains a part of a model must keep its layout"
        )
    return {
        "pytorch_model_fsdp.bin": model.state_dict(),
        "optimizer.bin": renamed(state, {number: names[parameter] for number, parameter in enumerate(parameters)}),
    }


def shapes_of(values: dict) -> Iterator[torch.Size]:
    """Return the shapes of the tensors that an optimizer keeps for a parameter, without scalars."""
    return (value.shape for value in values.values() if torch.is_tensor(value) and value.ndim)


def convert(source: Path, target: Path) -> None:
    """Write the checkpoint in the other layout, completely or not at all.

    Raises:
        ValueError: a source that is not a checkpoint of a Trainer, or one that trains a part of a model; or a target
            that exists.
    """
    found = {path.name for path in source.iterdir()} if source.is_dir() else set()
    if not found >= {"model.safetensors", "trainer_state.json"} or not (found >= PLAIN or found >= FSDP):
        raise ValueError(
            f"expected a checkpoint of a Trainer with model.safetensors and {sorted(PLAIN)} or {sorted(FSDP)} in "
            f"{str(source)!r}, got {sorted(found)}; with FSDP 2, save with fsdp_state_dict_type: FULL_STATE_DICT"
        )
    files = to_plain(source) if found >= FSDP else to_fsdp(source)
    with new_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*PLAIN, *FSDP))
        for name, content in files.items():
            torch.save(content, folder / name)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="checkpoint of a Trainer, such as runs/distill/checkpoint-20")
    parser.add_argument("target", type=Path, help="new folder, such as runs/plain/checkpoint-20")
    options = parser.parse_args()
    try:
        convert(options.source, options.target)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
