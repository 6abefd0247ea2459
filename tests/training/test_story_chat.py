from __future__ import annotations

from tests.training.conftest import made_up_stories

from penstock.training.story_chat import THINGS, chats_of_story


def test_answers_are_words_of_the_story_and_requests_fit_it() -> None:
    for story in made_up_stories():
        chats = chats_of_story(story)
        assert chats == chats_of_story(story)
        assert 2 <= len(chats) <= 4
        for user, assistant in chats:
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert assistant["content"].removeprefix("The story is about ").rstrip(".") in story
            asked = {thing for thing in THINGS if f" {thing}" in user["content"].lower()}
            assert all(thing in story for thing in asked - {"story"})


def test_continuations_join_to_the_story() -> None:
    for story in made_up_stories():
        user, assistant = chats_of_story(story)[1]
        start = story[: len(story) - len(assistant["content"])].rstrip()
        assert start
        assert user["content"].endswith(start)
