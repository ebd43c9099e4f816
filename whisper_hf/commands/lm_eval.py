"""Run `lm-eval`, the evaluation harness, for models of this package.

`attn_implementation=masked_sparse` among the model's arguments evaluates any other model with sparse attention.

example:
  whisper-hf lm-eval run --model hf --model_args pretrained=smollm2-sparse --tasks examples/lm_eval

All options are those of the harness:
"""

import argparse
import importlib
import importlib.util
import sys


def run(options: argparse.Namespace) -> int:
    """Run the harness, and return the exit status.

    Raises:
        ImportError: the harness is not installed.
        ValueError: a task or model that it refuses.
        OSError: the model does not exist.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("the evaluation harness is not installed; pip install 'whisper-hf[evaluation]'")
    sys.argv = ["lm-eval", *options.arguments]
    importlib.import_module("lm_eval.__main__").cli_evaluate()
    return 0
