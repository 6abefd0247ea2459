"""The configuration reference, written from the schema as Markdown: docs/configuration.md is its output, verbatim."""

from __future__ import annotations

from penstock.config.foreign import FOREIGN
from penstock.config.schema import SECTIONS, Setting, settings
from penstock.config.values import format_value

INTRODUCTION = """# Configuration

<!-- Written by `make docs` from src/penstock/config/schema.py; do not edit. -->

Every setting is a flag of `penstock serve`, a key of the YAML file given with `--config`, an environment variable and
a keyword argument of `LLM(...)`. Names are vLLM's where vLLM has the setting; dashes and underscores are the same.

When a setting comes from several places, the first of these wins: flag (or keyword argument), environment, file, the
model's files, automatic choice, default. `penstock serve` prints what it settled on and where each value came from;
`penstock plan MODEL` shows what that means for memory, without loading anything.

```yaml
# penstock serve --config serve.yaml
model: /models/qwen3-0.6b
max-model-len: 32k
api-key: [first-key, second-key]
```

Sizes accept `512M`, `4G`, `4GiB` (powers of 1024) and `4GB`, `512m` (powers of 1000); token counts accept `32k`
(32,000) and `32K` (32,768); `auto` leaves a value to the model and the machine. Secrets are never printed.
"""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    known = settings()
    for section, kind in SECTIONS.items():
        title = (kind.__doc__ or section).split("\n")[0].rstrip(".")
        rows = [_row(item) for item in known.values() if item.section == section]
        parts.append(
            f"## {title}\n\n| Flag | Values | Default | Meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    parts.append(_environment(known))
    parts.append(_foreign())
    return "\n".join(parts)


def _row(item: Setting) -> str:
    flags = [f"`{item.flag}`"]
    if item.kind == "bool" or "switch" in item.extra:
        flags.append(f"`--no-{item.flag[2:]}`")
    flags += [f"`{alias}`" for alias in (*item.extra.get("aliases", ()), *item.extra.get("off", ()))]
    return f"| {' '.join(flags)} | {_values(item)} | {format_value(item, item.default)} | {_cell(item.help)} |"


def _values(item: Setting) -> str:
    extra = item.extra
    if "choices" in extra:
        return ", ".join(f"`{choice}`" for choice in extra["choices"])
    words = {"bool": "yes or no", "list": "texts", "str": "text", "int": "whole number", "float": "number"}
    text = {"bytes": "size", "s": "seconds", "tokens": "tokens"}.get(extra.get("unit", ""), words[item.kind])
    if "low" in extra and "high" in extra:
        text += f", {extra['low']:,} to {extra['high']:,}"
    elif "low" in extra and extra["low"] > 0:
        text += f", at least {extra['low']:,}"
    elif "above" in extra:
        text += f", above {extra['above']:g}" + (f", at most {extra['high']:g}" if "high" in extra else "")
    return text + (", `auto`" if extra.get("auto") else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _environment(known: dict[str, Setting]) -> str:
    lines = [
        "## Environment",
        "",
        "The variable of a setting is `PENSTOCK_` and its name in capitals (`PENSTOCK_MAX_NUM_SEQS`); lists are",
        "separated by commas. Also read, when penstock's own variable is not set:",
        "",
    ]
    for item in known.values():
        for variable, suffix in item.extra.get("env", {}).items():
            lines.append(f"- `{variable}`{f' (in {suffix})' if suffix else ''} for `{item.flag}`")
    lines += [
        "",
        "`PENSTOCK_CONFIG` names the YAML file, `PENSTOCK_DEBUG=1` shows tracebacks. A variable that begins with",
        "`PENSTOCK_` and means nothing is named in a warning.",
        "",
    ]
    return "\n".join(lines)


def _foreign() -> str:
    lines = [
        "## Flags of vLLM and SGLang that are not settings here",
        "",
        "They are refused with a reason, so that nothing is silently ignored; a value that asks for what penstock does",
        "anyway is accepted.",
        "",
        "| Flags | Accepted | Otherwise |",
        "|---|---|---|",
    ]
    for entry in FOREIGN:
        accepted = ", ".join(f"`{value}`" if value else "the bare flag" for value in entry.harmless) or "nothing"
        otherwise = "" if entry.harmless == ("",) else entry.reason
        lines.append(f"| {' '.join(f'`{flag}`' for flag in entry.flags)} | {accepted} | {_cell(otherwise)} |")
    return "\n".join(lines) + "\n"
