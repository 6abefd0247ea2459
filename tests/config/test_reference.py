"""The configuration page is what the schema says now."""

from __future__ import annotations

from pathlib import Path

from penstock.config.foreign import FOREIGN
from penstock.config.reference import reference
from penstock.config.schema import settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: make docs"


def test_every_flag_stands_on_it() -> None:
    text = reference()
    for item in settings().values():
        assert f"| `{item.flag}`" in text
        assert all(f"`{alias}`" in text for alias in item.extra.get("aliases", ()))
    assert all(f"`{flag}`" in text for entry in FOREIGN for flag in entry.flags)
