"""Run a script on CPU processes as accelerate runs it on GPUs, to try a config where there are none.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 --mixed_precision no \\
        examples/accelerate/on_cpu.py examples/distill.py --max_steps 2

accelerate (1.15) shards on accelerators only: with `use_cpu` it replicates instead, and says nothing. Here it takes the
CPU for one of them, so that FSDP 2 is what runs.
"""

import os
import runpy
import sys

from accelerate.state import DistributedType, PartialState


def use_gloo() -> None:
    """Let accelerate start as on GPUs, with CPU tensors and gloo."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    use_gloo()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
