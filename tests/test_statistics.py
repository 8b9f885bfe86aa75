"""Laws of the intervals: they hold the truth as often as they say, and where the data cannot tell they say so."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from solon.measures.agreement import kappa
from solon.measures.resampling import bootstrap, centred_interval, p_above_zero
from solon.measures.statistics import (
    Estimate,
    Ratio,
    beyond_chance,
    difference,
    difference_of_shares,
    mean,
    outcome,
    p_beyond,
    paired_difference_of_shares,
    preference,
    share,
    wilson,
)

LEAST = 0.92  # of the samples whose 95 % interval must hold the truth, at 20 and 50 units


# --- what cannot be told -------------------------------------------------------------------------------------


def test_nothing_measured_is_said() -> None:
    empty = Estimate(None, None, None, 0)
    assert wilson(0, 0) == share([]) == mean([]) == difference([], []) == empty
    assert difference_of_shares((0, 0), (1, 2)) == paired_difference_of_shares(0, 0, 0) == empty
    assert mean([], []).n == share([], []).n == 0 and mean([], []).value is None
    assert json.loads(json.dumps(Estimate(math.nan, -math.inf, 1, 3).to_json(), allow_nan=False)) == {
        "value": None, "low": None, "high": 1.0, "n": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    "found",
    [
        mean([3.0]),
        mean([0.1] * 30),
        mean([0.1 + 1e-17 * n for n in range(30)]),
        mean([1.0, 2.0], ["one", "one"]),
        mean([0.0] * 47 + [1.0]),  # of the resamples a third hold the one value that differs not at all
        difference([1.0, 2.0], [0.0, 1.0]),
        bootstrap(1, lambda i: 1.0),
        bootstrap(20, lambda i: 1.0),
        centred_interval(0.5, [0.5] * 20, 20, 0, 1),
        kappa([[5, 0], [0, 5]]),
        kappa([[1, 0], [0, 0]]),
    ],
)
def test_where_nothing_varies_there_is_no_interval(found: Estimate) -> None:
    assert found.low is None and found.high is None and found.n > 0


@given(st.integers(1, 60), st.integers(1, 8))
def test_a_share_at_the_end_has_a_width(n: int, size: int) -> None:
    groups = [i // size for i in range(n)]
    for values in ([0.0] * n, [1.0] * n, [0.5] * n):
        for found in (share(values), share(values, groups)):
            assert found.low is not None and found.value is not None and found.high is not None
            assert 0 <= found.low <= found.value <= found.high <= 1 and found.high - found.low > 0.01


# --- coverage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, 50])
@pytest.mark.parametrize("p", [0.02, 0.05, 0.1, 0.3, 0.5, 0.8, 0.95, 0.98])
def test_wilson_holds_the_share(n: int, p: float) -> None:
    """Exactly, not simulated. Below p = 0.2 / n Wilson's dips to 84 %: 1 of n is then already too much."""
    held = [binom.pmf(k, n, p) for k in range(n + 1) if (e := wilson(k, n)).low <= p <= e.high]  # type: ignore[operator]
    assert sum(held) >= LEAST


SKEWED = {
    "exponential": (lambda rng, n: rng.exponential(1, n), 1.0),
    "lognormal": (lambda rng, n: rng.lognormal(0, 0.75, n), math.exp(0.75**2 / 2)),
    "beta": (lambda rng, n: rng.beta(0.3, 3, n), 0.3 / 3.3),
}


@pytest.mark.parametrize("n", [20, 50])
@pytest.mark.parametrize("kind", SKEWED)
def test_the_interval_of_a_skewed_mean_holds_it(n: int, kind: str) -> None:
    """Percentiles of a bootstrap held 86 to 91 % at n = 20 (exponential, lognormal, beta)."""
    draw, true = SKEWED[kind]
    rng, times = np.random.default_rng(5), 250
    found = [mean(draw(rng, n)) for _ in range(times)]
    assert sum(e.low is None or e.low <= true <= e.high for e in found) / times >= LEAST  # type: ignore[operator]
    assert sum(e.low is None for e in found) <= 2


@pytest.mark.parametrize(("p", "alike"), [(0.05, 0.3), (0.05, 0.8), (0.5, 0.3), (0.9, 0.05)])
def test_a_share_over_clusters_holds_the_truth(p: float, alike: float) -> None:
    """18 questions of 5 or 6 texts each; without clusters a third of the intervals miss where texts are alike."""
    rng, times, groups = np.random.default_rng(2), 300, [i % 18 for i in range(99)]
    held = 0
    for _ in range(times):
        chance = rng.beta(p * (1 - alike) / alike, (1 - p) * (1 - alike) / alike, 18)
        found = share((rng.random(99) < chance[groups]).astype(float).tolist(), groups)
        held += found.low <= p <= found.high  # type: ignore[operator]
        assert found.n == 99 and found.clusters == 18
    assert held / times >= LEAST


