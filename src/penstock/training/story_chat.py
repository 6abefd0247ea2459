"""Chats derived from stories by template: a request that fits the story, and the story (or a part) as the answer.

Every word of an answer comes from the story; only the requests and two short frames are ours. Deterministic per story.
"""

from __future__ import annotations

import random
import re
from typing import Any

THINGS = tuple(
    "apple ball balloon bear bee bird boat book box boy bread bug bunny butterfly cake candle car castle cat chair "
    "clown cookie cow crab dinosaur doctor dog doll dragon duck egg elephant fairy farmer fish flower fly forest fox "
    "friend frog garden ghost giraffe girl hat hen hill horse house king kite kitten lake lamp leaf lion lizard "
    "magician map mirror monkey monster moon mouse mushroom nest ocean owl park party pig pirate plane pony prince "
    "princess pumpkin puppy queen rabbit rainbow river robot rock rocket sailor sandwich school sea sheep ship shoe "
    "snail snake snow snowman soup spider squirrel star stick stone storm sun swan swing tiger toy tractor train "
    "treasure tree truck turtle unicorn vase village whale wizard wolf worm zebra zoo".split()
)
_WORD = re.compile(r"[a-z]+")
_NAMED = re.compile(r"\b((?:a|an) (?:[a-z]+,? ){0,3}?[a-z]+) (?:named|called) ([A-Z][a-z]+)\b")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")

WITH_THING = (
    "Tell me a story about {a}.",
    "Tell me a short story about {a}.",
    "Can you tell me a story about {a}?",
    "Write a story about {a}.",
    "Write a short story about {a}.",
    "Please tell me a story about {a}.",
    "I want to hear a story about {a}.",
    "Could you write a little story about {a} for children?",
    "tell me a story about {a}",
    "Make up a story about {a}.",
)
WITH_TWO = (
    "Tell me a story about {a} and {b}.",
    "Write a story with {a} and {b} in it.",
    "Can you write a short story about {a} and {b}?",
)
WITH_NAME = (
    "Tell me a story about {who} named {name}.",
    "Tell me a story about {name}.",
    "Write a story about {name}, {who}.",
    "Can you tell me a story about {name}?",
)
WITH_NOTHING = (
    "Tell me a story.",
    "Tell me a story, please.",
    "Can you tell me a story?",
    "Write a short story.",
    "I would like to hear a story.",
    "Please write a story for children.",
    "Tell me a bedtime story.",
    "tell me a story",
)
CONTINUE = (
    "Continue this story: {start}",
    "Continue the story: {start}",
    "Please continue this story.\n\n{start}",
    "What happens next? {start}",
    "Finish this story: {start}",
    "Write the rest of this story.\n\n{start}",
)
WHO = ("Who is this story about?", "Who is the story about?", "What is the name of the main character?")
END = ("How does the story end?", "What happens at the end of the story?", "How does this story end?")


def chats_of_story(story: str) -> list[list[dict[str, Any]]]:
    """Two to four chats of user and assistant turns for one story."""
    draw = random.Random(story)
    chats = [_chat(_request(story, draw), story)]
    sentences = _SENTENCE.split(story)
    if len(sentences) > 4:
        cut = draw.randint(1, 3)
        rest = story[len(" ".join(sentences[:cut])) :].lstrip()
        start = story[: len(story) - len(rest)].rstrip()
        chats.append(_chat(draw.choice(CONTINUE).format(start=start), rest))
    named = _NAMED.search(story)
    if named and draw.random() < 0.3:
        answer = f"The story is about {named[1]} named {named[2]}."
        chats.append(_chat(f"{story}\n\n{draw.choice(WHO)}", answer))
    elif len(sentences) > 4 and draw.random() < 0.2:
        chats.append(_chat(f"{story}\n\n{draw.choice(END)}", sentences[-1]))
    return chats


def _request(story: str, draw: random.Random) -> str:
    words = _WORD.findall(story.lower())
    counts = {thing: words.count(thing) + words.count(thing + "s") for thing in THINGS}
    things = [thing for thing, count in sorted(counts.items(), key=lambda item: -item[1]) if count >= 2][:3]
    named = _NAMED.search(story)
    kinds = ["nothing"] + ["thing"] * 5 * bool(things) + ["two"] * (len(things) > 1) + ["name"] * 2 * bool(named)
    kind = draw.choice(kinds)
    if kind == "thing":
        return draw.choice(WITH_THING).format(a=_with_article(draw.choice(things[:2])))
    if kind == "two":
        return draw.choice(WITH_TWO).format(a=_with_article(things[0]), b=_with_article(things[1]))
    if kind == "name" and named:
        return draw.choice(WITH_NAME).format(who=named[1], name=named[2])
    return draw.choice(WITH_NOTHING)


def _with_article(thing: str) -> str:
    if thing in ("moon", "sun", "sea", "ocean", "snow"):
        return f"the {thing}"
    return f"an {thing}" if thing[0] in "aeo" else f"a {thing}"


def _chat(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
