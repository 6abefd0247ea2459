"""The predicted peak beside a step-by-step simulation of the same requests."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.admission import MAX_ESTIMATE, MIN_SAMPLES, PeakPredictor, Sharing
from penstock.core.request import Request, SamplingParams

BLOCK = 4
ALONE = Sharing()


def request(held: int, left: int, name: str = "r") -> Request:
    return Request(name, [0] * held, held, SamplingParams(max_tokens=left), 0, held + left)


def simulated_peak(lengths: list[tuple[int, int]]) -> int:
    """Most blocks in use when each computes one token a step from now on and leaves after its last."""
    return max(
        sum(-(-(held + step) // BLOCK) for held, left in lengths if step < left)
        for step in range(max(left for _, left in lengths))
    )


lengths_strategy = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=300)
@given(lengths_strategy, st.tuples(st.integers(1, 30), st.integers(1, 30)), st.booleans())
def test_the_prediction_bounds_the_real_peak_closely(
    running: list[tuple[int, int]], new: tuple[int, int], added: bool
) -> None:
    """Never below the simulated peak; above it by less than a block a request and a step's growth."""
    requests = [request(*lengths) for lengths in running]
    peak = simulated_peak([*running, new])
    slack = 2 * (len(running) + 1)
    for capacity in (peak - 1, peak + slack):
        predictor = PeakPredictor(BLOCK, [capacity], [None])
        if added:
            predictor.begin([(requests[0], 0)], 0)
            for other in requests[1:]:
                predictor.add(other, ALONE)
        else:
            predictor.begin([(other, 0) for other in requests], 0)
        assert predictor.fits(request(*new), ALONE) == (capacity >= peak)


def test_a_lone_request_always_fits() -> None:
    predictor = PeakPredictor(BLOCK, [3], [None])
    predictor.begin([], 0)
    assert predictor.fits(request(100, 100), ALONE)


def test_shared_blocks_count_once_and_outlive_their_first_holder() -> None:
    """A holder of 40 tokens about to leave; a request that shares them and goes on for 20 needs them to the end."""
    holder, other = request(40, 2, "holder"), request(41, 20, "other")
    sharing = Sharing(num_held=10, num_sole=10, holder=holder)

    def fits(capacity: int) -> bool:
        predictor = PeakPredictor(BLOCK, [capacity], [None])
        predictor.begin([(holder, 0)], 0)
        return predictor.fits(other, sharing)

    assert not fits(15)  # 61 tokens need 16 blocks
    assert fits(16)
    predictor = PeakPredictor(BLOCK, [16], [None])
    predictor.begin([(holder, 0)], 0)
    predictor.add(other, sharing)
    assert not predictor.fits(request(1, 30), ALONE)
    predictor = PeakPredictor(BLOCK, [30], [None])
    predictor.begin([(holder, 0)], 0)
    predictor.add(other, sharing)
    assert predictor.fits(request(1, 30), ALONE)


def test_a_window_bounds_what_a_request_holds() -> None:
    predictor = PeakPredictor(BLOCK, [20], [5])
    predictor.begin([(request(500, 500), 0)] * 3, 0)
    assert predictor.fits(request(500, 500), ALONE)
    predictor.begin([(request(500, 500), 0)] * 4, 0)
    assert not predictor.fits(request(500, 500), ALONE)
    assert not predictor.fits(request(1, 1), ALONE)


def test_expected_lengths_follow_what_was_seen() -> None:
    """As asked for until enough have finished; then the 80th percentile, never beyond the wish nor below a token."""
    predictor = PeakPredictor(BLOCK, [100], [None])
    long = request(10, 1000)
    for _ in range(MIN_SAMPLES - 1):
        predictor.finished(50)
    assert predictor.expected_remaining(long) == 1000
    predictor.finished(50)
    assert predictor.expected_remaining(long) == 50
    assert predictor.expected_remaining(request(10, 7)) == 7
    long.token_ids += [0] * 49
    assert predictor.expected_remaining(long) == 50 // 4
    assert PeakPredictor(BLOCK, [1], [None]).expected_remaining(request(1, 10**6)) == MAX_ESTIMATE
