"""Flags of vLLM and SGLang that have no setting here: accepted if they change nothing, else refused with a reason.

Data alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """A flag of vLLM or SGLang without a setting here, so that nobody is left guessing.

    `harmless`: values that ask for what penstock does anyway; they are accepted with a warning line (none when
    `warn` is empty). "" stands for the bare flag. Any other value is refused, with `reason`.
    """

    flags: tuple[str, ...]
    harmless: tuple[str, ...] = ()
    reason: str = "not supported yet"
    warn: str = ""


_ONE = ("1",)
_LATER = "not supported yet: this version runs one rank on one machine"
_NO_SPEC = "not supported yet: this version does not speculate"
_NO_PD = "not supported; --pd 1P1D starts prefill and decode engines on this machine, --kv-role is for several servers"
_NO_MOE = "not supported yet: this version has no expert models"
_NO_LORA = "not supported yet: this version loads no adapters"
_NO_MEDIA = "not supported yet: this version takes text only"
_NO_TOOLS = "not supported yet: this version does not parse tool calls or reasoning"

FOREIGN: tuple[ForeignFlag, ...] = (
    ForeignFlag(("--tensor-parallel-size", "-tp", "--tp-size", "--tp"), _ONE, _LATER),
    ForeignFlag(("--pipeline-parallel-size", "-pp", "--pp-size"), _ONE, _LATER),
    ForeignFlag(("--data-parallel-size-local", "-dpl", "--dp"), _ONE, _LATER),
    ForeignFlag(("--data-parallel-start-rank", "--node-rank"), ("0",), _LATER),
    ForeignFlag(("--data-parallel-address", "--data-parallel-rpc-port", "--master-addr", "--master-port"), (), _LATER),
    ForeignFlag(("--dist-init-addr", "--headless"), (), _LATER),
    ForeignFlag(("--nnodes", "--api-server-count", "--decode-context-parallel-size", "--ep-size"), _ONE, _LATER),
    ForeignFlag(("--distributed-executor-backend",), ("mp", "uni"), _LATER),
    ForeignFlag(("--enable-expert-parallel", "--all2all-backend", "--enable-eplb", "--eplb-config"), (), _NO_MOE),
    ForeignFlag(("--ep-num-redundant-experts", "--enable-dp-attention"), ("0",), _NO_MOE),
    ForeignFlag(("--enable-dbo", "--enable-two-batch-overlap"), (), _LATER),
    ForeignFlag(("--speculative-config", "-sc", "--speculative-algorithm"), ("none", "None", "null"), _NO_SPEC),
    ForeignFlag(("--spec-method", "--spec-model", "--spec-tokens"), ("none", "0"), _NO_SPEC),
    ForeignFlag(
        ("--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens"), ("0",), _NO_SPEC
    ),
    ForeignFlag(("--kv-transfer-config", "--ec-transfer-config"), ("null", "{}"), _NO_PD),
    ForeignFlag(("--disaggregation-mode",), ("null",), _NO_PD),
    ForeignFlag(("--disaggregation-transfer-backend", "--disaggregation-bootstrap-port"), (), _NO_PD),
    ForeignFlag(
        ("--swap-space", "--cpu-offload-gb"), ("0",), "not supported; --kv-offloading-size keeps KV in host memory"
    ),
    ForeignFlag(("--kv-offloading-backend",), ("native",), "not supported; see --kv-disk-path and --kv-remote-url"),
    ForeignFlag(
        ("--enable-hierarchical-cache", "--hicache-ratio", "--hicache-storage-backend"),
        (),
        "not supported; --kv-offloading-size, --kv-disk-path and --kv-remote-url add tiers below the device",
    ),
    ForeignFlag(("--enable-lora", "--lora-modules", "--max-loras", "--max-lora-rank"), (), _NO_LORA),
    ForeignFlag(("--limit-mm-per-prompt", "--mm-processor-cache-gb"), ("0", "{}"), _NO_MEDIA),
    ForeignFlag(
        ("--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser", "--structured-outputs-config"),
        (),
        _NO_TOOLS,
    ),
    ForeignFlag(("--grammar-backend",), ("none",), "not supported yet: this version constrains no output"),
    ForeignFlag(("--otlp-traces-endpoint", "--enable-trace"), (), "not supported yet: this version sends no traces"),
    ForeignFlag(("--enable-sleep-mode", "--middleware", "--uds", "--ssl-ca-certs", "--grpc"), ()),
    ForeignFlag(
        ("--revision", "--download-dir", "--tokenizer-revision", "--code-revision"),
        (),
        "not supported: penstock downloads nothing; give the directory of a checkpoint",
    ),
    ForeignFlag(
        ("--trust-remote-code",), ("",), warn="--trust-remote-code changes nothing: penstock runs no checkpoint's code"
    ),
    ForeignFlag(("--enforce-eager", "--disable-cuda-graph"), ("",), warn="{flag} changes nothing: no graphs are used"),
    ForeignFlag(("--enable-chunked-prefill",), ("",)),
    ForeignFlag(
        ("--no-enable-chunked-prefill",),
        (),
        "not supported: prompts are always computed in chunks; raise --max-num-batched-tokens to make them whole",
    ),
    ForeignFlag(("--enable-metrics", "--disable-log-requests"), ("",)),
    ForeignFlag(("--performance-mode",), ("balanced",)),
    ForeignFlag(("--tokenizer-mode",), ("auto",)),
    ForeignFlag(("--skip-tokenizer-init",), ()),
)
