"""The hash chain, hits over several KV groups, and why a prompt missed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.executor import fake_layout

from penstock.core.blocks import BlockPool
from penstock.core.prefix import PrefixCache, chain_root, extend_chain
from penstock.core.request import MediaItem

LAYOUT = fake_layout((None,), 4)


def chain(token_ids: list[int], root: bytes = b"r", media: tuple[MediaItem, ...] = ()) -> list[bytes]:
    hashes: list[bytes] = []
    extend_chain(hashes, root, token_ids, 4, media)
    return hashes


def test_roots_differ_by_model_format_adapter_and_salt() -> None:
    roots = {
        chain_root("m", LAYOUT),
        chain_root("other", LAYOUT),
        chain_root("m", fake_layout((None,), 8)),
        chain_root("m", fake_layout((16,), 4)),
        chain_root("m", LAYOUT, adapter="a"),
        chain_root("m", LAYOUT, salt="a"),
        chain_root("m", LAYOUT, adapter="a", salt="a"),
    }
    assert len(roots) == 7


@given(st.lists(st.integers(0, 2**31), min_size=8, max_size=40), st.integers(0, 39), st.integers(1, 9))
def test_a_change_shows_from_its_block_on(token_ids: list[int], at: int, step: int) -> None:
    """Hashes before the changed token's block are equal, all from it on differ; growing the list changes nothing."""
    at %= len(token_ids)
    changed = token_ids.copy()
    changed[at] += 1
    one, two = chain(token_ids), chain(changed)
    assert len(one) == len(token_ids) // 4
    assert one[: at // 4] == two[: at // 4]
    assert not set(one[at // 4 :]) & set(two[at // 4 :])
    grown: list[bytes] = []
    for end in range(0, len(token_ids) + step, step):
        extend_chain(grown, b"r", token_ids[:end], 4)
    assert grown == one


def test_media_enter_the_blocks_they_cover_and_those_after() -> None:
    """Placeholder tokens are equal; contents and places are what differs."""
    ids = [7] * 16
    plain = chain(ids)
    cat, dog = (MediaItem("cat", 5, 4),), (MediaItem("dog", 5, 4),)
    assert chain(ids, media=cat)[0] == plain[0]
    assert chain(ids, media=cat)[1] != plain[1]
    assert chain(ids, media=cat)[1:] != chain(ids, media=dog)[1:]
    assert chain(ids, media=cat)[1] != chain(ids, media=(MediaItem("cat", 6, 4),))[1]


@given(st.integers(1, 40), st.sets(st.integers(0, 9)), st.integers(0, 10))
def test_a_window_needs_only_what_the_next_token_sees(window: int, missing: set[int], limit: int) -> None:
    """The longest prefix, found by trying all of them, for a full group beside a window group."""
    layout = fake_layout((None, window), 4)
    hashes = chain(list(range(40)))
    pools = [BlockPool(16), BlockPool(16, leaf_first=False)]
    for n, hash_ in enumerate(hashes):
        pools[0].publish(pools[0].allocate(0.0), hash_, hashes[n - 1] if n else None)
        if n not in missing:
            pools[1].publish(pools[1].allocate(0.0), hash_, None)
    cache = PrefixCache(layout, pools)
    hit = cache.match(hashes, limit)

    def usable(num: int) -> bool:
        first = max(0, num * 4 - window + 1) // 4
        return not missing & set(range(first, num))

    assert hit.num_blocks == max(n for n in range(min(limit, 10) + 1) if usable(n))
    for ids in hit.block_ids:
        assert len(ids) == hit.num_blocks
    assert all(hit.block_ids[0])
    first = max(0, hit.num_blocks * 4 - window + 1) // 4
    assert hit.block_ids[1][:first] == [0] * first
    assert all(hit.block_ids[1][first:])
