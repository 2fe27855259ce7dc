"""The inside of a tool's process: reads requests, runs the tool, writes one JSON line for each.

python -m internvideo3.harness.agent.tools.worker MODULE

The tool is the module's `run(**arguments)`. What it prints goes to the error stream, so that a
talkative library cannot be taken for a reply. An exception is a reply too, with its message.
"""

import importlib
import json
import os
import sys
from typing import Any


def reply_to(line: str, run: Any) -> dict[str, Any]:
    """What the tool gives for a request, as JSON data."""
    try:
        return {"ok": True, "data": run(**json.loads(line))}
    except Exception as error:  # reported to the policy, which can do something else
        return {"ok": False, "error": type(error).__name__, "message": str(error)[:2000]}


def main(module: str) -> None:
    """Serve requests until the input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    run = importlib.import_module(module).run
    for line in sys.stdin:
        out.write(json.dumps(reply_to(line, run)) + "\n")
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1])
