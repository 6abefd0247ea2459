"""`python serve_scripted.py OPTIONS_JSON`: run_server with a scripted engine in a process of its own.

Options: those of ServerOptions, and `step_s` (seconds per engine step), `start_s` (seconds the engine takes to start),
`look_s` (seconds between the server's looks at it), `break` ("load": the texts do not load; "launch": the engine does
not start). Exits with the server's code; a ConfigError is one line and code 2.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

from tests.server.tiny_model import MODEL, tiny_served

import penstock.server.serve
from penstock.config.schema import Config, ModelOptions, ServerOptions
from penstock.config.values import ConfigError
from penstock.server.backend import OneEngine
from penstock.server.serve import run_server
from penstock.server.state import Served

ENGINE = Path(__file__).with_name("scripted_engine.py")


def main() -> int:
    options = json.loads(sys.argv[1])
    step_s, start_s, broken = options.pop("step_s", 0.002), options.pop("start_s", 0.0), options.pop("break", "")
    penstock.server.serve.LOOK_S = options.pop("look_s", penstock.server.serve.LOOK_S)
    config = Config(model=ModelOptions(served_model_name=(MODEL,)), server=ServerOptions(**options))

    def launch(address: str) -> subprocess.Popen[bytes]:
        if broken == "launch":
            raise ValueError("there is no such engine")
        return subprocess.Popen([sys.executable, str(ENGINE), address, str(step_s), str(start_s)])

    def load() -> Served:
        if broken == "load":
            raise ValueError("there is no such tokenizer")
        return tiny_served()

    try:
        return run_server(config, OneEngine(launch), load)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    sys.exit(main())
