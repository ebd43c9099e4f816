"""Write a quantized checkpoint.

python -m whisper_hf.quantization SOURCE TARGET --recipe nf4
"""

import argparse
import sys
from pathlib import Path

from .quantized_checkpoint import REPORT, SAMPLE, quantize
from .recipes import RECIPES


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m whisper_hf.quantization", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("source", help="folder or Hub id of a causal language model")
    add("target", help="folder to write; must not exist, or be empty")
    add("--recipe", required=True, help=", ".join(RECIPES))
    add("--keep", type=float, default=0.0, help="share of weights, of the most sensitive layers, left as they are")
    add("--dtype", default="auto", help="of what is not quantized (default: %(default)s)")
    add("--device", help="where to quantize (default: the GPU, if there is one)")
    add(
        "--text",
        type=Path,
        help="file, on whose beginning to measure (default: a paragraph of a novel)",
    )
    add("--no-comparison", action="store_true", help="do not load the source to compare")
    add("--max-shard-size", default="50GB", help="largest file of weights (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the source")
    options = parser.parse_args(arguments)
    hub_kwargs = {"trust_remote_code": True} if options.trust_remote_code else {}
    try:
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
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    ratio = report["linear_weights"]["ratio_to_float32"]
    print(f"quantized {options.source} to {options.target}: linear weights take {ratio:.3f} of float32; see {REPORT}")


if __name__ == "__main__":
    main()
