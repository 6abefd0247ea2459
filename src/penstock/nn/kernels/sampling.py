"""From scores to tokens: filters, noise, argmax. Knows rows of scores, not whose they are, what came before, or why.

Definitions. For a row of scores x (after biases, bans and penalties), V of them:

    temperature  s_i = (x_i - max x) / temperature, p = softmax(s); below MIN_TEMPERATURE the row is greedy: the largest
                 x, lowest token id among equals, whatever the filters say
    top_k        keep x_i >= the k-th largest x; off when k <= 0 or k >= V
    top_p        keep token i if the tokens above it (x_j > x_i) hold less than top_p of the mass that top_k left
    min_p        keep p_i >= min_p * max p, that is x_i >= max x + temperature * log(min_p)
    choice       the largest s_i + gumbel_i among the kept (noise: `philox.gumbel`), lowest token id among equals

so tokens equal to the one at a cut are kept with it, the best token always stays, and each filter is a floor: a token
is kept if its score reaches the highest of the three.

The fast version never sorts the vocabulary. It keeps the largest score of every block of neighbouring tokens (one cheap
pass). The k-th largest block bounds the k-th largest token from below, so only blocks that reach it are opened. top_p
opens the best few blocks the same way and takes its mass from one softmax over the row; where these do not hold enough,
the floor is bracketed by bisection on the mass. For the noise, a group of GROUP tokens is opened only if its best score
plus the largest noise in the group could still win (see `philox`). All of it is exact: same token as the reference but
where float rounding decides a top_p cut or two equal scores. Rows do not influence each other: E0 whatever the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from penstock.nn.kernels import philox
from penstock.nn.kernels.edits import Floats, Ids, RowEdits, RowParams
from penstock.nn.kernels.philox import FIRST, GROUP, GROUP_BITS, REST

MIN_TEMPERATURE = 1e-5  # lower is greedy
BLOCK = 32  # tokens behind one block maximum of the search for floors
NUM_CANDIDATES = 64  # best blocks opened for top_p without top_k
NUM_HALVINGS = 6  # of the bracket around the floor of a wide nucleus
PIECE = 1 << 18  # scores of a wide nucleus worked on at once, so that they stay in the cache
CROWDED = 8192  # candidates of one row that are worked on apart
SORTABLE = 1024  # numbers per row up to which numpy's sort is the fastest way to the best of them
NOT_A_NUMBER, NO_TOKEN = -1, -2  # in place of a token id: the row holds NaN; every token is forbidden


# Reference: sorts, float64, noise for every token. Also what devices other than the CPU run.


def kept_reference(scores: Tensor, params: RowParams) -> Tensor:
    """Which tokens pass the filters of the file's docstring. scores float [N, V] without NaN; result bool [N, V]."""
    size = scores.shape[1]
    wide = scores.double()

    def column(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(scores.device)[:, None]

    temperature, top_p, min_p = (column(a).double() for a in (params.temperature, params.top_p, params.min_p))
    k = column(np.where((params.top_k > 0) & (params.top_k < size), params.top_k, size))
    ordered = wide.sort(1, descending=True).values
    kept = wide >= ordered.gather(1, k - 1)
    best = ordered[:, :1]
    mass = torch.exp((ordered - best) / temperature) * (ordered >= ordered.gather(1, k - 1))
    above = mass.cumsum(1) - mass
    in_nucleus = (above < top_p * mass.sum(1, keepdim=True)) | (top_p >= 1)
    floor = torch.where(in_nucleus, ordered, torch.inf).amin(1, keepdim=True)
    return kept & (wide >= floor) & (wide >= best + temperature * torch.log(min_p))


def choose_reference(scores: Tensor, params: RowParams) -> Tensor:
    """The token of each row, int64 [N], of finite-topped scores float32 [N, V] on any device. See `choose`."""
    size = scores.shape[1]
    result = scores.argmax(1)
    sampled = np.flatnonzero(params.temperature >= MIN_TEMPERATURE)
    if len(sampled) == 0:
        return result
    rows = torch.from_numpy(sampled).to(scores.device)
    scores, params = scores[rows], params.take(sampled)
    temperature, seeds, positions = (
        torch.from_numpy(np.ascontiguousarray(a)).to(scores.device)[:, None]
        for a in (params.temperature, params.seeds.view(np.int64), params.positions)
    )
    noise = philox.gumbel(seeds, positions, torch.arange(size, device=scores.device)[None])
    perturbed = (scores - scores.amax(1, keepdim=True)) / temperature + noise
    result[rows] = torch.where(kept_reference(scores, params), perturbed, -torch.inf).argmax(1)
    return result


# Fast: the CPU. Numpy on shared memory where arrays are small, because a call costs a quarter of torch's.


def greedy_cpu(scores: Tensor, peaks: Floats) -> Ids:
    """The best token of each row, lowest id among equals. NaN counts as the best. peaks: each group's best score."""
    every = np.arange(len(peaks))
    group = peaks.argmax(1)
    tokens = scores.numpy().reshape(-1, GROUP)[every * peaks.shape[1] + group]
    return group * GROUP + tokens.argmax(1)


@np.errstate(over="ignore")  # scores far below the best become minus infinity, as they should
def _choose_sampled(scores: Tensor, peaks: Floats, best_ids: Ids, params: RowParams) -> Ids:
    """`best_ids`, with the rows that have a temperature replaced by their sampled token."""
    rows = np.flatnonzero(params.temperature >= MIN_TEMPERATURE)
    if len(rows) == 0:
        return best_ids
    result = best_ids.copy()
    if len(rows) < len(peaks):
        params, peaks, best_ids = params.take(rows), peaks[rows], best_ids[rows]
    flat = scores.numpy().reshape(-1)
    start = rows * scores.shape[1]  # of the row in `flat`
    best = flat[start + best_ids]
    floor = floors_cpu(scores, rows, best, best_ids, params)
    result[rows] = _argmax_perturbed(flat, start, peaks, best, best_ids, floor, params)
    return result


def _argmax_perturbed(
    flat: Floats, start: Ids, peaks: Floats, best: Floats, best_ids: Ids, floor: Floats, params: RowParams
) -> Ids:
    """argmax over tokens with score >= floor of `(score - best) / temperature + gumbel`, for n rows.

    flat: all scores; start [n]: where a row begins in it; peaks [n, G]; best, best_ids, floor [n].
    1. A group is alive if its best token is not below the floor and the largest noise there is could make it win.
    2. Draw the first arrival of every alive group, and all of the row's best token: the best of these is a lower bound.
    3. Open the groups whose peak plus noise of the first arrival reaches the bound; draw for their tokens that do.
    """
    temperature, seeds, positions = params.temperature, params.seeds, params.positions
    num_rows, num_groups = peaks.shape
    every = np.arange(num_rows)
    scaled = (peaks - best[:, None]) / temperature[:, None]
    alive = np.flatnonzero((scaled >= philox.LOWEST_GUMBEL - philox.HIGHEST_GUMBEL) & (peaks >= floor[:, None]))
    row, group = np.divmod(alive, num_groups)  # sorted by row; every row has the group of its best token
    num_alive = len(row)

    index = np.concatenate((group, best_ids))
    purpose = np.repeat(np.array((FIRST, REST), np.uint64), (num_alive, num_rows))
    of = np.concatenate((row, every))
    word0, word1 = philox.words(seeds[of], positions[of], index, purpose)
    arrival, first = philox.first_arrivals(word0[:num_alive], word1[:num_alive])
    highest = philox.gumbel_of(arrival)

    token = group * GROUP + first.astype(np.int64)
    score = flat[start[row] + token]
    perturbed = (score - best[row]) / temperature[row] + highest
    perturbed[score < floor[row]] = -np.inf
    bound = np.maximum.reduceat(perturbed, np.searchsorted(row, every))
    home = np.searchsorted(alive, every * num_groups + (best_ids >> GROUP_BITS))
    rest = philox.exponential(word0[num_alive:]) * (token[home] != best_ids)
    bound = np.maximum(bound, philox.gumbel_of(arrival[home] + rest))

    opened = np.flatnonzero(scaled[row, group] + highest >= bound[row])
    row, group, arrival, token, highest = (a[opened] for a in (row, group, arrival, token, highest))
    deepest = temperature[row] * (bound[row] - highest) + best[row]
    deepest -= 1e-5 * (np.abs(best[row]) + 32 * temperature[row])  # more than the rounding of either side
    scores = flat.reshape(-1, GROUP)[start[row] // GROUP + group]
    found = np.flatnonzero(scores >= np.maximum(deepest, floor[row])[:, None])
    which = found >> GROUP_BITS
    row, token_ids = row[which], group[which] * GROUP + (found & (GROUP - 1))
    rest = philox.exponential(philox.words(seeds[row], positions[row], token_ids, REST)[0])
    perturbed = (scores.reshape(-1)[found] - best[row]) / temperature[row]
    perturbed += philox.gumbel_of(arrival[which] + rest * (token[which] != token_ids))
    largest = np.maximum.reduceat(perturbed, np.searchsorted(row, every))
    winners = np.flatnonzero(perturbed == largest[row])[::-1]  # of equals the lowest id is written last, and stays
    result = np.empty(num_rows, np.int64)
    result[row[winners]] = token_ids[winners]
    return result


def floors_cpu(scores: Tensor, rows: Ids, best: Floats, best_ids: Ids, params: RowParams) -> Floats:
    """The lowest score that each of `rows` keeps, float32 [n]; minus infinity where nothing filters.

    scores float32 [N, V], contiguous, V a multiple of GROUP; rows [n] ascending; best, best_ids, params: of these rows.
    """
    floor = np.full(len(rows), -np.inf, np.float32)
    limited = np.flatnonzero(((params.top_k > 0) & (params.top_k < scores.shape[1])) | (params.top_p < 1))
    if len(limited):
        floor[limited] = _top_k_top_p_floors(
            scores, rows[limited], best[limited], best_ids[limited], params.take(limited)
        )
    if params.min_p.any():
        with np.errstate(divide="ignore"):
            exact = best + params.temperature.astype(np.float64) * np.log(params.min_p)
        low = exact.astype(np.float32)
        low[low < exact] = np.nextafter(low[low < exact], np.float32(np.inf))  # the same cut as in float64
        floor = np.maximum(floor, low)
    return floor


def _top_k_top_p_floors(scores: Tensor, rows: Ids, best: Floats, best_ids: Ids, params: RowParams) -> Floats:
    """The lowest score that top_k and then top_p keep, for n rows of which each has one of them."""
    num_rows, size = len(rows), scores.shape[1]
    has_k, has_p = (params.top_k > 0) & (params.top_k < size), params.top_p < 1
    num_blocks = size // BLOCK if size > SORTABLE else size
    num_opened = min(NUM_CANDIDATES, num_blocks // 4)  # for top_p alone
    wide = np.flatnonzero(has_k & (params.top_k > num_blocks))
    if len(wide):
        floor = np.empty(num_rows, np.float32)
        floor[wide] = _wide_k_floors(scores, rows[wide], best[wide], params.take(wide))
        part = np.flatnonzero(~has_k | (params.top_k <= num_blocks))
        if len(part):
            floor[part] = _top_k_top_p_floors(scores, rows[part], best[part], best_ids[part], params.take(part))
        return floor

    values, row = _candidates(scores, rows, np.where(has_k, params.top_k, num_opened))
    counts = np.bincount(row, minlength=num_rows)
    crowded = counts > CROWDED
    if num_rows > 1 and crowded.any():  # of equal scores: in one matrix, a row's would cost every row the memory
        floor = np.empty(num_rows, np.float32)
        for part in (np.flatnonzero(~crowded), *np.flatnonzero(crowded)[:, None]):
            if len(part):
                floor[part] = _top_k_top_p_floors(scores, rows[part], best[part], best_ids[part], params.take(part))
        return floor

    ordered = _ordered(values, row, counts)
    every = np.arange(num_rows)
    floor = np.where(has_k, ordered[every, np.minimum(np.where(has_k, params.top_k, 1), counts) - 1], -np.inf)
    floor = floor.astype(np.float32)
    nucleus = np.flatnonzero(has_p)
    if len(nucleus) == 0:
        return floor
    total = np.empty(num_rows)
    free = np.flatnonzero(has_p & ~has_k)
    if len(free):
        chances = _softmax(scores, rows[free], best[free], params.temperature[free], None)
        total[free] = 1.0 / chances[torch.arange(len(free)), torch.from_numpy(best_ids[free])].numpy()
    weights = _weights(ordered, best, params.temperature)
    weights[ordered < floor[:, None]] = 0.0
    reached = weights.cumsum(1)
    total[has_k] = reached[has_k, -1]
    wanted = params.top_p * total
    kept = np.count_nonzero((reached - weights < wanted[:, None]) & (weights > 0), axis=1)
    floor[nucleus] = ordered[nucleus, kept[nucleus] - 1]
    short = reached[free, -1] < wanted[free]
    if short.any():
        at = free[short]
        chances = _rows_of(chances, np.flatnonzero(short))
        floor[at] = _wide_p_floors(_rows_of(scores, rows[at]), chances, best[at], params.take(at))
    return floor


def _candidates(scores: Tensor, rows: Ids, num_blocks: Ids) -> tuple[Floats, Ids]:
    """Those finite scores of `rows` that reach the row's num_blocks-th best block maximum, and their index in `rows`.

    Per row these are the best ones, all of them, and at least `num_blocks` where so many are finite. Sorted by row. In
    a small vocabulary, all scores.
    """
    size = scores.shape[1]
    if size <= SORTABLE:
        tokens = scores.numpy()[rows]
        found = np.flatnonzero(tokens > -np.inf)
        return tokens.reshape(-1)[found], found // size
    if 4 * len(rows) < len(scores):
        maxima = _rows_of(scores, rows).view(len(rows), -1, BLOCK).amax(2)
    else:
        maxima = _rows_of(scores.view(len(scores), -1, BLOCK).amax(2), rows)
    each = maxima.numpy()
    if each.shape[1] <= SORTABLE:
        reach = np.sort(each, axis=1)[np.arange(len(rows)), each.shape[1] - num_blocks]
    else:
        reach = maxima.topk(int(num_blocks.max()), dim=1).values.numpy()[np.arange(len(rows)), num_blocks - 1]
    reach = np.maximum(reach, np.finfo(np.float32).min)
    row, block = np.divmod(np.flatnonzero(each >= reach[:, None]), each.shape[1])
    tokens = scores.numpy().reshape(-1, BLOCK)[rows[row] * each.shape[1] + block]
    found = np.flatnonzero(tokens >= reach[row][:, None])
    return tokens.reshape(-1)[found], row[found // BLOCK]


def _ordered(values: Floats, row: Ids, counts: Ids) -> Floats:
    """Ragged values, sorted by row and `counts` in each, as a matrix: descending, minus infinity behind them."""
    matrix = np.full((len(counts), max(1, int(counts.max()))), np.inf, np.float32)
    matrix[row, np.arange(len(row)) - (np.cumsum(counts) - counts)[row]] = -values
    matrix.sort(axis=1)
    return np.negative(matrix, out=matrix)


def _rows_of(matrix: Tensor, rows: Ids) -> Tensor:
    """`matrix[rows]` of ascending rows, without a copy if these are all."""
    return matrix if len(rows) == len(matrix) else matrix[torch.from_numpy(rows)]


def _weights(values: Floats, best: Floats, temperature: Floats) -> NDArray[np.float64]:
    return np.exp((values - best[:, None].astype(np.float64)) / temperature[:, None])


def _softmax(scores: Tensor, rows: Ids, best: Floats, temperature: Floats, floor: Floats | None) -> Tensor:
    """Chances [n, V] of `rows` after temperature, without the scores below `floor`. Float32, the sum in float32."""
    wide = _rows_of(scores, rows)
    scaled = wide - torch.from_numpy(best)[:, None]
    if (temperature != 1).any():
        scaled /= torch.from_numpy(temperature)[:, None]
    if floor is not None:
        scaled.masked_fill_(wide < torch.from_numpy(floor)[:, None], -torch.inf)
    return scaled.softmax(1)


def _wide_k_floors(scores: Tensor, rows: Ids, best: Floats, params: RowParams) -> Floats:
    """The floors of n rows whose top_k is too large for blocks to help, with top_p where they have it."""
    wide = _rows_of(scores, rows)
    last = scores.shape[1] - params.top_k
    floor = np.partition(wide.numpy(), np.unique(last), axis=1)[np.arange(len(rows)), last]
    nucleus = np.flatnonzero(params.top_p < 1)
    if len(nucleus):
        chances = _softmax(scores, rows[nucleus], best[nucleus], params.temperature[nucleus], floor[nucleus])
        low = _wide_p_floors(_rows_of(wide, nucleus), chances, best[nucleus], params.take(nucleus))
        floor[nucleus] = np.maximum(floor[nucleus], low)
    return floor


def _wide_p_floors(scores: Tensor, chances: Tensor, best: Floats, params: RowParams) -> Floats:
    """The lowest score that top_p keeps, for n rows whose nucleus is wide. scores, chances [n, V].

    A score t is high enough while the tokens above it hold less than top_p. That bracket is halved a few times, then
    the tokens left in it are put in order. Its lower end: all tokens with s below -log(V / (1 - top_p)) together hold
    less than 1 - top_p, since the best one alone weighs 1.
    """
    num_rows, size = scores.shape
    floor = np.empty(num_rows, np.float32)
    depth = params.temperature * (np.log(size / (1 - params.top_p)) + 1)
    step = max(1, PIECE // size)
    for at in range(0, num_rows, step):
        rows = slice(at, at + step)
        low = torch.from_numpy((best[rows] - depth[rows]).astype(np.float32))[:, None]
        high = torch.from_numpy(best[rows])[:, None]
        top_p = torch.from_numpy(params.top_p[rows])[:, None]
        piece, share = scores[rows], chances[rows]
        above = torch.zeros_like(top_p)  # mass of the tokens over `high`
        masked = torch.empty_like(share)
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            torch.gt(piece, middle, out=masked)  # as 0 and 1: torch's selections take ten times as long
            sums = masked.mul_(share).view(len(piece), -1, BLOCK).sum(2)  # an order that the batch cannot change
            mass = sums.sum(1, keepdim=True, dtype=torch.float64)
            enough = mass < top_p
            high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
            above = torch.where(enough, mass, above)
        inside = np.flatnonzero((piece.numpy() > low.numpy()) & (piece.numpy() <= high.numpy()))
        row = inside // size
        ordered = _ordered(piece.numpy().reshape(-1)[inside], row, np.bincount(row, minlength=len(piece)))
        weights = _weights(ordered, best[rows], params.temperature[rows]) * share.amax(1, keepdim=True).numpy()
        reached = above.numpy() + weights.cumsum(1)
        kept = np.count_nonzero((reached - weights < top_p.numpy()) & (weights > 0), axis=1)
        floor[rows] = np.where(kept > 0, ordered[np.arange(len(piece)), kept - 1], high.numpy()[:, 0])
    return floor


# Chooser


class DenseScores:
    """The `Scores` of plain torch: float32 [N, V] on any device, which are overwritten where rows have edits."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores.contiguous()

    def choose(self, params: RowParams, edits: RowEdits | None, reported: Ids) -> tuple[Ids, Tensor]:
        raw = self._scores[torch.from_numpy(reported)] if len(reported) else self._scores[:0]
        if edits is not None:
            edits.apply(self._scores)
        return choose(self._scores, params), raw


def choose(scores: Tensor, params: RowParams) -> Ids:
    """The token of each row, int64 [N], from scores float32 [N, V]; NOT_A_NUMBER or NO_TOKEN where there is none.

    Minus infinity forbids a token; those of plus infinity are equals above all others. Other rows do not notice a bad
    one. The scores are left as they are. Exactness: E0 across batches, E1 across devices.
    """
    num_rows, size = scores.shape
    if num_rows == 0:
        return np.empty(0, np.int64)
    on_cpu = scores.device.type == "cpu"
    scores = scores.contiguous()
    if on_cpu and size % GROUP:
        scores = pad(scores, (0, GROUP - size % GROUP), value=-torch.inf)
    peaks = scores.view(num_rows, -1, GROUP if on_cpu else size).amax(2)
    best = peaks.amax(1).cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(best))
    if len(bad):
        scores = scores.clone()
        for row in bad.tolist():
            scores[row] = _mended(scores[row])
            peaks[row] = scores[row].view(peaks.shape[1], -1).amax(1)
    if on_cpu:
        result = _choose_sampled(scores, peaks.numpy(), greedy_cpu(scores, peaks.numpy()), params)
    else:
        result = choose_reference(scores, params).cpu().numpy()
    if len(bad):
        result[np.isnan(best)] = NOT_A_NUMBER
        result[best == -np.inf] = NO_TOKEN
    return result


def _mended(scores: Tensor) -> Tensor:
    """A row [V] whose best score is not finite, as one that every step can take."""
    if scores.amax() == torch.inf:
        return torch.where(scores == torch.inf, 0.0, -torch.inf)
    lone = torch.full_like(scores, -torch.inf)
    lone[0] = 0.0
    return lone


def logprobs(scores: Tensor, token_ids: Ids, nums: Ids) -> tuple[Floats, Ids, list[Ids], list[Floats]]:
    """Of each row of scores float32 [N, V]: log probability and 1-based rank of its token in `token_ids`, then ids and
    log probabilities of its `nums[i]` best tokens, best first, lowest id first among equals.

    The rank counts the tokens with a larger log probability. A row with NaN gives NaN and no best tokens. Float32
    log-softmax; E0 across batches.
    """
    unbounded = torch.nonzero(scores.amax(1) == torch.inf).flatten().tolist()
    if unbounded:
        scores = scores.clone()
        for row in unbounded:
            scores[row] = _mended(scores[row])
    num_rows, size = scores.shape
    every = np.arange(num_rows)
    logs = scores.log_softmax(1)
    chosen = logs[torch.from_numpy(every), torch.from_numpy(token_ids)]
    larger = torch.gt(logs, chosen[:, None], out=torch.empty_like(logs)).sum(1)  # as 0 and 1: exact below 2^24
    ranks = larger.cpu().numpy().astype(np.int64) + 1
    most = min(int(nums.max(initial=0)), size)
    if most == 0:
        nothing = np.empty(0, np.int64), np.empty(0, np.float32)
        return chosen.cpu().numpy(), ranks, [nothing[0]] * num_rows, [nothing[1]] * num_rows
    leading = logs.topk(most, dim=1).values.cpu().numpy()
    reach = np.where(nums > 0, leading[every, np.minimum(nums, most) - 1], np.inf).astype(np.float32)
    host = logs.cpu().numpy()
    found = np.flatnonzero(host >= reach[:, None])  # with every equal of the last, whose order topk leaves open
    row, ids = np.divmod(found, size)
    values = host.reshape(-1)[found]
    order = np.lexsort((ids, -values, row))
    ids, values = ids[order], values[order]
    counts = np.bincount(row, minlength=num_rows)
    begin = np.cumsum(counts) - counts
    spans = list(zip(begin.tolist(), (begin + np.minimum(nums, counts)).tolist(), strict=True))
    return chosen.cpu().numpy(), ranks, [ids[a:b] for a, b in spans], [values[a:b] for a, b in spans]
