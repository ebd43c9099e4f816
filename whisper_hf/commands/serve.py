"""Run `transformers serve MODEL`, an OpenAI-compatible server, for models of this package.

`--attn-implementation masked_sparse` serves any other model with sparse attention. Requests are answered one after the
other, because --continuous-batching is for dense models.

example:
  whisper-hf serve smollm2-sparse --port 8000

All options are those of transformers:
"""

import argparse

from ..serving import serve


def run(options: argparse.Namespace) -> int:
    """Run the server until it is stopped, and return the exit status.

    Raises:
        ImportError: the packages that serve are not installed.
        ValueError: an option that the model or the server does not have.
        OSError: the model does not exist.
    """
    serve(options.arguments)
    return 0
