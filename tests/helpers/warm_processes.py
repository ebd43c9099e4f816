"""Start processes in which torch and transformers are imported already, by forking them from a server process.

The server belongs to multiprocessing's start method "forkserver". It imports the modules once, and computes nothing.
"""

import gc
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path
from subprocess import CompletedProcess

import torch
from torch.distributed import TCPStore
from torch.multiprocessing import start_processes

PRELOADED = ["tests.conftest", "datasets", "peft", "torch.distributed.fsdp", "transformers.trainer"]


def run_two_processes(work: Callable[[str], None], folder: Path) -> None:
    """Call `work(folder)` in two processes of one group, as `torchrun` would, and raise the error of either process.

    The calls write to `folder` what they have found. If one process fails, the other one is terminated.
    """
    set_forkserver_preload(PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start_processes(_join, (store.port, work, str(folder)), nprocs=2, start_method="forkserver")


def _join(rank: int, port: int, work: Callable[[str], None], folder: str) -> None:
    """Set the environment variables that `torchrun` sets, and call `work`."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in (ranks | meeting).items()})
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    work(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def run_script(
    script: Path | str, arguments: list[str], environment: dict[str, str] | None = None, timeout: float = 400
) -> CompletedProcess[str]:
    """Run a file, or a module by its dotted name, with command-line arguments; return its exit status and output.

    `environment` is added to the environment of the caller; OpenMP and MKL get one thread.
    """
    set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})}
        process = get_context("forkserver").Process(target=_run, args=(script, arguments, streams, variables))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        output, errors = (path.read_text(encoding="utf-8") if path.exists() else "" for path in streams)
    return CompletedProcess([str(script), *arguments], process.exitcode or 0, output, errors)


def _run(script: Path | str, arguments: list[str], streams: list[Path], environment: dict[str, str]) -> None:
    """Run a script with the given environment and with its output in files, as in a fresh process."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    for name in [name for name in sys.modules if name.partition(".")[0] in ("examples", "tests")]:
        del sys.modules[name]
    torch.set_num_threads(1)
    gc.freeze()
    if isinstance(script, str):
        sys.argv = [script, *arguments]
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
