"""Run `transformers chat MODEL`, a conversation in the terminal, with a server of its own on a free port.

Options for the server come last, after `--`. With an address after the model, no server is started.

example:
  whisper-hf chat smollm2-sparse -- --device cuda

All other options are those of transformers:
"""

import argparse

from ..serving import chat


def run(options: argparse.Namespace) -> int:
    """Chat until the conversation is ended, and return the exit status.

    Raises:
        ImportError: the packages that serve are not installed.
        ValueError: no model, or an option that the model or the server does not have.
        OSError: the model does not exist, or the server could not be started.
    """
    chat(options.arguments)
    return 0
