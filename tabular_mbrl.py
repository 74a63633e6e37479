# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy==2.4.6",
#     "tyro==1.0.17",
# ]
# ///
"""Certainty equivalence: what planning in a model made from counts costs, and which concentration bounds may be used.

A small Markov decision process: S states, A actions, rewards r(s, a) in [0, 1] that are known, transition probabilities
P(s'|s, a) that are not. N samples of each state-action pair give the model P̂(s'|s, a) = count / N, and whatever is
computed in it is taken at its word: the value V̂^π of a policy π, the optimal value V̂* and its policy π̂*. Values lie in
[0, 1/(1-γ)]. P_π is the matrix (S·A, S·A) of moving from one pair to the next when π acts.

The simulation lemma says what that costs, exactly, in two ways:

    Q^π - Q̂^π = γ (I - γ P̂_π)⁻¹ (P - P̂) V^π  =  γ (I - γ P_π)⁻¹ (P - P̂) V̂^π                                        (L)

    Proof. Q^π = r + γ P V^π and Q̂^π = r + γ P̂ V̂^π. Add and subtract γ P̂ V^π:  Q^π - Q̂^π = γ (P - P̂) V^π
    + γ P̂ (V^π - V̂^π), and P̂ (V^π - V̂^π) = P̂_π (Q^π - Q̂^π). Solve for the difference; the second form adds and
    subtracts γ P V̂^π instead.

(I - γ P_π)⁻¹ grows a vector by at most 1/(1-γ), so everything depends on ‖(P - P̂) V‖∞. Four statements about it, each
claimed with probability 1 - δ, for any π, even one that was chosen from the counts:

    (1) V = V̂^π, through rows:  ‖(P - P̂) V̂^π‖∞ ≤ max ‖P - P̂‖₁ / (1-γ),  max ‖P - P̂‖₁ ≤ √(4 S log(S A / δ) / N)      true
                                (the largest ‖P(·|s, a) - P̂(·|s, a)‖₁ of any pair)
    (2) V = V̂^π, by Hoeffding:  ‖(P - P̂) V̂^π‖∞ ≤ √(2 log(2 S A / δ) / N) / (1-γ)                                  false
    (3) V = V*, by Hoeffding:   the same bound                                                                  true
    (4) V = V̂*, by Hoeffding:   the same bound                                                      the argument fails

    Proof of (1). Weissman: P(‖p - p̂‖₁ ≥ ε) ≤ 2^S exp(-N ε² / 2) for one row; over S A rows the sum of these is δ at
    ε² = 2 (S log 2 + log(S A / δ)) / N, which is at most 4 S log(S A / δ) / N from two states on. It holds for all V at
    once, so also for one that was computed from the counts. Up to S log(S A / δ) samples the bound on rows says nothing
    (no two differ by more than 2), up to four times as many the one on values (they differ by at most 1/(1-γ)): 133 and
    534 with the defaults.
    Proof of (3). V* is fixed before any sample is drawn, so each entry of P̂ V* is a mean of N independent numbers in
    [0, 1/(1-γ)], and Hoeffding's inequality with a union over S A rows gives half the bound that is claimed.
    Why the argument fails for (2) and (4). An entry of P̂ V̂ is the average of N numbers V̂(s'_i). V̂ was computed
    from the counts, so each of them depends on all samples: they are not independent, and the expectation of their
    average need not be P V̂. Hoeffding does not apply. For (4), and for (2) with a π that is fixed before the data, a
    longer argument (leave-one-out: Agarwal, Kakade and Yang 2020) gives nearly the same rate. For (2) with a π that may
    depend on the counts no argument can: the counterexample.

    Counterexample to (2). N + 1 states, two actions. State 0 leads to one of the N others, all equally likely; those
    stay where they are for ever, and are worth 1/(1-γ) if π takes its good action there and 0 if not. Choose π after
    seeing the counts: good where p̂ > p, p̂ being the row of state 0 and its first action. Then (P̂ - P) V^π is half of
    ‖P - P̂‖₁ / (1-γ), about 0.37/(1-γ) for a row of as many samples as states, however large N is, while the bound
    falls as √(log N / N): in the default experiments it is broken in every draw from N = 400 on. (Statement (1) stands,
    but with as many states as samples it says nothing.)

The value lost by trusting the model follows from equation (L), once with π* and once with π̂*:

    ‖V* - V^π̂*‖∞ ≤ γ / (1-γ) (‖(P - P̂) V*‖∞ + ‖(P - P̂) V̂*‖∞)                                                       (T)

    Proof. V* - V^π̂* = (V* - V̂^π*) + (V̂^π* - V̂*) + (V̂* - V^π̂*). The second is not positive, for π̂* is the best in the
    model; the first is the lemma's first form with π = π*, the last its second form with π = π̂*.

Pseudocode:

    draw P (Dirichlet rows), r (uniform) and a policy π
    for each number of samples N, num_draws times:
        P̂ <- counts / N;  V̂^π, V̂*, π̂* <- the same equations with P̂ for P
        both sides of equations (L) and (T);  ‖(P - P̂) V‖∞ for V̂^π, V*, V̂*;  max ‖P - P̂‖₁;  inside the bounds?
        the counterexample with N successors: inside the bound?

Usage:

    python tabular_mbrl.py                                    # a few seconds
    python tabular_mbrl.py --num-states 50 --gamma 0.99

Every logged tag (metrics.csv; the step is N; means over the draws unless it says otherwise):

    check/simulation_lemma_error    largest violation of equation (L) in any draw and both of its forms: rounding, some
                                    1e-14 for the defaults, more where 1/(1-γ) is large (1e-8 for γ = 0.9999); more
                                    than rounding would end the run with an error
    error/l1                        max ‖P - P̂‖₁
    error/policy_value              ‖(P - P̂) V̂^π‖∞
    error/optimal_value             ‖(P - P̂) V*‖∞
    error/model_optimal_value       ‖(P - P̂) V̂*‖∞
    error/counterexample            ‖(P - P̂) V^π‖∞ of the counterexample
    bound/l1                        √(4 S log(S A / δ) / N)
    bound/l1_value                  that over 1-γ: the bound of statement (1)
    bound/hoeffding                 the bound of statements (2) to (4)
    bound/counterexample            the same for the counterexample's numbers of states and actions
    coverage/l1                     share of the draws inside the bound of statement (1); promised: 1 - δ
    coverage/policy_value           inside that of statement (2)
    coverage/optimal_value          inside that of statement (3)
    coverage/model_optimal_value    inside that of statement (4)
    coverage/counterexample         share of the draws of the counterexample inside the bound of statement (2)
    value/loss                      ‖V* - V^π̂*‖∞
    value/bound                     the right-hand side of equation (T)

With the defaults, the random problem is inside all four bounds in all draws (of 1,000: at least 99.7% of all, with 95%
confidence): they are loose, and its π is fixed before the data, for which (2) is nearly true. A bound that holds there
is not proved by it; the counterexample, whose π looks at the counts, is what tells (2) from (3).

Papers: Kearns and Singh 2002 (simulation lemma); Weissman et al. 2003 (the L1 bound); Agarwal, Kakade and Yang 2020,
arXiv 1906.03804; Agarwal, Jiang, Kakade and Sun, Reinforcement Learning: Theory and Algorithms, chapter 2.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tyro
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


@dataclass
class Args:
    exp_name: str = "tabular_mbrl"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of every random generator"""
    log_dir: str = "runs"
    """folder that holds the run folders"""
    num_states: int = 20
    """states of the random problem"""
    num_actions: int = 4
    """actions in each state"""
    concentration: float = 0.3
    """parameter of the Dirichlet distribution of its rows; small: few successors are likely"""
    gamma: float = 0.9
    """discount factor"""
    delta: float = 0.1
    """probability with which a bound may fail"""
    num_samples: tuple[int, ...] = (25, 50, 100, 200, 400, 800, 1_600)
    """samples of each state-action pair, one experiment each; also the successors of the counterexample"""
    num_draws: int = 1_000
    """data sets drawn for each number of samples"""


