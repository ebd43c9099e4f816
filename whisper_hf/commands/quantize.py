"""Write a checkpoint with weights of 8 or 4 bits, and a report that compares it with its source.

Any causal language model will do. The target is written whole or not at all. If the source has a SHA256SUMS, its files
are verified first.

example:
  whisper-hf quantize smollm2-sparse smollm2-nf4 --recipe nf4-double --keep 0.045
"""

import argparse
import sys
from pathlib import Path

from ..checkpoint_io import check_source
from ..quantization.quantized_checkpoint import REPORT, SAMPLE, quantize
from ..quantization.recipes import RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("source", help="folder or Hub id of a causal language model")
    add("target", help="folder to write; it must not exist, or be empty")
    add("--recipe", required=True, choices=list(RECIPES), help="how to quantize")
    add(
        "--keep",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of weights, in the most sensitive layers, to leave as they are",
    )
    add("--dtype", default="auto", metavar="NAME", help="dtype of what is not quantized (default: %(default)s)")
    add("--device", metavar="NAME", help="where to quantize (default: the GPU, if there is one)")
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="file whose first tokens to measure on (default: a paragraph of a novel)",
    )
    add("--no-comparison", action="store_true", help="do not load the source for a comparison")
    add("--max-shard-size", default="50GB", metavar="SIZE", help="largest file of weights (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the source")


def run(options: argparse.Namespace) -> int:
    """Quantize the checkpoint, and return the exit status.

    Raises:
        ValueError: a source, recipe or option that is refused, or a target that holds something.
        OSError: the source or the text does not exist, or the target cannot be written.
        ImportError: no bitsandbytes, where the recipe needs it.
    """
    check_source(options.source)
    hub_kwargs = {"trust_remote_code": True} if options.trust_remote_code else {}
    text = options.text.read_text(encoding="utf-8") if options.text else SAMPLE
    report = quantize(
        options.source,
        options.target,
        options.recipe,
        keep=options.keep,
        dtype=options.dtype,
        device=options.device,
        text=None if options.no_comparison else text,
        max_shard_size=options.max_shard_size,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
        **hub_kwargs,
    )
    ratio = report["linear_weights"]["ratio_to_float32"]
    print(f"quantized {options.source} to {options.target}: linear weights take {ratio:.3f} of float32; see {REPORT}")
    return 0
