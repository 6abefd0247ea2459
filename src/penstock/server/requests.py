"""From the bytes of a body to a checked request: JSON, depth, types, unknown fields, sampling parameters.

Every function raises ApiError and nothing else, whatever the bytes are (fuzzed in tests/server/test_requests.py).
Does not know the model: lengths and token ids are checked where the vocabulary and the limit are known.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from penstock.core.request import ParamsError, SamplingParams
from penstock.server.errors import bad_request, clipped
from penstock.server.schema import ChatRequest, CompletionRequest, Sampling

log = logging.getLogger("penstock.server")

MAX_DEPTH = 64  # of arrays and objects inside each other: templates and validators walk them recursively
MAX_BRACKETS = 1_000_000  # opening ones, also inside strings: ten million tiny lists are a gigabyte of objects
MAX_PROMPTS = 512  # in one request
MAX_MESSAGES = 16_384
MAX_BAD_WORDS = 1000
MAX_STOP_CHARS = 4096  # of one stop string
_PIECES = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{\]}]', re.DOTALL)
_WHERE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_SAFE = re.compile(r"[^\x21-\x7e]+")
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")

Request = TypeVar("Request", bound=msgspec.Struct)
_logged: set[str] = set()


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object of bounded depth, in valid UTF-8."""
    if not body.strip():
        raise bad_request("the request body is empty; a JSON object is expected")
    num_brackets = body.count(b"[") + body.count(b"{")
    if num_brackets > MAX_BRACKETS:
        raise bad_request(f"the request body holds more than {MAX_BRACKETS} arrays and objects")
    if num_brackets > MAX_DEPTH and _is_deeper(body, MAX_DEPTH):
        raise bad_request(f"the request body nests deeper than {MAX_DEPTH} levels")
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise bad_request(f"the request body is not valid UTF-8: {error}") from None
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise bad_request(f"the request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("the request body must be a JSON object")
    return value


def _is_deeper(body: bytes, max_depth: int) -> bool:
    """Whether brackets outside strings nest deeper. Linear in the length, also for malformed input."""
    depth = 0
    for piece in _PIECES.finditer(body):
        first = body[piece.start()]
        if first in b"[{":
            depth += 1
            if depth > max_depth:
                return True
        elif first in b"]}":
            depth -= 1
    return False


def read_request(body: bytes, kind: type[Request]) -> tuple[Request, list[str]]:
    """The request and the names of fields that it has and we do not know."""
    raw = parse_object(body)
    fields = kind.__struct_fields__
    for name, value in raw.items():
        if type(value) is float and value.is_integer() and abs(value) < 2**53:
            raw[name] = int(value)  # some clients write 16.0; a field that is a float takes the int as well
    unknown = [name for name in raw if name not in fields]
    try:
        return msgspec.convert(raw, kind), unknown
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None


def _wrong_type(text: str) -> Exception:
    """msgspec's "Expected `int`, got `str` - at `$.n`" as an error that names the field."""
    where = _WHERE.search(text)
    if where is None:
        missing = re.search(r"missing required field `([^`]*)`", text)
        if missing is not None:
            return bad_request(f"{missing[1]} is required", missing[1])
        return bad_request(text)
    path = clipped(where[1])
    found = text[: where.start()]
    return bad_request(f"{path}: {found[0].lower()}{found[1:]}", path)


def warn_unknown(names: list[str]) -> str | None:
    """Text for X-Penstock-Warning about fields that change nothing, logged once per name; None without any."""
    if not names:
        return None
    shown = [_SAFE.sub("?", clipped(name, 64)) for name in names[:16]]
    for name in shown:
        if name not in _logged and len(_logged) < 1000:
            _logged.add(name)
            log.warning("a client sent the field %r, which this server does not know; it is ignored", name)
    return "ignored fields: " + ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def valid_request_id(text: str) -> bool:
    """Letters, digits and `._:-`, at most 128 characters: safe in headers, logs and URLs."""
    return _REQUEST_ID.fullmatch(text) is not None


def refuse_unsupported(request: Sampling) -> None:
    """Raise for what is asked and would silently not be done."""
    for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if getattr(request, name) is not None:
            raise bad_request(f"{name} is not supported yet", name, "not_supported")
    kind = "text" if request.response_format is None else request.response_format.get("type")
    if kind != "text":
        message = f"response_format of type {clipped(str(kind))!r} is not supported yet; only 'text' is"
        raise bad_request(message, "response_format", "not_supported")
    if request.use_beam_search:
        raise bad_request("use_beam_search is not supported", "use_beam_search", "not_supported")
    num_choices = 1 if request.n is None else request.n
    if request.best_of not in (None, num_choices):
        raise bad_request(f"best_of is not supported: leave it out, or equal to n ({num_choices})", "best_of")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is only allowed with stream: true", "stream_options")
    if request.bad_words is not None and len(request.bad_words) > MAX_BAD_WORDS:
        raise bad_request(
            f"bad_words may hold at most {MAX_BAD_WORDS} words, got {len(request.bad_words)}", "bad_words"
        )
    if any(len(word) > MAX_STOP_CHARS for word in request.bad_words or ()):
        raise bad_request(f"bad_words may have at most {MAX_STOP_CHARS} characters each", "bad_words")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise bad_request(f"stop strings may have at most {MAX_STOP_CHARS} characters", "stop")
    if isinstance(request, ChatRequest):
        if len(request.messages) > MAX_MESSAGES:
            raise bad_request(f"messages may hold at most {MAX_MESSAGES}, got {len(request.messages)}", "messages")
        if request.tool_choice not in (None, "none", "auto"):
            raise bad_request("tool_choice other than 'none' and 'auto' is not supported yet", "tool_choice")
        if request.modalities is not None and request.modalities != ["text"]:
            raise bad_request("modalities other than 'text' are not supported", "modalities", "not_supported")
        if request.top_logprobs is not None and not request.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        if request.add_generation_prompt and request.continue_final_message:
            raise bad_request("continue_final_message needs add_generation_prompt: false", "continue_final_message")
    elif isinstance(request, CompletionRequest) and request.suffix:
        raise bad_request("suffix is not supported: this server does not fill in the middle", "suffix", "not_supported")


def sampling_params(request: ChatRequest | CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """What the request asks for; `defaults` (from generation_config.json) where it is silent, then vLLM's own.

    Recognised defaults: temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens.
    """

    def choose(name: str, fallback: Any) -> Any:
        value = getattr(request, name)
        if value is not None:
            return value
        value = defaults.get(name)
        return fallback if value is None else value

    max_tokens = request.max_tokens
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            max_tokens = request.max_completion_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        logprobs = request.logprobs
    prompt_logprobs = request.prompt_logprobs
    if max_tokens is None:
        fallback = None if isinstance(request, ChatRequest) else 16
        max_tokens = defaults.get("max_new_tokens", fallback)
    if isinstance(request, CompletionRequest) and request.echo:
        if logprobs is not None and prompt_logprobs is None:
            prompt_logprobs = logprobs
        max_tokens = max_tokens or 1  # echo with max_tokens 0 scores the prompt; the sampled token is not shown
    try:
        return SamplingParams(
            n=1 if request.n is None else request.n,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=choose("repetition_penalty", 1.0),
            temperature=choose("temperature", 1.0),
            top_p=choose("top_p", 1.0),
            top_k=choose("top_k", 0),
            min_p=choose("min_p", 0.0),
            seed=request.seed,
            stop=() if request.stop is None else request.stop,  # type: ignore[arg-type]  # str and list are welcome
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=request.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=request.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=request.skip_special_tokens,
            spaces_between_special_tokens=request.spaces_between_special_tokens,
            include_stop_str_in_output=request.include_stop_str_in_output,
            logit_bias=_biases(request.logit_bias),
            allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
            bad_words=tuple(request.bad_words or ()),
            truncate_prompt_tokens=request.truncate_prompt_tokens,
            extra_args=request.vllm_xargs,
        )
    except ParamsError as error:
        raise bad_request(*_as_sent(request, error)) from None


def _as_sent(request: ChatRequest | CompletionRequest, error: ParamsError) -> tuple[str, str]:
    """The error in the words of the request: chat calls the number of best tokens top_logprobs."""
    param, message = error.param, str(error)
    if isinstance(request, ChatRequest):
        names = {"logprobs": "top_logprobs"}
        if request.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if param in names:
            message = message.replace(param, names[param], 1)
            param = names[param]
    return message, param


def _biases(logit_bias: dict[str, float] | None) -> dict[int, float] | None:
    if not logit_bias:
        return None
    biases: dict[int, float] = {}
    for key, bias in logit_bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise bad_request(f"logit_bias: {clipped(key)!r} is not a token id", "logit_bias")
        biases[int(key)] = bias
    return biases


def read_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion: a string, token ids, or a list of strings or of lists of token ids."""
    kinds = "a string, a list of token ids, or a list of either"
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise bad_request(f"prompt must be {kinds}", "prompt")
    if not prompt:
        raise bad_request("prompt is empty", "prompt")
    if all(type(item) is int for item in prompt):
        return [_token_ids(prompt, "prompt")]
    if len(prompt) > MAX_PROMPTS:
        raise bad_request(f"a request may have at most {MAX_PROMPTS} prompts, this one has {len(prompt)}", "prompt")
    prompts: list[str | list[int]] = []
    for index, item in enumerate(prompt):
        where = f"prompt[{index}]"
        if isinstance(item, str):
            prompts.append(item)
        elif isinstance(item, list):
            prompts.append(_token_ids(item, where))
        else:
            raise bad_request(f"{where} must be a string or a list of token ids", where)
    return prompts


def _token_ids(items: list[Any], where: str) -> list[int]:
    for index, item in enumerate(items):
        if type(item) is not int or not 0 <= item < 2**31:
            raise bad_request(f"{where}[{index}] is not a token id", where)
    return items
