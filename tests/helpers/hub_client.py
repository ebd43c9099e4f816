"""Run functions of the tests in a separate process that talks to a Hub.

huggingface_hub reads the address of the Hub when it is imported, so each address needs its own process.
"""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = """
import json, os, sys, traceback

requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
sys.stdin = open(os.devnull)  # a question on the terminal must fail, not wait
os.dup2(2, 1)  # the output of libraries must not mix with the answers

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "whisper_hf":
            raise ModuleNotFoundError(name)

if sys.argv[1] == "with the plugin":
    import whisper_hf
elif sys.argv[1] == "without the plugin":
    sys.meta_path.insert(0, Refuse())

space = {}
for line in requests:
    source, name, arguments = json.loads(line)
    exec(source, space)
    try:
        answer = {"returned": space[name](**arguments)}
    except BaseException as error:
        traceback.print_exc()
        answer = {"error": type(error).__name__, "message": str(error), "cause": repr(error.__cause__)}
    print(json.dumps(answer), file=answers, flush=True)
"""


class ClientError(Exception):
    """The error that a function raised in the other process: its class, message and cause."""


class HubClient:
    """A separate process that runs functions, as `client.run(function, name=value, ...)`.

    The source of a function is sent to the process. The function can use only what it imports, and functions that ran
    before in the same process. Arguments and results must be JSON.

    Args:
        url: address of the Hub.
        home: new folder for the caches and the messages of the process.
        plugin: `"with the plugin"`, `"without the plugin"` (importing it fails) or `"either"` (it is not imported).
        environment: environment variables to set, such as `HF_TOKEN`.
    """

    def __init__(self, url: str, home: Path, plugin: str, **environment: str) -> None:
        home.mkdir()
        own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.messages = home / "messages"
        with self.messages.open("w") as messages:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER, plugin],
                env={**inherited, "OMP_NUM_THREADS": "1", **own, **environment},
                cwd=home,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
            )

    def run(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Run a function in the process; return its result, or raise its error as a `ClientError`."""
        source = "from __future__ import annotations\n" + textwrap.dedent(inspect.getsource(function))
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([source, function.__name__, arguments]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.messages.read_text()
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(f"{answer['error']}: {answer['message']} ({answer['cause']})")
        return answer["returned"]

    def close(self) -> None:
        """Kill the process, which has nothing to clean up."""
        self.process.kill()
        self.process.communicate()
