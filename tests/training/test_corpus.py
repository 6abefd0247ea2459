from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.training.conftest import made_up_stories, tiny_recipe, write_lines

from penstock.training.corpus import CorpusError, Document, clean, load_documents, sections
from penstock.training.recipe import LmRecipe


def quiet(line: str) -> None:
    pass


@pytest.fixture
def documents(recipe: LmRecipe, corpus_dir: Path, tmp_path: Path) -> dict[str, list[Document]]:
    return load_documents(recipe, corpus_dir, tmp_path, quiet)


def test_split_is_stable_and_follows_the_fraction(
    recipe: LmRecipe, corpus_dir: Path, tmp_path: Path, documents: dict[str, list[Document]]
) -> None:
    assert load_documents(recipe, corpus_dir, tmp_path, quiet) == documents
    held_out = sum(d.held_out for d in documents["stories"])
    assert 5 <= held_out <= 35  # 10 % of 180
    none = load_documents(replace(recipe, held_out_fraction=0.0), corpus_dir, tmp_path, quiet)
    assert not any(d.held_out for parts in none.values() for d in parts)


def test_derived_chats_share_the_side_of_their_story(documents: dict[str, list[Document]]) -> None:
    """No sentence of a held-out story reaches the training side by way of a derived chat."""
    endings = {s.split(". ", 1)[1]: False for s in made_up_stories()}
    for document in documents["stories"]:
        endings[document.text.split(". ", 1)[1]] = document.held_out
    seen = 0
    for document in documents["requests"]:
        for ending, held_out in endings.items():
            if ending in document.text:
                assert document.held_out == held_out
                seen += 1
    assert seen > 100


def test_tool_calls_come_through_the_template(documents: dict[str, list[Document]]) -> None:
    with_calls = [d.text for d in documents["chats"] if "<tool_call>\n{" in d.text.split("</tools>")[-1]]
    assert 0 < len(with_calls) < len(documents["chats"])
    for text in with_calls:
        calls = text.split("<|im_end|>", 1)[1]
        call = json.loads(calls.split("<tool_call>\n")[1].split("\n</tool_call>")[0])
        assert call["name"] == "BuyThing"
        assert set(call["arguments"]) == {"name", "thing"}
        assert text.index("<tool_response>") < text.index("Here is a")


def test_only_system_turns_are_silent(documents: dict[str, list[Document]]) -> None:
    silent = [d for parts in documents.values() for d in parts if d.silent_chars]
    assert silent
    for document in silent:
        head, rest = document.text[: document.silent_chars], document.text[document.silent_chars :]
        assert head.startswith("<|im_start|>system\n")
        assert head.endswith("<|im_end|>")
        assert "system" not in rest
    assert not any(d.silent_chars for d in documents["stories"])


@given(st.lists(st.text(alphabet="ab ", max_size=30), max_size=30), st.integers(1, 50))
def test_sections_keep_every_paragraph(paragraphs: list[str], size: int) -> None:
    text = clean("\n".join(paragraphs))
    assert "".join("".join(s.split()) for s in sections(text, size)) == "".join(text.split())


def test_bad_files_are_named(tmp_path: Path, corpus_dir: Path) -> None:
    recipe = tiny_recipe()
    with pytest.raises(CorpusError, match="stories.jsonl.gz does not exist"):
        load_documents(recipe, tmp_path, tmp_path, quiet)
    write_lines(tmp_path / "stories.jsonl.gz", [{"text": "fine"}, {"title": "no text"}])
    with pytest.raises(CorpusError, match="line 2"):
        load_documents(recipe, tmp_path, tmp_path, quiet)
    (tmp_path / "stories.jsonl.gz").write_bytes((corpus_dir / "stories.jsonl.gz").read_bytes()[:200])
    with pytest.raises(CorpusError, match="cannot be read"):
        load_documents(recipe, tmp_path, tmp_path, quiet)


def test_line_separators_inside_strings_do_not_cut_lines(tmp_path: Path) -> None:
    write_lines(tmp_path / "stories.jsonl.gz", [{"text": "one\u2028two\u0085three"}])
    recipe = tiny_recipe()
    only = replace(recipe, sources=recipe.sources[:1])
    assert [d.text for d in load_documents(only, tmp_path, tmp_path, quiet)["stories"]] == ["one\u2028two\u0085three"]
