"""`make pd-demo`: prefill and decode in processes of their own, as the official client sees them. Ends by itself.

Starts `penstock serve --pd 1P1D` on the built-in model, has a conversation with a long beginning, shows what was handed
over from the prefill to the decode engine, and that one engine says the same.
"""

from __future__ import annotations

import re
import sys
import time
import urllib.request

from openai import OpenAI

from penstock import LLM, SamplingParams
from penstock.bench.server_process import ServerProcess, StartFailed, running_server

MODEL = "penstock-tiny"
ARGUMENTS = (
    MODEL, "--pd", "1P1D", "--pd-min-tokens", "64", "--pd-max-short-output", "0",
    "--kv-cache-memory-bytes", "64M", "--disable-log-stats",
)  # fmt: skip
STORY = (
    "Here is a story. Once upon a time there was a little girl named Lily. She had a red ball and a small cat. Every "
    "day Lily and the cat went to the park. They ran, they jumped, and they played with the ball until the sun went "
    "down. One day the ball rolled under a big tree. The cat looked and looked, but it could not find the ball. "
) * 6
QUESTIONS = ("What did the cat do next?", "And what did Lily say?")
MAX_TOKENS = 60
COUNT_S = 10.0


def main() -> int:
    print(f"$ penstock serve {' '.join(ARGUMENTS)}", flush=True)
    try:
        with running_server(ARGUMENTS) as server:
            conversation = _talk(server)
        return _compare(conversation)
    except StartFailed as error:
        print(f"pd-demo: {error}", file=sys.stderr)
        return 1


def _talk(server: ServerProcess) -> list[dict[str, str]]:
    """Two questions, streamed; the whole conversation."""
    ready = server.ready_line()
    assert ready is not None
    print(f"ready after {ready[1].group(1)} s: a prefill engine and a decode engine behind {server.url}\n")
    messages: list[dict[str, str]] = []
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for number, question in enumerate(QUESTIONS):
            messages.append({"role": "user", "content": question if number else STORY + question})
            print(f"> {'a story, then: ' if not number else ''}{question}")
            began_s, first_s, text, usage = time.monotonic(), 0.0, "", None
            for chunk in client.chat.completions.create(
                model=MODEL, messages=messages, temperature=0, max_tokens=MAX_TOKENS, stream=True,
                stream_options={"include_usage": True},
            ):  # fmt: skip
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    first_s = first_s or time.monotonic() - began_s
                    text += choice.delta.content or ""
                    print(choice.delta.content or "", end="", flush=True)
            messages.append({"role": "assistant", "content": text})
            cached = usage.prompt_tokens_details.cached_tokens
            print(f"\n  {usage.prompt_tokens} prompt tokens ({cached} cached), first token after {first_s:.2f} s\n")
    handed, num_bytes = _handed_over(server)
    print(f"handed over: {handed:.0f} prompts, {num_bytes / 1e6:.1f} MB of KV, from prefill-0 to decode-0")
    if handed < 1:
        raise StartFailed("no prompt was handed over")
    return messages


def _handed_over(server: ServerProcess) -> tuple[float, float]:
    """Prompts and bytes, once the engines have told the server."""
    until_s = time.monotonic() + COUNT_S
    while True:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        found = (
            _sum(r'^penstock:handoff_prompts_total\{.*outcome="received".*\} (\S+)$', text),
            _sum(r"^penstock:kv_transfer_bytes_total\{.*\} (\S+)$", text),
        )
        if all(found) or time.monotonic() > until_s:
            return found
        time.sleep(0.1)


def _sum(pattern: str, text: str) -> float:
    """Over engines."""
    return sum(map(float, re.findall(pattern, text, re.M)))


def _compare(conversation: list[dict[str, str]]) -> int:
    """Whether one engine, in this process, gives the same answers."""
    with LLM(MODEL, kv_cache_memory_bytes="64M") as llm:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        for turn in range(1, len(conversation), 2):
            [output] = llm.chat(conversation[:turn], params, use_tqdm=False)
            if output.outputs[0].text != conversation[turn]["content"]:
                print(f"pd-demo: one engine says something else: {output.outputs[0].text!r}", file=sys.stderr)
                return 1
    print("one engine that does both says the same, word for word. Stopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
