"""The process that renders chat templates: a request from the socket on file descriptor 0, an answer, and again.

Started by server/chat.py by file path; imports only the standard library and jinja2. Knows no model, tokenizer or
HTTP, holds no secret, and may be killed at any moment. The Jinja environment is the one of `transformers`
(`utils/chat_template_utils.py`), so that a template gives the same text, with one difference: an attribute that the
sandbox forbids is an error at once, where Jinja's own sandbox prints nothing for it.

A message is 4 bytes of length (big-endian) and JSON. Request: template, variables (null: compile only), max_chars,
time_s. Answer: {"text": ...} or {"error": kind, "message": ...}, kinds as in server/chat.py's TemplateError.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import socket
import struct
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class RaisedByTemplate(jinja2.TemplateError):
    """The template called raise_exception."""


class TooLong(Exception):
    """The text passed the limit."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own form

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        text: str = caller()
        return text


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox; templates can neither change what they are given nor reach Python's insides."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise jinja2.exceptions.SecurityError(
            f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe."
        )


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may itself be a key
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold the underscored name {name!r}")


class Dict:
    """`dict(...)` and `dict.fromkeys(...)` without the class and its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML characters; templates of models expect plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise RaisedByTemplate(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def make_environment() -> Environment:
    """What every template is compiled in."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = Dict()
    environment.globals["namespace"] = Namespace
    return environment


def answer(request: dict[str, Any], compiled: Any) -> dict[str, Any]:
    """Render one request; `compiled` turns a template's text into a Jinja template. Never raises."""
    try:
        template = compiled(request["template"])
        if request["variables"] is None:
            return {"text": ""}
        blocks: list[str] = []
        num_left = request["max_chars"]
        for block in template.generate(**request["variables"]):
            num_left -= len(block)
            if num_left < 0:
                raise TooLong
            blocks.append(block)
        return {"text": "".join(blocks)}
    except RaisedByTemplate as error:
        return {"error": "raised", "message": str(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": "forbidden", "message": str(error)}
    except jinja2.UndefinedError as error:
        return {"error": "undefined", "message": str(error)}
    except TooLong:
        return {"error": "size", "message": f"the text is longer than {request['max_chars']} characters"}
    except MemoryError:
        return {"error": "memory", "message": "rendering needs too much memory"}
    except RecursionError:
        return {"error": "failed", "message": "nested too deeply"}
    except Exception as error:
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"}


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        part = connection.recv(min(num_bytes - len(data), 1 << 20))
        if not part:
            sys.exit(0)  # the server is gone
        data += part
    return bytes(data)


def main(max_memory_bytes: int) -> None:
    """Serve requests until the other side closes the socket. Says "ready" first: a message of length 0."""
    for number in (signal.SIGINT, signal.SIGTERM):  # to the whole group: the server's to hear, which drains
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=0)
    compiled = functools.lru_cache(maxsize=16)(make_environment().from_string)
    answer({"template": "{{ x.y }}", "variables": {}, "max_chars": 0}, compiled)  # late imports of Jinja, before limits
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.sendall(struct.pack(">I", 0))
    while True:
        (length,) = struct.unpack(">I", _receive(connection, 4))
        try:
            request = json.loads(_receive(connection, length).decode("utf-8", "surrogatepass"))
            # The server kills a process that takes too long. If the server is dead, the alarm does.
            signal.setitimer(signal.ITIMER_REAL, request["time_s"] + 1)
            result = answer(request, compiled)
            reply = json.dumps(result, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except MemoryError:
            reply = b'{"error": "memory", "message": "rendering needs too much memory"}'
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(struct.pack(">I", len(reply)) + reply)


if __name__ == "__main__":
    main(int(sys.argv[1]))
