"""A start overlaps what need not wait, holds the memory it planned, and leaves nothing behind when it is given up."""

from __future__ import annotations

import gc
import time

import pytest

from penstock.build.launch import EngineProcess
from penstock.build.start import Stages, begin, import_builder, no_collections
from penstock.config.complete import Resolved, complete
from penstock.config.hardware import probe
from penstock.config.load import resolve
from penstock.config.memory import packed_bytes
from penstock.nn.kernels.native import usable_kernels

needs_native = pytest.mark.skipif(
    not usable_kernels(), reason="the native kernels were not built, or not for this machine"
)


def resolved(**settings: object) -> Resolved:
    return complete(resolve({"kv_cache_memory_bytes": "64M", "num_threads": 2, **settings}), probe())


@needs_native
@pytest.mark.parametrize("quantization", ["none", "w8a8", "int4"])
def test_an_arena_holds_what_is_packed(quantization: str) -> None:
    """All of it, and little more: what is made ready in vain costs time."""
    settings = resolved(quantization=quantization)
    arena = begin(settings)
    assert arena is not None
    built = import_builder().build_engine(settings, lambda *_: None, Stages(time.monotonic()), arena)
    planned, packed = packed_bytes(settings.model, quantization), built.runner.model._weights.num_bytes
    assert 0.85 * planned < arena.taken_bytes <= packed  # what is packed counts its scales, which lie elsewhere
    assert packed < 1.1 * planned


@pytest.mark.parametrize("settings", [{"cpu_kernels": "torch"}, {"dtype": "float32"}])
def test_plain_torch_needs_no_arena(settings: dict[str, str]) -> None:
    assert begin(resolved(**settings)) is None


@needs_native
def test_what_native_kernels_cannot_compute_is_told_and_gives_the_arena_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    builder = import_builder()

    def refuse(layout: object) -> None:
        raise builder.Unsupported("a cache of another kind")

    monkeypatch.setattr(builder, "check_layout", refuse)
    settings = resolved()
    arena = begin(settings)
    assert arena is not None
    built = builder.build_engine(settings, lambda *_: None, Stages(time.monotonic()), arena)
    assert "plain torch: a cache of another kind" in built.ready.device
    assert [record.getMessage() for record in caplog.records] == [
        "plain torch computes, slower: a cache of another kind"
    ]
    assert arena.taken_bytes == 0


@pytest.mark.parametrize("was_enabled", [True, False])
def test_no_collections(was_enabled: bool) -> None:
    """None while it lasts, the setting restored, and nothing more left frozen."""
    before, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(KeyError), no_collections():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is was_enabled
        assert (gc.get_freeze_count() > 0) is was_frozen
    finally:
        (gc.enable if before else gc.disable)()


def test_an_engine_whose_front_end_is_gone_leaves() -> None:
    """Before it was told an address: its standard input ends."""
    engine = EngineProcess(resolved())
    try:
        assert engine.poll() is None
        assert engine._process.stdin is not None
        engine._process.stdin.close()
        assert engine._process.wait(60) == 1
    finally:
        engine.kill()
        engine._process.wait()