def fail(message: str) -> NoReturn:
    """Bad input ends with one clear line and exit code 2, before any work starts."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def require(condition: bool, message: str) -> None:
    if not condition:
        fail(message)


# Differs: the arguments do
def check_args(args: Args) -> None:
    for field in fields(args):
        require(getattr(args, field.name) != "", f"--{field.name.replace('_', '-')} is empty")
    size = len(args.exp_name.encode(errors="surrogateescape"))
    require(size <= 100, f"--exp-name has {size} bytes, at most 100 are allowed")
    require(0 <= args.seed < 2**32, f"--seed must lie in [0, 2^32), got {args.seed}")
    require(args.num_states >= 2, f"--num-states must be at least 2, got {args.num_states}")
    require(args.num_actions >= 1, f"--num-actions must be at least 1, got {args.num_actions}")
    pairs = args.num_states * args.num_actions
    require(pairs <= 5_000, f"{pairs} pairs of states and actions: the lemma's matrices would not fit, 5,000 do")
    require(args.num_draws >= 1, f"--num-draws must be at least 1, got {args.num_draws}")
    spread = f"--concentration must lie in (0, 1e6], got {args.concentration}"
    require(0 < args.concentration <= 1e6, spread)
    require(0 <= args.gamma <= 0.9999, f"--gamma must lie in [0, 0.9999]: values are endless sums; got {args.gamma}")
    require(0 < args.delta < 1, f"--delta must lie in (0, 1), got {args.delta}")
    rising = all(a < b for a, b in zip(args.num_samples, args.num_samples[1:], strict=False))
    fine = bool(args.num_samples) and min(args.num_samples) >= 1 and max(args.num_samples) <= 10**6 and rising
    require(fine, f"--num-samples must be rising numbers from 1 to 1,000,000, got {args.num_samples}")


# ------------------------------------------------------------------------------------------------------ algorithm
# P (S, A, S) transition probabilities, r (S, A) rewards, policy (S,) the action in each state, V (S,), Q (S, A)


def random_problem(rng: np.random.Generator, S: int, A: int, concentration: float) -> tuple[Array, Array]:
    return rng.dirichlet(np.full(S, concentration), size=(S, A)), rng.random((S, A))


def estimate(rng: np.random.Generator, P: Array, N: int) -> Array:
    """The certainty-equivalent model: N samples of each state-action pair, counted."""
    return rng.multinomial(N, P) / N


def policy_value(P: Array, r: Array, policy: NDArray[np.int64], gamma: float) -> Array:
    """V^π solves V(s) = r(s, π(s)) + γ P(.|s, π(s)) V."""
    rows = np.arange(len(r))
    V: Array = np.linalg.solve(np.eye(len(r)) - gamma * P[rows, policy], r[rows, policy])
    return V


def optimal_policy(P: Array, r: Array, gamma: float) -> tuple[NDArray[np.int64], Array]:
    """Policy iteration: π* and V*, up to rounding."""
    policy = r.argmax(axis=1)
    while True:
        V = policy_value(P, r, policy, gamma)
        Q = r + gamma * P @ V
        # Only what is better by more than rounding: among equals the policy would change for ever.
        better = Q.max(axis=1) > Q[np.arange(len(r)), policy] + 1e-12 / (1 - gamma)
        if not better.any():
            return policy, V
        policy = np.where(better, Q.argmax(axis=1), policy)


def pair_transitions(P: Array, policy: NDArray[np.int64]) -> Array:
    """P_π (S A, S A): from (s, a) to (s', π(s'))."""
    S, A, _ = P.shape
    moves = np.zeros((S, A, S, A))
    moves[:, :, np.arange(S), policy] = P
    return moves.reshape(S * A, S * A)


def simulation_lemma_error(P: Array, P_hat: Array, r: Array, policy: NDArray[np.int64], gamma: float) -> float:
    """Largest entry by which the two right-hand sides of equation (L) miss the left-hand side."""
    V, V_hat = (policy_value(model, r, policy, gamma) for model in (P, P_hat))
    gap = (gamma * P @ V - gamma * P_hat @ V_hat).ravel()  # Q - Q̂ (S A,): the rewards cancel
    identity = np.eye(r.size)
    first = np.linalg.solve(identity - gamma * pair_transitions(P_hat, policy), gamma * ((P - P_hat) @ V).ravel())
    second = np.linalg.solve(identity - gamma * pair_transitions(P, policy), gamma * ((P - P_hat) @ V_hat).ravel())
    return float(max(np.abs(gap - first).max(), np.abs(gap - second).max()))


def counterexample(rng: np.random.Generator, N: int, gamma: float) -> float:
    """‖(P - P̂) V̂^π‖∞ where π is chosen after seeing the counts.

    State 0 moves to one of N others, all equally likely, whatever it does. Those stay where they are, for ever: action
    0 there pays 1, action 1 pays 0. So their rows are estimated without error, and V̂^π = V^π is 1/(1-γ) or 0 there.
    """
    p = np.full(N, 1 / N)
    p_hat = rng.multinomial(N, p, size=2) / N  # (2, N): state 0's two actions
    good = p_hat[0] > p
    value = good / (1 - gamma)
    return float(np.abs((p - p_hat) @ value).max())  # no other row has any error


def l1_bound(S: int, A: int, N: int, delta: float) -> float:
    return math.sqrt(4 * S * math.log(S * A / delta) / N)


def hoeffding_bound(S: int, A: int, N: int, delta: float, gamma: float) -> float:
    return math.sqrt(2 * math.log(2 * S * A / delta) / N) / (1 - gamma)


def experiment(
    rng: np.random.Generator, P: Array, r: Array, policy: NDArray[np.int64], V_star: Array, N: int, args: Args
) -> dict[str, float]:
    """Everything that is logged for one number of samples."""
    S, A, gamma = args.num_states, args.num_actions, args.gamma
    lemma, draws = 0.0, []
    for _ in range(args.num_draws):
        P_hat = estimate(rng, P, N)
        model_policy, V_hat_star = optimal_policy(P_hat, r, gamma)
        V_hat = policy_value(P_hat, r, policy, gamma)
        lemma = max(lemma, simulation_lemma_error(P, P_hat, r, policy, gamma))
        errors = [np.abs((P - P_hat) @ V).max() for V in (V_hat, V_star, V_hat_star)]
        loss = np.abs(V_star - policy_value(P, r, model_policy, gamma)).max()
        l1 = np.abs(P - P_hat).sum(axis=2).max()
        draws.append([l1, *errors, loss, gamma / (1 - gamma) * (errors[1] + errors[2]), counterexample(rng, N, gamma)])
    if lemma > 1e-12 / (1 - gamma) ** 2:
        sys.exit(f"equation (L) is violated by {lemma:.1e}, which is more than rounding")
    l1s, policy_errors, optimal_errors, model_errors, losses, loss_bounds, counter_errors = np.array(draws).T
    l1_limit, hoeffding = l1_bound(S, A, N, args.delta), hoeffding_bound(S, A, N, args.delta, gamma)
    counter_hoeffding = hoeffding_bound(N + 1, 2, N, args.delta, gamma)
    metrics = {
        "check/simulation_lemma_error": lemma,
        "error/l1": l1s.mean(),
        "error/policy_value": policy_errors.mean(),
        "error/optimal_value": optimal_errors.mean(),
        "error/model_optimal_value": model_errors.mean(),
        "error/counterexample": counter_errors.mean(),
        "bound/l1": l1_limit,
        "bound/l1_value": l1_limit / (1 - gamma),
        "bound/hoeffding": hoeffding,
        "bound/counterexample": counter_hoeffding,
        "coverage/l1": (l1s <= l1_limit).mean(),
        "coverage/policy_value": (policy_errors <= hoeffding).mean(),
        "coverage/optimal_value": (optimal_errors <= hoeffding).mean(),
        "coverage/model_optimal_value": (model_errors <= hoeffding).mean(),
        "coverage/counterexample": (counter_errors <= counter_hoeffding).mean(),
        "value/loss": losses.mean(),
        "value/bound": loss_bounds.mean(),
    }
    return {tag: float(value) for tag, value in metrics.items()}


# ----------------------------------------------------------------------------------------------------------- main


# Differs: there is no environment to name
def new_run_dir(args: Args) -> Path:
    name, now = f"tabular__{args.exp_name}__{args.seed}".replace("/", "-"), int(time.time())
    while (run_dir := Path(args.log_dir) / f"{name}__{now}").exists():
        now += 1
    return run_dir


def main(args: Args) -> dict[str, float]:
    check_args(args)
    begin, rng = time.perf_counter(), np.random.default_rng(args.seed)
    P, r = random_problem(rng, args.num_states, args.num_actions, args.concentration)
    policy = rng.integers(args.num_actions, size=args.num_states)
    _, V_star = optimal_policy(P, r, args.gamma)
    run_dir = new_run_dir(args)
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        fail(f"--log-dir {args.log_dir}: {error.strerror}")
    (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
    print(f"{run_dir}: {args.num_states} states, {args.num_actions} actions, {args.num_draws} draws of each size")
    print("      N   lemma   |(P-P^)V*|  bound   inside of (2)  counterexample inside   value lost")
    with (run_dir / "metrics.csv").open("w") as file:
        file.write("step,tag,value\n")
        for N in args.num_samples:
            metrics = experiment(rng, P, r, policy, V_star, N, args)
            file.writelines(f"{N},{tag},{value!r}\n" for tag, value in metrics.items())
            file.flush()
            print(
                f"{N:7d}  {metrics['check/simulation_lemma_error']:.0e}  {metrics['error/optimal_value']:9.4f}"
                f"  {metrics['bound/hoeffding']:7.3f}  {metrics['coverage/policy_value']:10.0%}"
                f"  {metrics['coverage/counterexample']:20.0%}  {metrics['value/loss']:12.4f}",
                flush=True,
            )
    metrics["minutes"] = (time.perf_counter() - begin) / 60
    (run_dir / "result.json").write_text(json.dumps(metrics, indent=2))
    return metrics


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
