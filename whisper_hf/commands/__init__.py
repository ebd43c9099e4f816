"""The commands of `whisper-hf`: each module is one command, and is imported only when that command runs.

A command that parses its own options has `add_arguments(parser)`; each has `run(options)`, which returns the exit
status. A command of another tool gets that tool's arguments as they are, in `options.arguments`. The docstring of a
module is the text of the command's `--help`.
"""
