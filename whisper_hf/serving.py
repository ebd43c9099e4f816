"""`transformers serve` and `transformers chat`, for models that they do not know by themselves.

Transformers' server looks a model's class up in the `transformers` module, where a WhisperLM is not, and takes only
attention implementations on a list of its own. All else is theirs: options, endpoints and answers.
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
    """Transformers' model manager, which also loads a WhisperLM, and any model with `masked_sparse` attention.

    Raises:
        ValueError: continuous batching of sparse attention, or what transformers' own refuses.
        OSError: no such model.
    """

    attn_implementation: str | None

    def __init__(self, *args: Any, continuous_batching: bool = False, **kwargs: Any) -> None:
        self.continuous_batching = continuous_batching  # set first: the model may be loaded on the next line
        super().__init__(*args, continuous_batching=continuous_batching, **kwargs)

    def _validate_args(self) -> None:
        requested = self.attn_implementation
        if requested == MASKED_SPARSE:  # the list that follows does not hold what is registered
            self.attn_implementation = None
        super()._validate_args()
        self.attn_implementation = requested

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        setattr(transformers, WhisperLMForCausalLM.__name__, WhisperLMForCausalLM)  # where the next line looks for it
        model = super()._load_model(*args, **kwargs)
        if self.continuous_batching and is_sparse(model.config):
            raise ValueError(
                f"continuous batching keeps keys and values in pages, got {type(model).__name__} with masked sparse "
                "attention, which cannot read them; leave out --continuous-batching, or serve a dense model "
                "(whisper-hf convert SOURCE TARGET --to-dense)"
            )
        return model

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """List the model that every request gets, if there is one, else the models in transformers' cache."""
        if self.force_model is None:
            return model_manager.ModelManager.get_gen_models(cache_dir)
        return [{"id": self.force_model, "object": "model", "created": int(time.time()), "owned_by": ""}]


def is_sparse(config: PreTrainedConfig) -> bool:
    """Tell whether a model attends sparsely."""
    return config.model_type == WhisperLMConfig.model_type or config._attn_implementation == MASKED_SPARSE


def build_server(*args: Any, **kwargs: Any) -> Any:
    """Build transformers' app, whose refusals then say why, in the form in which OpenAI's clients look for it."""
    from fastapi import HTTPException, Request
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    async def explain(_: Request, error: Exception) -> JSONResponse:
        status, message = getattr(error, "status_code", 400), str(getattr(error, "detail", error))
        refusal = {"message": message, "type": "invalid_request_error"}
        return JSONResponse({"error": refusal, "detail": message}, status_code=status)

    api = _build_server(*args, **kwargs)
    # transformers' own refusals, and those of options, of models that do not exist, of chat templates
    for kind in (HTTPException, ValueError, OSError, TemplateError):
        api.add_exception_handler(kind, explain)
    return api


_build_server = server.build_server


def serve(arguments: list[str]) -> None:
    """Run `transformers serve`.

    Args:
        arguments: those of the command line, after `serve`.

    Raises:
        ImportError: the packages that serve are not installed.
        ValueError: an option that the model or the server does not have.
        OSError: no such model.
    """
    if not is_serve_available() and not {"-h", "--help"} & set(arguments):
        raise ImportError("serving needs fastapi, uvicorn and openai; pip install 'whisper-hf[serving]'")
    model_manager.ModelManager, server.build_server = ModelManager, build_server
    app(["serve", *arguments], prog_name=PROGRAM)


def chat(arguments: list[str]) -> None:
    """Run `transformers chat` with a server of its own in this process, which ends with it.

    Args:
        arguments: the model, then those of transformers' command line but without the address; after `--` those of
            `serve`. With an address after the model no server is started.

    Raises:
        ImportError: the packages that serve are not installed.
        ValueError: no model, or an option that the model or the server does not have.
        OSError: no such model, or no server could be started.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, servers = arguments[:cut], arguments[cut + 1 :]
    if {"-h", "--help"} & set(own) or (own[1:] and own[1].startswith(("http://", "https://"))):
        app(["chat", *own], prog_name=PROGRAM)
    elif not own or own[0].startswith("-"):
        raise ValueError(f"chat takes the model first, got {own}; see {PROGRAM} chat --help")

    def converse(background: Serve) -> None:
        """Start the server in a thread, chat, and stop it."""
        start(background)
        for signalled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signalled, _leave)
        logging.disable(logging.INFO)  # the server's lines would stand between those of the chat
        constants.HF_HUB_OFFLINE = False  # all is loaded; offline, the client would not even talk to this machine
        try:
            app(["chat", own[0], _address(background), *own[1:]], prog_name=PROGRAM)
        finally:
            background.kill_server()

    start, Serve.start_server = Serve.start_server, converse  # which is called with --non-blocking
    serve([own[0], "--host", "127.0.0.1", "--port", "0", "--log-level", "error", *servers, "--non-blocking"])


def _leave(number: int, _: Any) -> None:
    # with a handler of one's own asyncio sets none, which would let a first Ctrl-C go by while a line is being read
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _address(background: Serve) -> str:
    """Wait until the server in the background has chosen its port."""
    while not background.server.started:
        if not background._thread.is_alive():
            raise OSError("the server ended before it began to listen; see its message above")
        time.sleep(0.02)
    host, port = background.server.servers[0].sockets[0].getsockname()[:2]
    return f"http://{host}:{port}/v1"
