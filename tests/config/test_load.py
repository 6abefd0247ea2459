"""Where a value comes from: precedence, origins, other engines' settings, models by name."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from penstock.config.foreign import FOREIGN
from penstock.config.load import (
    config_rows,
    first_api_key,
    model_directory,
    print_config,
    read_config_file,
    resolve,
)
from penstock.config.schema import settings
from penstock.config.values import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_stand_and_say_so() -> None:
    config = resolve(environ={})
    assert config.server.port == 8000
    assert config.origins["port"] == ("default", "")
    assert config.server.api_key == ()
    assert config.model.served_model_name == ("penstock-tiny",)
    assert config.warnings == ()


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "port: 1\nhost: file\nmax-num-seqs: 7\n--dtype: float32\n")
    environ = {"PENSTOCK_PORT": "2", "PENSTOCK_HOST": "env"}
    config = resolve({"port": "3"}, config_file=file, environ=environ)
    assert (config.server.port, config.server.host, config.scheduler.max_num_seqs) == (3, "env", 7)
    assert config.model.dtype == "float32"
    assert config.origins["port"] == ("flag", "--port")
    assert config.origins["host"] == ("env", "PENSTOCK_HOST")
    assert config.origins["max_num_seqs"] == ("file", str(file))
    assert config.origins["seed"] == ("default", "")


def test_every_setting_can_be_set_by_environment_and_file_and_shown(tmp_path: Path) -> None:
    """The twins are generated; this proves that none of them is out of reach."""
    samples = {"str": "text", "int": 16, "float": 0.5, "bool": True, "list": "a,b"}
    for name, item in settings().items():
        value = item.extra["choices"][-1] if "choices" in item.extra else samples[item.kind]
        value = max(value, item.extra["low"]) if "low" in item.extra else value
        values = {name: value}
        if name.startswith("ssl"):
            values |= {"ssl_keyfile": "k", "ssl_certfile": "c"}
        if name == "max_num_batched_tokens":
            values |= {"max_num_seqs": 1}
        environ = {settings()[key].env: str(v) for key, v in values.items()}
        lines = "\n".join(f"{key}: {v}" for key, v in values.items())
        by_env = resolve(environ=environ)
        by_file = resolve(config_file=write(tmp_path / "c.yaml", lines), environ={})
        for config, origin in ((by_env, "env"), (by_file, "file")):
            assert config.origins[name][0] == origin
            assert (name, origin) in [(row[0], row[2].split(":")[0]) for row in config_rows(config)]
        assert getattr(by_env, item.section) == getattr(by_file, item.section)


def test_environment_names_of_vllm_are_honoured() -> None:
    environ = {"VLLM_API_KEY": "k", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "DEBUG"}
    config = resolve(environ=environ)
    assert config.server.api_key == ("k",)
    assert config.cache.kv_cache_memory_bytes == 4 << 30
    assert config.runtime.log_level == "debug"
    assert resolve(environ=environ | {"PENSTOCK_API_KEY": "own"}).server.api_key == ("own",)
    assert first_api_key({"VLLM_API_KEY": "a,b"}) == "a"
    assert first_api_key({}) is None


def test_a_misspelt_environment_variable_is_named() -> None:
    config = resolve(environ={"PENSTOCK_MAX_MODEL_LN": "5", "PENSTOCK_DEBUG": "1", "PENSTOCK_PORT": ""})
    assert config.warnings == ("PENSTOCK_MAX_MODEL_LN is no setting of penstock; did you mean PENSTOCK_MAX_MODEL_LEN?",)
    assert config.origins["port"][0] == "default"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_num_seq: 5", "max_num_seq in {file}: unknown setting; did you mean max_num_seqs?"),
        ("port: high", "port in {file}: 'high' is not a whole number from 0 to 65535"),
        ("- a\n- b", "must hold settings"),
        ("a: [", "not valid YAML"),
        ("tensor-parallel-size: 2", "tensor-parallel-size in {file}: not supported yet"),
        ("context-length: 5", "use max_model_len here"),
    ],
)
def test_errors_in_a_file_name_the_file(tmp_path: Path, text: str, says: str) -> None:
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        resolve(config_file=file, environ={})
    assert says.format(file=file) in str(caught.value)


def test_a_file_may_be_empty_but_not_absent(tmp_path: Path) -> None:
    assert read_config_file(write(tmp_path / "c.yaml", "# nothing\n")) == {}
    with pytest.raises(ConfigError, match="cannot read"):
        resolve(config_file=tmp_path / "none.yaml", environ={})
    file = write(tmp_path / "d.yaml", "tensor-parallel-size: 1\nspeculative_config: null\nport: 9\n")
    assert resolve(config_file=file, environ={}).server.port == 9


def test_settings_of_later_versions_are_refused_unless_they_ask_for_nothing() -> None:
    assert resolve({"tensor_parallel_size": 1}, environ={}).warnings == ()
    for keyword, value in (("tensor_parallel_size", 2), ("pipeline_parallel_size", 2), ("speculative_config", "{}")):
        with pytest.raises(ConfigError, match="not supported yet"):
            resolve({keyword: value}, environ={})
    with pytest.raises(ConfigError, match="downloads nothing"):
        resolve(environ={}, foreign=[("--revision", "main")])
    (warning,) = resolve({"trust_remote_code": True}, environ={}).warnings
    assert "runs no checkpoint's code" in warning
    with pytest.raises(ConfigError, match="did you mean --max-num-seqs"):
        resolve({"max_num_seq": 1}, environ={})


def test_no_foreign_flag_hides_one_of_ours() -> None:
    ours = {item.flag for item in settings().values()}
    ours |= {alias for item in settings().values() for alias in item.extra.get("aliases", ())}
    theirs = [flag for entry in FOREIGN for flag in entry.flags]
    assert not ours.intersection(theirs)
    assert len(theirs) == len(set(theirs))


def test_settings_that_belong_together() -> None:
    with pytest.raises(ConfigError, match="--ssl-keyfile: TLS needs both"):
        resolve({"ssl_certfile": "c"}, environ={})
    lowered = resolve({"max_num_batched_tokens": 64}, environ={})
    assert lowered.scheduler.max_num_seqs == 64
    assert lowered.origins["max_num_seqs"][0] == "auto"
    with pytest.raises(ConfigError, match="--max-num-seqs: 65 requests need"):
        resolve({"max_num_batched_tokens": 64, "max_num_seqs": 65}, environ={})
    (warning,) = resolve({"allow_credentials": True}, environ={}).warnings
    assert "browsers refuse" in warning


def test_the_printed_configuration_has_origins_and_no_secret(tmp_path: Path) -> None:
    config = resolve({"port": 9, "api_key": ["s3cret"], "kv_cache_memory_bytes": "512M"}, environ={})
    out = io.StringIO()
    print_config(config, out)
    text = out.getvalue()
    assert "s3cret" not in text + str(config_rows(config))
    assert "(1 hidden)" in text
    assert "512 MiB" in text
    assert "max_num_seqs" not in text
    assert "max_num_seqs" in {name for name, _, _ in config_rows(config)}
    assert len(config_rows(config)) == len(settings())


def test_models_by_name_and_by_path(tmp_path: Path) -> None:
    assert model_directory("penstock-tiny").name == "penstock-tiny"
    assert model_directory("penstock-tiny").parent.name == "assets"
    assert model_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("penstock-tinny", "did you mean penstock-tiny?"),
        ("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"),
        ("./nothing/here", "does not exist (built in: penstock-tiny)"),
    ],
)
def test_an_unknown_model_says_what_would_be_right(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_directory(name)
    assert says in str(caught.value)


def test_a_file_is_no_model_but_hints_at_one(tmp_path: Path) -> None:
    for name, says in (
        ("config.json", f"give its directory: {tmp_path}"),
        ("model.bin", "penstock convert llama2c"),
        ("model.gguf", "Hugging Face layout"),
    ):
        with pytest.raises(ConfigError) as caught:
            model_directory(str(write(tmp_path / name, "{}")))
        assert says in str(caught.value)
