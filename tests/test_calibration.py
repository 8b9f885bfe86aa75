"""Laws of calibration: numbers worked by hand, intervals that hold the truth, a temperature that is found again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from solon.measures.calibration import (
    Calibration,
    bins,
    calibration_error,
    error_by_chance,
    fit_temperature,
    flipped,
    recalibration,
    scores,
)


def sample(n: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A judge whose log-odds are `temperature` times the true ones, and people's choices."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 1.5, n)
    human = rng.random(n) < 1 / (1 + np.exp(-odds))
    return odds * temperature, human


# --- scores --------------------------------------------------------------------------------------------------


def test_scores_worked_by_hand() -> None:
    p, human = np.array([0.9, 0.6, 0.3, 0.5]), np.array([True, False, False, True])
    found = scores(logit(p), human)
    assert found["brier"].value == pytest.approx((0.01 + 0.36 + 0.09 + 0.25) / 4)
    assert found["log_loss"].value == pytest.approx(
        -(math.log(0.9) + math.log(0.4) + math.log(0.7) + math.log(0.5)) / 4
    )
    # bins: 0.5 (half right: gap 0), 0.6 (wrong: 0.6), 0.7 (right: 0.3), 0.9 (right: 0.1)
    assert found["calibration_error"].value == pytest.approx((0 + 0.6 + 0.3 + 0.1) / 4)


@settings(max_examples=40)  # each runs six bootstraps
@given(st.lists(st.tuples(st.floats(-700, 700), st.booleans()), min_size=1, max_size=30))
def test_turning_every_pair_round_changes_no_score(pairs: list[tuple[float, bool]]) -> None:
    odds, human = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    one, other = scores(odds, human), scores(-odds, ~human)
    assert one["brier"].value == pytest.approx(other["brier"].value)
    assert one["log_loss"] == other["log_loss"] and one["calibration_error"] == other["calibration_error"]
    assert one["log_loss"].value == pytest.approx(  # however sure: no probability is cut
        sum(math.log1p(math.exp(-abs(z))) + (abs(z) if (z > 0) != h else 0) for z, h in pairs) / len(pairs)
    )


def test_bins_tile_the_confidences() -> None:
    confidence = np.array([0.5, 0.5499, 0.55, 0.6, 0.65, 0.95, 0.999, 1.0])
    right = np.array([0.5, 1, 0, 1, 1, 1, 1, 1.0])
    found = bins(confidence, right)
    assert [(round(b["low"], 3), b["right"]["n"]) for b in found] == [
        (0.5, 2),
        (0.55, 1),
        (0.6, 1),
        (0.65, 1),
        (0.95, 3),
    ]
    assert sum(b["right"]["n"] for b in found) == len(confidence)
    assert found[0]["right"]["value"] == 0.75 and found[-1]["confidence"] == pytest.approx((0.95 + 0.999 + 1) / 3)
    for b in found:
        assert b["low"] - 1e-9 <= b["confidence"] <= b["high"] + 1e-9


def test_a_calibrated_judge_has_no_more_error_than_chance_gives_it() -> None:
    odds, human = sample(2000)
    confidence, right = expit(np.abs(odds)), ((odds > 0) == human).astype(float)
    error = calibration_error(confidence, right)
    assert error.low <= error.value <= error.high and error.value < error_by_chance(confidence) < 0.05
    confidence = expit(np.abs(3 * odds))
    assert calibration_error(confidence, right).low > error_by_chance(confidence)
    assert error_by_chance(confidence[:50]) > error_by_chance(confidence)  # fewer pairs, more error by chance


# --- temperature ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_is_found_again(temperature: float) -> None:
    odds, human = sample(6000, temperature)
    assert fit_temperature(odds, human) == pytest.approx(temperature, rel=0.1)


def test_a_temperature_repairs_the_half_that_it_was_not_fitted_on() -> None:
    odds, human = sample(2000, 4.0)
    fit = np.arange(len(odds)) % 2 == 0
    found = recalibration(odds, human, fit)
    assert found is not None and found["n_fit"] == found["n"] == 1000 and not found["at_bound"]
    for name in ("brier", "calibration_error", "log_loss"):
        assert found["after"][name]["value"] < found["before"][name]["value"], name
    assert found["log_loss_saved"]["low"] > 0
    # what is measured never saw the fit: other labels there, the same temperature
    other = recalibration(odds, np.where(fit, human, ~human), fit)
    assert other is not None and other["value"] == found["value"] and other["before"] != found["before"]
    assert recalibration(odds[:30], human[:30], fit[:30]) is None  # too few to fit on


def test_a_judge_that_knows_nothing_is_cooled_to_the_bound() -> None:
    rng = np.random.default_rng(0)
    odds = np.where(rng.random(400) < 0.5, 4.6, -4.6)
    found = recalibration(odds, rng.random(400) < 0.5, np.arange(400) % 2 == 0)
    assert found is not None and found["value"] > 5
    assert found["after"]["log_loss"]["value"] < 0.75 < found["before"]["log_loss"]["value"]  # a coin: 0.693 nats


# --- pair by pair --------------------------------------------------------------------------------------------


def filled(n: int, p: float, share_right: float) -> Calibration:
    """A judge that gives p to what it favours and is right in a share of pairs."""
    found = Calibration()
    for i in range(n):
        found.add(f"pair-{i}", p, float(i < share_right * n))
    return found


def test_summary_of_a_judge_that_is_too_sure() -> None:
    found = filled(1000, 0.9, 0.7).summary()
    assert found["n"] == 1000 and found["accuracy"]["value"] == 0.7
    assert found["kappa"]["value"] == pytest.approx(0.4, abs=0.02)  # 2 x 0.7 - 1: sides are thrown by the ids
    assert found["calibration_error"]["value"] == pytest.approx(0.2) == found["overconfidence"]["value"]
    assert found["calibration_error"]["low"] > found["error_by_chance"]
    assert found["brier"]["value"] == pytest.approx(0.7 * 0.01 + 0.3 * 0.81)
    assert [b["right"]["value"] for b in found["bins"]] == [0.7]
    assert found["temperature"]["value"] == pytest.approx(math.log(9) / math.log(7 / 3), rel=0.2)  # 0.9 → 0.7
    assert found["temperature"]["after"]["calibration_error"]["value"] < 0.1


def test_ties_count_half_and_peoples_ties_not_at_all() -> None:
    found = Calibration()
    for i in range(10):
        found.add(f"a{i}", 0.8, 1.0)
        found.add(f"b{i}", 0.5, 1.0)
        found.add(f"c{i}", 0.9, 0.5)
    summary = found.summary()
    assert (summary["n"], summary["judge_tied"], summary["people_tied"]) == (20, 10, 10)
    assert summary["accuracy"]["value"] == 0.75
    assert summary["kappa"]["value"] == 1 and summary["kappa"]["n"] == 10
    assert summary["temperature"] is None


def test_sides_and_halves_are_thrown_by_the_id_alone() -> None:
    ids = [f"pair-{i}" for i in range(2000)]
    sides = [flipped(i) for i in ids]
    assert sides == [flipped(i) for i in ids] and 0.45 < sum(sides) / 2000 < 0.55
    calibration = filled(2000, 0.8, 0.8)
    fit = np.array(calibration._fit, dtype=bool)
    assert 0.45 < fit.mean() < 0.55 and abs(np.corrcoef(fit, sides)[0, 1]) < 0.1  # four standard errors: 0.09


def test_nothing_labelled_is_nothing_measured() -> None:
    found = Calibration().summary()
    assert found["n"] == 0 and found["bins"] == [] and found["temperature"] is None and found["error_by_chance"] is None
    assert found["accuracy"]["value"] is None and found["kappa"]["value"] is None
    one = filled(1, 0.9, 1.0).summary()
    assert one["accuracy"]["value"] == 1 and one["accuracy"]["low"] < 0.3 and one["brier"]["low"] is None


def test_pairs_of_one_prompt_are_one_cluster_and_in_one_half() -> None:
    """The same 40 answers given five times are worth 40, and no prompt helps to fit what is measured on it."""
    rng, alone, many, apart = np.random.default_rng(0), Calibration(), Calibration(), Calibration()
    for prompt in range(40):
        p, human = float(rng.uniform(0.6, 0.9)), float(rng.random() < 0.7)
        alone.add(f"{prompt}", p, human, prompt=f"prompt {prompt}")
        for n in range(5):
            many.add(f"{prompt}/{n}", p, human, prompt=f"prompt {prompt}")
            apart.add(f"{prompt}/{n}", p, human)
    widths = {}
    for name, made in (("alone", alone), ("many", many), ("apart", apart)):
        found = made.summary()
        for key in ("accuracy", "brier", "log_loss", "calibration_error", "kappa", "overconfidence"):
            widths[name, key] = found[key]["high"] - found[key]["low"]
    for key in ("accuracy", "brier", "log_loss", "calibration_error", "overconfidence"):
        assert widths["many", key] > 0.85 * widths["alone", key] > 1.4 * widths["apart", key], key
    assert widths["many", "kappa"] > 1.3 * widths["apart", "kappa"]
    assert many.summary()["accuracy"]["clusters"] == 40 and "clusters" not in apart.summary()["accuracy"]
    halves = {(key, fit) for key, fit in zip(many._prompt, many._fit, strict=True)}
    assert len(halves) == 40 and {fit for _, fit in halves} == {0, 1}
    assert [z for z in many._odds[:5]] != [many._odds[0]] * 5  # the sides are thrown by the pair


def test_what_is_surer_than_a_probability_can_say_is_not_cut() -> None:
    found = Calibration()
    for i in range(10):
        found.add(f"{i}", 1.0, float(i > 0), odds=50.0)  # wrong in one of ten
    assert found.summary()["log_loss"]["value"] == pytest.approx(5.0)
