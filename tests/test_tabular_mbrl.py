"""tabular_mbrl.py: solutions against iteration, the lemma, the bounds, the counterexample."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import tabular_mbrl as tabular

S, A, GAMMA = 6, 3, 0.9


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    return rng, *tabular.random_problem(rng, S, A, 0.5), rng.integers(A, size=S)


def test_a_problem_is_one(problem):
    _, P, r, _ = problem
    assert P.shape == (S, A, S) and (P >= 0).all() and P.sum(axis=2) == pytest.approx(np.ones((S, A)))
    assert r.shape == (S, A) and r.min() >= 0 and r.max() <= 1


def test_values_are_what_iteration_gives(problem):
    _, P, r, policy = problem
    V, V_star = np.zeros(S), np.zeros(S)
    for _ in range(500):
        V = np.array([r[s, policy[s]] + GAMMA * P[s, policy[s]] @ V for s in range(S)])
        V_star = np.array([max(r[s, a] + GAMMA * P[s, a] @ V_star for a in range(A)) for s in range(S)])
    assert tabular.policy_value(P, r, policy, GAMMA) == pytest.approx(V, abs=1e-10)
    best, found = tabular.optimal_policy(P, r, GAMMA)
    assert found == pytest.approx(V_star, abs=1e-10)
    assert tabular.policy_value(P, r, best, GAMMA) == pytest.approx(V_star, abs=1e-10)


def test_policy_iteration_ends_among_equals():
    P, r = np.full((S, A, S), 1 / S), np.ones((S, A))
    _, V = tabular.optimal_policy(P, r, GAMMA)
    assert pytest.approx(np.full(S, 10.0)) == V


def test_pair_transitions_are_those_of_the_chain(problem):
    _, P, _, policy = problem
    moves = tabular.pair_transitions(P, policy)
    for s in range(S):
        for a in range(A):
            row = moves[s * A + a].reshape(S, A)
            assert row[np.arange(S), policy].tolist() == P[s, a].tolist() and row.sum() == pytest.approx(1.0)


def test_the_simulation_lemma_holds_and_a_wrong_one_would_not(problem, tmp_path):
    rng, P, r, policy = problem
    P_hat = tabular.estimate(rng, P, 20)
    assert tabular.simulation_lemma_error(P, P_hat, r, policy, GAMMA) < 1e-10
    assert tabular.simulation_lemma_error(P, P_hat, r, policy, 0.99) < 1e-10
    exact = tabular.pair_transitions
    try:  # (P - P̂) V^π with the chain of another policy is no identity
        tabular.pair_transitions = lambda P, policy: exact(P, (policy + 1) % P.shape[1])
        assert tabular.simulation_lemma_error(P, P_hat, r, policy, GAMMA) > 1e-3
        with pytest.raises(SystemExit) as exit:
            tabular.main(tabular.Args(log_dir=str(tmp_path), num_draws=2))
        assert "more than rounding" in str(exit.value.code)
    finally:
        tabular.pair_transitions = exact


def test_counts_are_means_and_get_better(problem):
    rng, P, _, _ = problem
    few, many = (np.abs(tabular.estimate(rng, P, N) - P).max() for N in (10, 100_000))
    assert many < 0.01 < few
    counts = tabular.estimate(rng, P, 10) * 10
    assert counts == pytest.approx(counts.round()) and counts.sum(axis=2) == pytest.approx(np.full((S, A), 10))


def test_bounds_are_the_formulas():
    assert tabular.l1_bound(20, 4, 100, 0.1) == pytest.approx((80 * np.log(800) / 100) ** 0.5)
    assert tabular.hoeffding_bound(20, 4, 100, 0.1, 0.9) == pytest.approx(10 * (2 * np.log(1600) / 100) ** 0.5)


def test_weissmans_bound_covers_the_worst_rows():
    """Uniform rows, which are the hardest: the bound that is claimed holds in every one of 200 draws."""
    rng, P = np.random.default_rng(0), np.full((20, 4, 20), 1 / 20)
    l1s = [np.abs(P - tabular.estimate(rng, P, 50)).sum(axis=2).max() for _ in range(200)]
    assert max(l1s) < tabular.l1_bound(20, 4, 50, 0.1) < 10 * np.mean(l1s)


def test_the_counterexample_breaks_the_fixed_bound_in_every_draw():
    rng = np.random.default_rng(0)
    draws = [tabular.counterexample(rng, 400, GAMMA) for _ in range(300)]
    assert min(draws) > tabular.hoeffding_bound(401, 2, 400, 0.1, GAMMA)
    # Half of the l1 distance, and that of 400 Poisson counts of mean one is 2 / e.
    assert np.mean(draws) == pytest.approx(10 / np.e, rel=0.03)


def test_the_counterexample_is_the_value_of_a_policy_in_the_model():
    """The whole problem written out: 401 states, policy from the counts, value by linear algebra."""
    N, rng = 30, np.random.default_rng(3)
    P = np.zeros((N + 1, 2, N + 1))
    P[0, :, 1:] = 1 / N
    P[np.arange(1, N + 1), :, np.arange(1, N + 1)] = 1.0
    r = np.zeros((N + 1, 2))
    r[1:, 0] = 1.0
    p_hat = rng.multinomial(N, np.full(N, 1 / N), size=2) / N
    P_hat = P.copy()
    P_hat[0, :, 1:] = p_hat
    policy = np.concatenate([[0], np.where(p_hat[0] > 1 / N, 0, 1)])
    V_hat = tabular.policy_value(P_hat, r, policy, GAMMA)
    error = np.abs((P - P_hat) @ V_hat).max()
    assert tabular.counterexample(np.random.default_rng(3), N, GAMMA) == pytest.approx(error)


def test_value_loss_is_within_equation_2():
    args = tabular.Args(num_states=5, num_actions=3, num_draws=30, gamma=0.9)
    rng = np.random.default_rng(0)
    P, r = tabular.random_problem(rng, 5, 3, 0.3)
    for N in (2, 20):
        metrics = tabular.experiment(rng, P, r, np.zeros(5, int), tabular.optimal_policy(P, r, 0.9)[1], N, args)
        assert 0 < metrics["value/loss"] <= metrics["value/bound"]


def test_main_writes_what_it_returns_and_repeats_itself(tmp_path):
    results = []
    for name in ("a", "b"):
        args = tabular.Args(log_dir=str(tmp_path / name), num_draws=5, num_samples=(10, 400))
        results.append(tabular.main(args))
        run_dir = next(Path(args.log_dir).iterdir())
        assert json.loads((run_dir / "result.json").read_text()) == results[-1]
        rows = list(csv.DictReader((run_dir / "metrics.csv").open()))
        assert {row["step"] for row in rows} == {"10", "400"}
        last = {row["tag"]: float(row["value"]) for row in rows if row["step"] == "400"}
        assert last == {tag: value for tag, value in results[-1].items() if tag != "minutes"}
        assert last["check/simulation_lemma_error"] < 1e-10 and last["coverage/counterexample"] == 0.0
        assert last["coverage/policy_value"] == last["coverage/optimal_value"] == 1.0
    assert all(results[0][tag] == results[1][tag] for tag in results[0] if tag != "minutes")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"gamma": 1.0}, "--gamma"),
        ({"delta": 0.0}, "--delta"),
        ({"num_samples": (10, 5)}, "--num-samples"),
        ({"num_samples": ()}, "--num-samples"),
        ({"num_states": 1}, "--num-states"),
        ({"num_states": 2_000}, "8000 pairs"),
        ({"exp_name": "x" * 101}, "--exp-name"),
        ({"log_dir": "/proc/no"}, "--log-dir"),
    ],
)
def test_bad_arguments(tmp_path, capfd, changes, words):
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        tabular.main(tabular.Args(**({"log_dir": str(tmp_path / "runs")} | changes)))
    lines = capfd.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()
