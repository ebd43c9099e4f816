"""Run `transformers serve` and `transformers chat` with WhisperLM models and `masked_sparse` attention.

The server of transformers looks up the class of a model in the `transformers` module, which does not contain WhisperLM,
and it accepts only a fixed list of attention implementations. This file changes these two points and the texts of
errors; options, endpoints and answers remain those of transformers.
"""

import logging
import signal
import sys
import time
from typing import Any

import transformers
from huggingface_hub import constants
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, server
from transformers.cli.transformers import app
from transformers.utils.import_utils import is_serve_available

from .model.attention import MASKED_SPARSE
from .model.configuration_whisper_lm import WhisperLMConfig
from .model.modeling_whisper_lm import WhisperLMForCausalLM

PROGRAM = "whisper-hf"


class ModelManager(model_manager.ModelManager):
    """A model manager of transformers that also loads a WhisperLM, and any model with `masked_sparse` attention.

    Raises:
        ValueError: continuous batching of sparse attention, or an option that transformers' manager refuses.
        OSError: the model does not exist.
    """

    attn_implementation: str | None

    def __init__(self, *args: Any, continuous_batching: bool = False, **kwargs: Any) -> None:
        self.continuous_batching = (
            continuous_batching  # set first, since the constructor of the base class may load the model
        )
        super().__init__(*args, continuous_batching=continuous_batching, **kwargs)

    def _validate_args(self) -> None:
        requested = self.attn_implementation
        if requested == MASKED_SPARSE:  # the list of the base class does not contain registered names
            self.attn_implementation = None
        super()._validate_args()
        self.attn_implementation = requested

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        setattr(
            transformers, WhisperLMForCausalLM.__name__, WhisperLMForCausalLM
        )  # the base class looks there for the class of the model
        model = super()._load_model(*args, **kwargs)
        if self.continuous_batching and is_sparse(model.config):
            raise ValueError(
                f"continuous batching keeps keys and values in pages, got {type(model).__name__} with masked sparse "
                "attention, which cannot read them; leave out --continuous-batching, or serve a dense model "
                "(whisper-hf convert SOURCE TARGET --to-dense)"
            )
        return model

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """List the model to which the server is pinned, or else the models in transformers' cache."""
        if self.force_model is None:
            return model_manager.ModelManager.get_gen_models(cache_dir)
        return [{"id": self.force_model, "object": "model", "created": int(time.time()), "owned_by": ""}]


def is_sparse(config: PreTrainedConfig) -> bool:
    """Return whether the model of a config attends sparsely."""
    return config.model_type == WhisperLMConfig.model_type or config._attn_implementation == MASKED_SPARSE


def build_server(*args: Any, **kwargs: Any) -> Any:
    """Build the web application of transformers, with errors in the form that OpenAI's clients read.

    The arguments are those of `transformers.cli.serving.server.build_server`.
    """
    from fastapi import HTTPException, Request
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    async def explain(_: Request, error: Exception) -> JSONResponse:
        """Answer a request that failed with the error's message, and with its status or 400."""
        status = getattr(error, "status_code", 400)
        message = str(getattr(error, "detail", error))
        refusal = {"message": message, "type": "invalid_request_error"}
        return JSONResponse({"error": refusal, "detail": message}, status_code=status)

    api = _build_server(*args, **kwargs)
    # raised by: transformers' server; wrong options; models that do not exist; chat templates
    for kind in (HTTPException, ValueError, OSError, TemplateError):
        api.add_exception_handler(kind, explain)
    return api


_build_server = server.build_server


def serve(arguments: list[str]) -> None:
    """Run `transformers serve`.

    Args:
        arguments: the arguments of the command line after `serve`.

    Raises:
        ImportError: the packages for serving are not installed.
        ValueError: an option that the model or the server does not have.
        OSError: the model does not exist.
    """
    if not is_serve_available() and not {"-h", "--help"} & set(arguments):
        raise ImportError(
            "serving needs fastapi, uvicorn and openai, found not all of them; pip install 'whisper-hf[serving]'"
        )
    model_manager.ModelManager = ModelManager
    server.build_server = build_server
    app(["serve", *arguments], prog_name=PROGRAM)


def chat(arguments: list[str]) -> None:
    """Run `transformers chat` with a server in the same process, which ends with the chat.

    Args:
        arguments: the model; then the arguments of `transformers chat` without the server's address; then, after `--`,
            arguments of `serve`. If an address follows the model, no server is started.

    Raises:
        ImportError: the packages for serving are not installed.
        ValueError: no model is given, or an option that the model or the server does not have.
        OSError: the model does not exist, or the server could not be started.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    for_chat = arguments[:cut]
    for_server = arguments[cut + 1 :]
    has_address = len(for_chat) > 1 and for_chat[1].startswith(("http://", "https://"))
    if {"-h", "--help"} & set(for_chat) or has_address:
        app(["chat", *for_chat], prog_name=PROGRAM)
    elif not for_chat or for_chat[0].startswith("-"):
        raise ValueError(f"chat takes the model first, got {for_chat}; see {PROGRAM} chat --help")

    def converse(background: Serve) -> None:
        """Start the server in a thread, run the chat, and stop the server."""
        start_server(background)
        for signalled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signalled, _leave)
        logging.disable(logging.INFO)  # otherwise messages of the server would interrupt the chat
        constants.HF_HUB_OFFLINE = False  # the model is loaded; offline, the client could not reach this machine
        try:
            app(["chat", for_chat[0], _address(background), *for_chat[1:]], prog_name=PROGRAM)
        finally:
            background.kill_server()

    start_server = Serve.start_server
    Serve.start_server = converse  # called with --non-blocking
    serve([for_chat[0], "--host", "127.0.0.1", "--port", "0", "--log-level", "error", *for_server, "--non-blocking"])


def _leave(number: int, _: Any) -> None:
    """End the chat at a signal, whose number is given.

    With this handler asyncio does not install its own, which would ignore a first Ctrl-C while a line is being read.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _address(background: Serve) -> str:
    """Return the URL of the background server, after waiting until it has chosen its port."""
    while not background.server.started:
        if not background._thread.is_alive():
            raise OSError("the server ended before it began to listen; fix the error in its message above")
        time.sleep(0.02)
    host, port = background.server.servers[0].sockets[0].getsockname()[:2]
    return f"http://{host}:{port}/v1"
