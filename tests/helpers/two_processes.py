"""Start two processes of one job without importing torch and transformers in each: they are forked from a warm server."""

import os
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from pathlib import Path

import torch
from torch.distributed import TCPStore
from torch.multiprocessing import start_processes

PRELOADED = [  # imported once by the server of multiprocessing's start method "forkserver"
    "tests.helpers.distillation_processes",
    "tests.helpers.tensor_parallel_processes",
    "tests.repetition.test_monitor_callback",
    "tests.repetition.test_unlikelihood_callback",
    "torch.distributed.fsdp",
    "transformers.trainer",
]


def run_two_processes(work: Callable[[str], None], folder: Path) -> None:
    """Call `work(folder)` in two processes that know of each other as `torchrun` would tell them; raise what they raise.

    The calls write to `folder` what they have found. If one process fails, the other one is terminated.
    """
    set_forkserver_preload(PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start_processes(_enter, (store.port, work, str(folder)), nprocs=2, start_method="forkserver")


def _enter(rank: int, port: int, work: Callable[[str], None], folder: str) -> None:
    """Set the environment that `torchrun` sets, and work."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in (ranks | meeting).items()})
    torch.set_num_threads(1)
    work(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