def test_a_mean_over_clusters_holds_the_truth() -> None:
    rng, times, groups = np.random.default_rng(4), 200, np.repeat(np.arange(18), 5)
    by_cluster = by_text = 0
    for _ in range(times):
        values = rng.exponential(1, 18)[groups] + rng.normal(0, 0.5, 90)
        one, other = mean(values, groups.tolist()), mean(values)
        by_cluster += one.low <= 1 <= one.high  # type: ignore[operator]
        by_text += other.low <= 1 <= other.high  # type: ignore[operator]
    assert by_cluster / times >= LEAST > 0.75 > by_text / times


def test_clusters_of_one_are_no_clusters() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    one, other = share(values, range(7)), share(values)
    assert (one.low, one.high) == (other.low, other.high)
    assert mean(values, range(7)).low == mean(values).low
    with pytest.raises(ValueError, match="7 values with 6 clusters"):
        share(values, range(6))


def test_of_many_values_the_interval_is_that_of_student() -> None:
    values = np.random.default_rng(0).normal(5, 2, 5000)
    found, half = mean(values), 1.96 * values.std() / math.sqrt(5000)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.01 * half)  # type: ignore[operator]
    few, ratio = mean(values[:900]), Ratio()
    for value in values[:900]:
        ratio.add(float(value), 1)
    other = ratio.mean()  # from sums alone
    # percentiles of 2,000 resamples are good to about 3 % of the half width
    assert (few.low, few.high) == pytest.approx((other.low, other.high), abs=0.15 * (other.high - other.low))  # type: ignore[operator]
    assert mean(values[:50]) == mean(values[:50]) != mean(values[1:51])


def test_pairing_removes_what_the_prompts_share() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 10, 100)
    a, b = prompts + 1 + rng.normal(0, 0.1, 100), prompts + rng.normal(0, 0.1, 100)
    paired = difference(a, b)
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert paired.low > 0.9 and paired.high < 1.1  # type: ignore[operator]
    assert difference(b, a).value == pytest.approx(-paired.value)  # type: ignore[operator]
    with pytest.raises(ValueError, match="1 values cannot be paired with 2"):
        difference([1.0], [1.0, 2.0])


def test_any_statistic_by_clusters() -> None:
    values = np.arange(101.0)
    median = bootstrap(101, lambda i: float(np.median(values[i])))
    assert median.value == 50 and median.low < 50 < median.high  # type: ignore[operator]
    assert bootstrap(101, lambda i: math.nan).value is None
    twice = bootstrap(202, lambda i: float(np.median(values[i % 101])), clusters=[i % 101 for i in range(202)])
    assert twice.n == 202 and twice.clusters == 101
    assert twice.high - twice.low == pytest.approx(median.high - median.low, rel=0.25)  # type: ignore[operator]


# --- decisions -----------------------------------------------------------------------------------------------


@given(
    st.floats(-1e3, 1e3),
    st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)),
    st.floats(-1e3, 1e3),
)
def test_the_interval_decides_and_not_the_point(value: float, width: tuple[float, float], target: float) -> None:
    low, high = value - width[0], value + width[1]
    said = outcome(value, low, high, target, "above")
    assert (said == "holds") == (low > target)
    assert (said == "does not hold") == (high < target)
    mirrored = outcome(-value, -high, -low, -target, "below")
    assert mirrored == said  # "above" of a number is "below" of its negative
    opposite = outcome(value, low, high, target, "below")
    assert {said, opposite} in ({"cannot be told"}, {"holds", "does not hold"})


def test_without_an_interval_nothing_is_decided() -> None:
    assert outcome(0.9, None, None, 0.65, "above") == "cannot be told"
    assert outcome(None, None, None, 0.65, "above") == "cannot be told"
    assert outcome(math.nan, 0, 1, 0.65, "above") == "cannot be told"
    assert outcome(math.inf, None, None, 25, "below") == "does not hold"  # a KL without bound is beyond any bound
    assert outcome(-math.inf, None, None, 25, "below") == "cannot be told"


def test_two_of_the_published_checks_were_undecided() -> None:
    """docs/results.md of 24 November 2026: 0.724 of 29 against 0.65, and a rise of 0.05 [-0.16, 0.27]."""
    found = wilson(21, 29)
    assert outcome(found.value, found.low, found.high, 0.65, "above") == "cannot be told"
    assert outcome(0.054, -0.16, 0.27, 0, "above") == "cannot be told"


def test_many_tests_together_hold_the_level_of_one() -> None:
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        shares = [share((rng.random(60) < 0.5).tolist()) for _ in range(12)]
        wrong += any(beyond_chance([p_beyond(e, 0.5, "above") for e in shares]))
    assert wrong / 400 < 0.05  # 2.5 % together; one by one it would be 26 %
    sure, unsure, nothing = (p_beyond(e, 0.5, "above") for e in (wilson(95, 100), wilson(60, 100), wilson(0, 0)))
    assert nothing is None and beyond_chance([sure, unsure, nothing]) == [True, True, False]
    assert beyond_chance([unsure]) == [True] and beyond_chance([unsure, *[0.4] * 9]) == [False] * 10
    assert beyond_chance([None]) == [False] and beyond_chance([]) == []


