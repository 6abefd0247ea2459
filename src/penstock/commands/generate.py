"""`penstock generate`: complete prompts offline, in this process, without a server.

Knows where prompts come from and where texts go; `penstock.llm` does the work.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from penstock.commands.arguments import add_model, config_from, keyword_settings, parse_or_help
from penstock.config.flags import FlagParser
from penstock.config.values import ConfigError


def main(arguments: list[str]) -> int:
    parser = FlagParser(
        prog="penstock generate",
        description="Complete prompts offline. Without --prompt or --file, every line of the input is a prompt.",
        sections=("model", "cache", "scheduler", "runtime"),
    )
    add_model(parser)
    parser.add_argument("-p", "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument("--file", metavar="FILE", help='prompts, one a line; in a .jsonl file {"prompt": ...} a line')
    parser.add_argument("--chat", action="store_true", help="prompts are user messages: apply the chat template")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest output in tokens [64]")
    parser.add_argument("--temperature", type=float, default=None, metavar="X", help="0: the likeliest token [1]")
    parser.add_argument("--top-p", type=float, default=None, metavar="X", help="keep tokens of this much probability")
    parser.add_argument("--top-k", type=int, default=None, metavar="N", help="keep this many tokens")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="outputs per prompt [1]")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    parser.add_argument("--json", action="store_true", help="print a JSON object per prompt")
    parsed = parse_or_help(parser, arguments)
    if parsed is None:
        return 0
    config = config_from(parsed)  # before torch is imported: whatever is wrong is said at once
    for line in config.warnings:
        print(f"penstock: {line}", file=sys.stderr)
    prompts = parsed.prompt + (_read_prompts(parsed.file) if parsed.file or not parsed.prompt else [])
    if not prompts:
        raise ConfigError("no prompt was given")
    options: dict[str, Any] = {
        name: getattr(parsed, name) for name in ("temperature", "top_p", "top_k") if getattr(parsed, name) is not None
    }
    params = importlib.import_module("penstock.core.request").SamplingParams(
        n=parsed.n, max_tokens=parsed.max_tokens, stop=tuple(parsed.stop), ignore_eos=parsed.ignore_eos, **options
    )
    params.check()
    with importlib.import_module("penstock.llm").LLM(**keyword_settings(config)) as llm:
        progress = sys.stderr.isatty() and not parsed.json
        if parsed.chat:
            inputs = [[{"role": "user", "content": prompt}] for prompt in prompts]
            results = llm.chat(inputs, params, use_tqdm=progress)
        else:
            results = llm.generate(prompts, params, use_tqdm=progress)
    for prompt, result in zip(prompts, results, strict=True):
        print(_shown(prompt, result, as_json=parsed.json, continues=not parsed.chat))
    return 0


def _read_prompts(path: str | None) -> list[str]:
    """Lines of a file, or of standard input for None; empty ones are left out. Raises ConfigError."""
    if path is None:
        if sys.stdin.isatty():
            print("prompts, one a line; Ctrl-D ends them", file=sys.stderr)
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", "--file") from None
    lines = [line for line in lines if line.strip()]
    if not path.endswith(".jsonl"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f'line {number} of {path} is not {{"prompt": ...}}', "--file") from None
    return prompts


def _shown(prompt: str, result: Any, *, as_json: bool, continues: bool) -> str:
    """One prompt's outputs as text or as a JSON line."""
    if as_json:
        outputs = [{"text": out.text, "finish_reason": out.finish_reason} for out in result.outputs]
        num_tokens = sum(len(out.token_ids) for out in result.outputs)
        row = {"prompt": prompt, "prompt_tokens": len(result.prompt_token_ids), "output_tokens": num_tokens}
        return json.dumps({**row, "outputs": outputs}, ensure_ascii=False)
    return "\n".join((prompt if continues else f"> {prompt}\n") + out.text for out in result.outputs)
