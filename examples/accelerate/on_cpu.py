"""Run a script on CPU processes in the way in which accelerate runs it on GPUs, to try a config without GPUs.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 --mixed_precision no \\
        examples/accelerate/on_cpu.py examples/distill.py --max_steps 2

accelerate (1.15) shards models on accelerators only: with `use_cpu` it replicates them, without a message. This script
makes accelerate treat the CPU as an accelerator, so that FSDP 2 does shard.
"""

import os
import runpy
import sys

from accelerate.state import DistributedType, PartialState


def use_gloo() -> None:
    """Make accelerate start as on several GPUs, with tensors on the CPU and the gloo backend."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    use_gloo()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