def test_clusters_that_follow_each_other_are_one() -> None:
    by_name, whole, apart = Ratio(), Ratio(), Ratio()
    for name, values in (("a", [1, 0, 1]), ("b", [0, 0]), ("c", [1, 1, 1, 1])):
        for value in values:
            by_name.add(value, 1, name)
            apart.add(value, 1)
        whole.add(sum(values), len(values))
    assert by_name.share() == whole.share() == share([1, 0, 1, 0, 0, 1, 1, 1, 1], list("aaabbcccc"))
    assert by_name.mean() == whole.mean() and by_name.clusters == 3 and apart.clusters == 9


@given(st.integers(1, 80).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.01, 0.99))
def test_the_p_value_says_what_the_interval_says(case: tuple[int, int], bound: float) -> None:
    found = wilson(*case)
    for side, beyond in (("above", found.low > bound), ("below", found.high < bound)):  # type: ignore[operator]
        p = p_beyond(found, bound, side)  # type: ignore[arg-type]
        assert p is not None and 0 <= p <= 1
        if abs(p - 0.025) > 1e-9:
            assert (p < 0.025) == beyond


def test_flipping_signs_holds_its_level() -> None:
    rng = np.random.default_rng(0)
    p = np.array([p_above_zero(rng.standard_t(3, 9)) for _ in range(300)])
    assert (p <= 0.05).mean() < 0.085 and (p <= 0.005).mean() < 0.02  # three standard errors above the level
    assert p_above_zero([1.0] * 10) == pytest.approx(2**-10)  # exact
    assert p_above_zero([]) == p_above_zero([0.0, 0.0]) == 1.0


def test_a_tie_is_no_preference() -> None:
    assert [preference(p) for p in (0.0, 0.4999, 0.5, 0.5 + 1e-12, 0.51, 1.0)] == [0, 0, 0.5, 0.5, 1, 1]


# --- as in the papers ----------------------------------------------------------------------------------------


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_that_of_scipy(case: tuple[int, int]) -> None:
    k, n = case
    ours, theirs = wilson(k, n), binomtest(k, n).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert ours.value == k / n and ours.n == n


def test_wilson_at_the_ends_is_no_point() -> None:
    none, all_ = wilson(0, 20), wilson(20, 20)
    assert none.low == 0 and none.high == pytest.approx(0.161, abs=1e-3)  # worked by hand: z² / (n + z²)
    assert all_.high == pytest.approx(1) and all_.low == pytest.approx(1 - none.high)
    assert wilson(0, 0).value is None and wilson(0, 0).n == 0
    assert wilson(30, 100, 10).low == pytest.approx(wilson(3, 10).low) and wilson(30, 100, 10).n == 100


def test_differences_of_shares_are_those_of_the_papers() -> None:
    # Newcombe 1998, table II, contrast (a): 56/70 - 48/80, method 10
    found = difference_of_shares((56, 70), (48, 80))
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    paired = paired_difference_of_shares(0, 0, 50)
    assert paired.value == 0 and paired.low == pytest.approx(-paired.high) and 0.02 < paired.high < 0.1
    mirrored = paired_difference_of_shares(3, 12, 50), paired_difference_of_shares(12, 3, 50)
    assert mirrored[0].low == pytest.approx(-mirrored[1].high)


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_paired_intervals_hold_the_truth_in_about_19_of_20(p: float) -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(1000):
        a, b, _rest = rng.multinomial(60, [p, 0.1, 0.9 - p])
        found = paired_difference_of_shares(int(a), int(b), 60)
        hits += found.low <= p - 0.1 <= found.high
    assert 930 <= hits <= 990  # three standard errors around 950 are 930 to 970; the adjusted interval is wider


def test_kappa_is_that_of_a_worked_table() -> None:
    found = kappa([[20, 5], [10, 15]])  # agreed 0.7, by chance 0.5
    assert found.value == pytest.approx(0.4) and found.n == 50
    # asymptotic standard error of kappa here is 0.13 (Fleiss, Cohen and Everitt 1969)
    assert found.low == pytest.approx(0.4 - 1.96 * 0.13, abs=0.04) and found.high == pytest.approx(0.4 + 0.25, abs=0.04)
    assert kappa([[45, 15], [25, 15]]).value == pytest.approx((0.6 - 0.54) / 0.46)  # the raters' habits differ
    assert kappa([[7, 0], [0, 9]]).value == 1 and kappa([[0, 7], [7, 0]]).value == -1
    assert kappa([[9, 0], [0, 0]]).value is None  # agreement is certain by chance
    assert kappa([[0, 0], [0, 0]]).n == 0


@pytest.mark.parametrize("of_run", [0.0, 5.0])
def test_intervals_over_runs_and_prompts_hold_the_mean(of_run: float) -> None:
    from benchmarks.seeds import crossed_mean

    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        values = rng.normal(0, of_run, (3, 1)) + rng.normal(0, 30, (1, 80)) + rng.normal(0, 30, (3, 80))
        measured = crossed_mean(50 + values)
        held += (measured.low or 0) <= 50 <= (measured.high or 0)
    assert 0.91 <= held / 400 <= 0.99
