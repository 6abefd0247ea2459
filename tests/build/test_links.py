"""Links tried by `penstock doctor pd`: what works has figures, what does not has words and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.transfer.rig import EXTRAS, is_installed

from penstock import cli
from penstock.build.links import LinkFigures, measure
from penstock.config.model import KVGroup, KVLayout
from penstock.transfer import mooncake, nixl

LAYOUT = KVLayout(
    (
        KVGroup(0, "full", (0, 2), None, 32, 2, 16, "bfloat16"),
        KVGroup(1, "window", (1, 3), 64, 32, 2, 16, "bfloat16"),
    )
)


@pytest.mark.parametrize("link", ["local", "shm", "tcp", *EXTRAS])
def test_a_link_that_works(link: str) -> None:
    figures = measure(link, LAYOUT, 1 << 20)
    assert figures.link == link and 0.9 * (1 << 20) < figures.num_bytes <= 1 << 20
    assert figures.seconds > 0 and figures.message_s > 0
    assert figures.layerwise_from(LAYOUT) >= 1


def test_layers_go_one_by_one_from_where_ten_message_costs_are_filled() -> None:
    """1 GB/s and 10 us per message: from 100 kB on; a layer of this layout has 128 bytes per token."""
    assert LinkFigures("tcp", 10**9, 1.0, 1e-5).layerwise_from(LAYOUT) == 782


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "pd", "--megabytes", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["ok", "local"], ["ok", "shm"], ["ok", "tcp"]]
    extras = {"nixl": nixl, "mooncake": mooncake}
    assert [line.split()[:2] for line in lines[3:5]] == [
        ["ok" if is_installed(module) else "note", name] for name, module in extras.items()
    ]
    for line in lines[:5]:
        figures = "GB/s" in line and "us per message" in line and "tokens on" in line
        assert figures if line.startswith("ok") else "pip install 'penstock[" in line
    assert "--kv-link auto takes shm" in lines[5] and lines[6] == "all in order"


def test_a_link_that_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The place for socket files has a name that no socket can have."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    assert cli.main(["doctor", "pd", "--megabytes", "1"]) == 1
    shm = next(line for line in capsys.readouterr().out.splitlines() if " shm " in line)
    assert shm.startswith("bad") and "less than 104 bytes" in shm
    assert cli.main(["doctor", "pd", "--link", "tcp", "--megabytes", "1"]) == 0  # it was not asked for
    assert cli.main(["doctor", "pd", "--link", "pigeon"]) == 2
