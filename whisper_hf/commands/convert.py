"""Turn a dense checkpoint into a sparse WhisperLM, or back. The weights stay the same, bit for bit.

Llama, Mistral, Qwen2 and Qwen3 are supported. Tokenizer and generation config are carried along. The target is written
whole or not at all. If the source has a SHA256SUMS, its files are verified first.

example:
  whisper-hf convert HuggingFaceTB/SmolLM2-135M-Instruct smollm2-sparse --topk-blocks 16
"""

import argparse

from ..checkpoint_io import check_source
from ..conversion import convert_checkpoint
from ..model.configuration_whisper_lm import SparseAttentionConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("source", help="folder or Hub id of a dense checkpoint (with --to-dense: of a WhisperLM)")
    add("target", help="folder to write; it must not exist, or be empty")
    add("--to-dense", action="store_true", help="convert a WhisperLM back to its dense family")
    add("--max-shard-size", default="50GB", metavar="SIZE", help="largest file of weights (default: %(default)s)")
    sparse = parser.add_argument_group("sparse attention of every layer")
    defaults = SparseAttentionConfig()
    for name, text in (
        ("block_size", "tokens in a block"),
        ("topk_blocks", "blocks that each token and key-value head chooses among the blocks in between"),
        ("local_blocks", "most recent blocks that each token attends to, with its own"),
        ("sink_blocks", "first blocks that each token attends to"),
    ):
        flag, default = f"--{name.replace('_', '-')}", getattr(defaults, name)
        sparse.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Convert the checkpoint, and return the exit status.

    Raises:
        ValueError: a source or a setting that is refused, or a target that holds something.
        OSError: the source does not exist, or the target cannot be written.
    """
    check_source(options.source)
    sparse_attention = SparseAttentionConfig(**{name: getattr(options, name) for name in SparseAttentionConfig.MINIMUM})
    convert_checkpoint(
        options.source,
        options.target,
        sparse_attention,
        dense=options.to_dense,
        max_shard_size=options.max_shard_size,
    )
    print(f"converted {options.source} to {options.target}")
    return 0
