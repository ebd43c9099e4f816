"""One command line for everything in this package: `whisper-hf COMMAND`, or `python -m whisper_hf COMMAND`.

Python imports the package before it runs this module, so that even `whisper-hf --version` takes the time of
`import whisper_hf` (transformers and torch, but neither peft nor datasets). Beyond that only the chosen command is
imported.
"""

import argparse
import functools
import importlib
import sys

from . import __version__

PROGRAM = "whisper-hf"
CHECKPOINTS = {
    "convert": "turn a dense checkpoint into a sparse WhisperLM, or back",
    "quantize": "write a checkpoint with weights of 8 or 4 bits, and a report",
    "verify": "compare the weights of a checkpoint with its SHA256SUMS",
}
DISTILLATION = {
    "cache-signals": "store a teacher's predictions for a data set, to distil students from them",
}
TOOLS = {  # parse their arguments themselves, `--help` included
    "serve": "run `transformers serve`, an OpenAI-compatible server",
    "chat": "run `transformers chat`, a conversation in the terminal",
    "lm-eval": "run `lm-eval`, the evaluation harness",
}
GROUPS = {"checkpoints": CHECKPOINTS, "distillation": DISTILLATION, "other tools, for models of this package": TOOLS}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}  # each is a module of `commands`
EPILOG = """examples:
  whisper-hf convert HuggingFaceTB/SmolLM2-135M-Instruct smollm2-sparse
  whisper-hf quantize smollm2-sparse smollm2-nf4 --recipe nf4
  whisper-hf chat smollm2-nf4

`whisper-hf COMMAND --help` lists the options of a command."""
HELP_FORMAT = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=25)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; by default those of this process.

    Returns:
        The exit status: 0, or 1 where `verify` finds a fault. Bad input ends the process with status 2 and one line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = _parser().parse_args(arguments[:1]).command
    rest = arguments[1:]
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {command}", formatter_class=HELP_FORMAT)
    try:
        module = importlib.import_module(f"whisper_hf.commands.{command.replace('-', '_')}")
        parser.description = module.__doc__
        if command not in TOOLS:
            module.add_arguments(parser)
            return module.run(parser.parse_args(rest))
        parser.usage = f"{PROGRAM} {command} ... (`{PROGRAM} {command} --help` lists the options of the tool)"
        if rest[:1] in (["-h"], ["--help"]):
            print(module.__doc__)
        return module.run(argparse.Namespace(arguments=rest))
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the first word, whose help has a line for each command."""
    description = "Language models with masked sparse attention."
    for title, group in GROUPS.items():
        description += f"\n\n{title}:"
        for name, line in group.items():
            description += f"\n  {name:14} {line}"
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description=description,
        epilog=EPILOG,
        formatter_class=HELP_FORMAT,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
