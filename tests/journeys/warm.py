"""Waits with everything imported and runs `mistudio` in a forked child for every line it reads.

Nothing is computed here before a fork, so that no thread of torch's exists that a child would miss.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

IMPORTS = (
    "mistudio.cli",
    "mistudio.jobs.kinds",
    "mistudio.engine.datasets.sources",
    "mistudio.engine.models.loading",
    "mistudio.engine.hub",
    "mistudio.engine.models.sample",
    "mistudio.engine.activations.store",
    "mistudio.engine.training.run",
    "mistudio.engine.features.discovery",
    "mistudio.engine.steering.generation",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
)


def child(request: dict[str, Any]) -> None:
    """Never returns: becomes the `mistudio` that was asked for."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            path = Path(request["folder"]) / name
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ["MISTUDIO_HOME"] = request["home"]
        if request["limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        sys.argv = ["mistudio", *request["arguments"]]
        from mistudio.__main__ import main

        code = main()
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(**values: int) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


def serve() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        answer(pid=pid)
        answer(status=os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    serve()
