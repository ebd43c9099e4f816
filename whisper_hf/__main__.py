"""Commands of other tools, for the models and the attention of this package.

python -m whisper_hf serve MODEL
"""

import argparse
import importlib
import importlib.util
import sys

COMMANDS = {
    "serve": "`transformers serve MODEL`, an OpenAI-compatible server. Also takes --attn-implementation masked_sparse, "
    "for models of other kinds. One request is answered after the other: --continuous-batching is for dense models.",
    "chat": "`transformers chat MODEL`, a conversation in the terminal, with a server of its own on a free port. Give "
    "no address (with one no server is started), and options for the server last: chat MODEL -- --device cuda",
    "lm-eval": "the evaluation harness: lm-eval run --model hf --model_args pretrained=MODEL --tasks TASK",
}
EPILOG = """`COMMAND --help` lists what the tool takes.

More commands, with a --help of their own:
  python -m whisper_hf.conversion    dense checkpoints to WhisperLM and back
  python -m whisper_hf.quantization  quantized checkpoints
  python -m whisper_hf.distillation  a teacher's signals, stored
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m whisper_hf",
        description=(__doc__ or "").split("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    command, rest = parser.parse_args(arguments[:1]).command, arguments[1:]
    if rest[:1] in (["-h"], ["--help"]):
        print(f"{parser.prog} {command}: {COMMANDS[command]}\n")
    try:
        run(command, rest)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def run(command: str, arguments: list[str]) -> None:
    """Run a command with the arguments of its tool.

    Raises:
        ImportError: the tool is not installed.
        ValueError: what the tool or the model refuses.
        OSError: no such model.
    """
    if command != "lm-eval":
        getattr(importlib.import_module("whisper_hf.serving"), command)(arguments)
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("the evaluation harness is not installed; pip install 'whisper-hf[evaluation]'")
    sys.argv = ["lm-eval", *arguments]
    importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
