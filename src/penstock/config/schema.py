"""Every setting of penstock, once: flags, YAML keys and environment twins are all generated from these dataclasses.

A field's flag is its name with dashes, its environment twin `PENSTOCK_` + name in capitals, its YAML key the name.
Parts are resolved once, frozen, and handed down: a room receives only its own part. Knows names, ranges and help
texts. Does not know how a value is read from a flag or a file (config.load), nor what the machine is (config.hardware).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def setting(default: Any, text: str, **extra: Any) -> Any:
    """A field with its help text, and what the generators need to know about it.

    extra:
        headline   True: shown by a plain `--help`
        choices    tuple of allowed strings
        synonyms   {other spelling: choice}
        low, high  allowed range of a number, both ends included; `above` excludes its end
        unit       "bytes" (accepts 512M, 4GiB), "tokens" (accepts 32k), "s", or any word for the table
        plain      what a number without a unit is counted in, where vLLM's flag does so: "GiB"
        auto       True: "auto" (and -1) means None, to be filled in from the model and the machine
        aliases    other flags with the same meaning, SGLang's mostly: ("--context-length",)
        off        flags that switch a bool off, besides `--no-...`
        mapping    True: a text that a file may also give as a mapping; then it is that mapping's JSON
        switch     (value of the bare flag, value of `--no-...`) for a setting with choices
        metavar    name of the value in the help text
        secret     True: never printed
        env        other environment variables that are honoured: {"VLLM_CPU_KVCACHE_SPACE": "GiB"}; the value is a
                   suffix that is put behind what the variable holds
    """
    return field(default=default, metadata={"help": text, **extra})


DTYPE_SYNONYMS = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
QUANTIZATIONS = ("auto", "none", "int8", "w8a8", "int4", "w4a8", "bf12")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "int8")
KV_DTYPE_SYNONYMS = {**DTYPE_SYNONYMS, "int8_per_token_head": "int8"}  # vLLM's name


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and in which form."""

    model: str = setting(
        "penstock-tiny", "model directory, or the name of a built-in model", headline=True, aliases=("--model-path",)
    )
    tokenizer: str | None = setting(
        None, "tokenizer directory; default: the model's", metavar="DIR", headline=True, aliases=("--tokenizer-path",)
    )
    served_model_name: tuple[str, ...] = setting(
        (), "names that requests may use; default: the model as given", metavar="NAME", headline=True
    )
    dtype: str = setting(
        "auto",
        "of weights and activations; auto: the checkpoint's, if this machine is fast with it",
        choices=DTYPES,
        synonyms=DTYPE_SYNONYMS,
        headline=True,
    )
    quantization: str = setting(
        "auto",
        "auto: what the checkpoint says; else quantize a plain one while loading: weights of 8 or 4 bits, activations "
        "bf16 (int8, int4) or 8 bits (w8a8, w4a8); bf12: the same bf16 weights in three quarters of the memory, "
        "lossless",
        choices=QUANTIZATIONS,
        synonyms={"None": "none", "null": "none", "compressed-tensors": "auto"},
        headline=True,
        aliases=("-q",),
    )
    max_model_len: int | None = setting(
        None,
        "longest prompt plus output in tokens; auto: what model and memory allow",
        auto=True,
        low=1,
        unit="tokens",
        headline=True,
        aliases=("--context-length",),
    )
    chat_template: str | None = setting(
        None, "file or text of a chat template; default: the model's", metavar="FILE", headline=True
    )
    trust_request_chat_template: bool = setting(
        False, "let requests bring their own chat template (rendered in a worker with limits)"
    )
    generation_config: str = setting(
        "auto",
        "where sampling defaults come from; auto: the checkpoint's generation_config.json, vllm: none of it",
        choices=("auto", "vllm"),
    )
    load_format: str = setting("auto", "how weights are read; dummy: random", choices=("auto", "stream", "dummy"))
    seed: int = setting(
        0,
        "of random weights (dummy) and of requests that give none when set by --seed",
        low=0,
        high=2**64 - 1,
        headline=True,
        aliases=("--random-seed",),
    )


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """KV cache."""

    block_size: int | None = setting(
        None,
        "tokens in a KV block; default 32 on CPU, 64 on GPU",
        auto=True,
        low=1,
        high=1024,
        unit="tokens",
        aliases=("--page-size",),
    )
    kv_cache_dtype: str = setting(
        "auto",
        "of the KV cache; auto: as the weights; int8: half the memory of bfloat16, a scale per token and head",
        choices=KV_DTYPES,
        synonyms=KV_DTYPE_SYNONYMS,
    )
    kv_cache_memory_bytes: int | None = setting(
        None,
        "memory for KV; accepts 512M, 4G; auto: from free memory",
        auto=True,
        low=1,
        unit="bytes",
        headline=True,
        env={"VLLM_CPU_KVCACHE_SPACE": "GiB"},
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "share of the device's memory that penstock may use (CPU: of free memory)",
        above=0.0,
        high=1.0,
        headline=True,
        aliases=("--mem-fraction-static",),
    )
    kv_offloading_size: int | None = setting(
        None,
        "host memory for KV that has left the device or may be used again; a number without a unit is in GiB",
        low=1,
        unit="bytes",
        plain="GiB",
        headline=True,
        aliases=("--hicache-size",),
    )
    kv_disk_path: str | None = setting(
        None, "directory for KV below host memory; it survives restarts", metavar="DIR", headline=True
    )
    kv_disk_size: int = setting(
        16 << 30, "what it may take; a number without a unit is in GiB", low=1, unit="bytes", plain="GiB"
    )
    kv_remote_url: str | None = setting(
        None,
        "KV below that, shared by machines: Redis or Valkey (redis://...), Mooncake Store (mooncake://HOST:PORT of its "
        "master), or another machine's pool (penstock://HOST:PORT)",
        metavar="URL",
        secret=True,
    )
    kv_pool_listen: str | None = setting(
        None,
        "let other machines load from this machine's host memory and disk, and write there (--kv-remote-url "
        "penstock://HOST:PORT); needs --cluster-secret",
        metavar="HOST:PORT",
    )
    kv_write_policy: str = setting(
        "write_through",
        "when a block goes to host memory: computed, asked for a second time, or about to leave the device",
        choices=("write_through", "write_through_selective", "write_back"),
        aliases=("--hicache-write-policy",),
    )
    kv_lower_write_policy: str = setting(
        "write_through_selective",
        "the same for disk and remote store",
        choices=("write_through", "write_through_selective", "write_back"),
    )
    kv_eviction_policy: str = setting(
        "auto",
        "who leaves a tier; auto: the policy that would have saved most time lately",
        choices=("auto", "lru", "lfu", "gdsf"),
    )
    enable_prefix_caching: bool = setting(
        True, "reuse KV of equal prompt beginnings", headline=True, off=("--disable-radix-cache",)
    )


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """What runs together."""

    max_num_seqs: int = setting(
        256, "requests that run at once", low=1, high=65536, headline=True, aliases=("--max-running-requests",)
    )
    max_num_batched_tokens: int = setting(
        2048,
        "tokens computed in one step",
        low=1,
        high=1 << 20,
        unit="tokens",
        headline=True,
        aliases=("--chunked-prefill-size",),
    )
    scheduling_policy: str = setting(
        "fcfs",
        "who goes first",
        choices=("fcfs", "priority", "sjf_aged"),
        headline=True,
        aliases=("--schedule-policy",),
    )
    max_queue_wait_s: float = setting(
        30.0, "a request that was ready this long is no longer overtaken", low=0.0, unit="s"
    )
    async_scheduling: str = setting(
        "auto",
        "plan the next step while one runs (depth 2)",
        choices=("auto", "on", "off"),
        switch=("on", "off"),
    )
    record_path: str | None = setting(None, "write every scheduler input to this file, for replay", metavar="FILE")


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Several engines behind one server."""

    data_parallel_size: int = setting(
        1,
        "engines that do both phases, each with its own copy of the model, behind one router",
        low=1,
        high=64,
        headline=True,
        aliases=("-dp", "--dp-size"),
    )
    pd: str | None = setting(
        None,
        "prefill and decode engines of their own on this machine: 1P1D, 2P2D, or a YAML file with settings for each "
        "role; default: one engine for both",
        metavar="xPyD",
        headline=True,
        mapping=True,
    )
    kv_link: str = setting(
        "auto",
        "how KV travels between engines; auto: shared memory on a machine, tcp between servers; nixl, mooncake: extras",
        choices=("auto", "shm", "tcp", "nixl", "mooncake"),
    )
    kv_link_mode: str = setting(
        "coalesced",
        "layers of KV in one message: as many as fill the link, one, or all",
        choices=("coalesced", "layerwise", "whole"),
    )
    kv_lease_s: float = setting(
        5.0, "a prompt's reservation is dropped when its prefill engine was silent so long", above=0.0, unit="s"
    )
    pd_min_tokens: int = setting(
        256,
        "prompts that lack fewer tokens after the cache's part are computed where they are decoded",
        low=0,
        unit="tokens",
    )
    engine_restarts: int = setting(
        5, "an engine that dies beside others is started again, at most so often within 5 minutes", low=0
    )
    engine_hang_s: float = setting(
        10.0,
        "an engine beside others that is silent so long is killed, and counts as dead; 0: never (for debuggers)",
        low=0.0,
        unit="s",
    )
    pd_max_short_output: int = setting(
        16, "answers of up to so many tokens are made where their prompt was computed; 0: never", low=0, unit="tokens"
    )
    pd_scaling: bool = setting(
        True, "engines change between prefill and decode when one role lacks what the other can spare"
    )
    route_policy: str = setting(
        "least_time",
        "which engine computes a prompt; least_time: by predicted time to the first token, caches counted",
        choices=(
            "least_time", "random", "round_robin", "least_loaded", "fewest_requests", "consistent_hash",
            "longest_match", "flexlb", "sglang", "dynamo", "preble", "mooncake",
        ),

    )  # fmt: skip
    decode_policy: str = setting(
        "remaining_slots",
        "which engine decodes",
        choices=("remaining_slots", "round_robin", "request_count", "kv_size", "flexlb"),
    )
    cluster_secret: str | None = setting(
        None, "what engines must know to speak to each other; default: a random one", secret=True, metavar="SECRET"
    )
    kv_role: str | None = setting(
        None,
        "this server hands prompts over to other servers, or takes them, as a proxy says in kv_transfer_params",
        choices=("prefill", "decode", "both"),
        synonyms={"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"},
    )
    cluster_host: str = setting(
        "127.0.0.1", "with --kv-role: the address of this machine at which other engines reach it", metavar="HOST"
    )
    kv_events_config: str | None = setting(
        None,
        "publish what the cache holds, for routers, in vLLM's form: "
        '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}',
        metavar="JSON",
        mapping=True,
    )


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """HTTP."""

    host: str = setting("127.0.0.1", "address to listen on", headline=True)
    port: int = setting(8000, "port to listen on; 0: any free one", low=0, high=65535, headline=True)
    api_key: tuple[str, ...] = setting(
        (),
        "keys that requests must carry; several are allowed",
        secret=True,
        metavar="KEY",
        headline=True,
        env={"VLLM_API_KEY": ""},
    )
    allowed_origins: tuple[str, ...] = setting(("*",), "CORS origins", metavar="ORIGIN", headline=True)
    allow_credentials: bool = setting(False, "CORS: allow credentials")
    root_path: str = setting("", "path prefix behind a proxy", metavar="PATH")
    ssl_keyfile: str | None = setting(None, "TLS key", metavar="FILE", headline=True)
    ssl_certfile: str | None = setting(None, "TLS certificate", metavar="FILE", headline=True)
    max_num_queued_reqs: int = setting(
        1024,
        "waiting requests above which new ones get 429",
        low=0,
        headline=True,
        aliases=("--max-queued-requests",),
    )
    max_body_bytes: int = setting(32 * 1024 * 1024, "largest request body; larger ones get 413", low=1024, unit="bytes")
    request_timeout_s: float | None = setting(
        None, "a request older than this is ended with an error", above=0.0, unit="s"
    )
    shutdown_timeout: float = setting(
        30.0, "seconds to finish running requests after SIGTERM", low=0.0, unit="s", headline=True
    )
    response_role: str = setting("assistant", "role of chat answers")
    enable_log_requests: bool = setting(
        False,
        "log each request's id, sizes and parameters (never its text)",
        headline=True,
        aliases=("--log-requests",),
    )
    disable_log_stats: bool = setting(False, "no periodic line of statistics", headline=True)
    metrics_prefix: str = setting("vllm", "prefix of Prometheus names", metavar="NAME")


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """The process: device, threads, what it says."""

    device: str = setting("auto", "where the model runs", choices=("auto", "cpu", "cuda"), headline=True)
    num_threads: int | None = setting(
        None,
        "threads for tensor work; auto: the cores this process may use",
        auto=True,
        low=1,
        high=1024,
        headline=True,
        env={"OMP_NUM_THREADS": ""},
    )
    cpu_kernels: str = setting(
        "auto",
        "what computes on the CPU: native kernels for an instruction set, or plain torch; auto: the best that is there",
        choices=("auto", "amx", "avx512_bf16", "avx512", "avx2", "torch"),
    )
    log_level: str = setting(
        "info", "how much is said", choices=("debug", "info", "warning", "error"), env={"VLLM_LOGGING_LEVEL": ""}
    )


@dataclass(frozen=True, slots=True)
class Config:
    """Everything, resolved. `origins`: field name -> (origin, note); origin is default, auto, model, file, env or flag.

    `warnings`: lines for people about settings that were accepted but change nothing, or look like typing errors.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    origins: dict[str, tuple[str, str]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


SECTIONS: dict[str, type[Any]] = {
    "model": ModelOptions,
    "cache": CacheOptions,
    "scheduler": SchedulerOptions,
    "server": ServerOptions,
    "runtime": RuntimeOptions,
    "cluster": ClusterOptions,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of one section, as the generators see it."""

    section: str
    name: str
    kind: str  # "str", "int", "float", "bool" or "list"
    optional: bool  # None is a value
    default: Any
    help: str
    extra: dict[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return "PENSTOCK_" + self.name.upper()

    @property
    def metavar(self) -> str:
        if "metavar" in self.extra:
            return str(self.extra["metavar"])
        if "choices" in self.extra:
            return "{" + ",".join(self.extra["choices"]) + "}"
        unit = {"bytes": "SIZE", "s": "SECONDS", "tokens": "TOKENS"}.get(self.extra.get("unit", ""))
        return unit or {"int": "N", "float": "X"}.get(self.kind, self.name.upper())


_KINDS = {"str": "str", "int": "int", "float": "float", "bool": "bool", "tuple[str, ...]": "list"}


def settings(sections: tuple[str, ...] = tuple(SECTIONS)) -> dict[str, Setting]:
    """Field name -> Setting, in the order of the schema. Names are unique over all sections."""
    found: dict[str, Setting] = {}
    for section in sections:
        for item in fields(SECTIONS[section]):
            written = str(item.type)
            plain = written.removesuffix(" | None")
            assert item.name not in found, f"two settings are called {item.name}"
            extra = dict(item.metadata)
            found[item.name] = Setting(
                section, item.name, _KINDS[plain], plain != written, item.default, extra.pop("help"), extra
            )
    return found
