"""Why the five variants of bc_variants.py differ: an expert who does two things in the same place.

    python plots/two_modes.py                (a minute, writes plots/two_modes.png)

Half of the time the expert goes left and down, half of the time right and up. Each policy is trained on that and asked
for 400 samples, and for what it takes for the best action.
"""

import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bc_variants as bc  # noqa: E402

PATH = ROOT / "plots" / "two_modes.png"


def demonstrations(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One place, two ways: observations (N, 1) and actions (N, 2)."""
    side = torch.where(torch.arange(count)[:, None] % 2 == 0, 1.0, -1.0)
    return torch.zeros(count, 1), side * torch.tensor([0.7, 0.4]) + 0.05 * torch.randn(count, 2)


def trained(variant: str, obs: torch.Tensor, action: torch.Tensor, steps: int = 1_500) -> bc.Policy:
    args = bc.Args(variant=variant, hidden_size=64, num_bins=41)  # type: ignore[arg-type]
    policy = bc.VARIANTS[variant](1, -torch.ones(2), torch.ones(2), args)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(steps):
        bc.train_batch(policy, optimizer, obs, action, 256, 0.0)
    return policy.requires_grad_(False)


def main(path: Path = PATH) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    obs, action = demonstrations(1_000)
    figure, panels = plt.subplots(1, len(bc.VARIANTS), figsize=(15, 3.4), sharex=True, sharey=True)
    for axes, variant in zip(panels, bc.VARIANTS, strict=True):
        policy = trained(variant, obs, action)
        samples, best = policy.act(obs[:400], sample=True), policy.act(obs[:400])
        axes.scatter(*action[:400].T, s=30, color="0.8", label="expert")
        axes.scatter(*samples.T, s=6, alpha=0.5, color="tab:blue", label="samples")
        axes.scatter(*best.T, s=30, linewidths=1, marker="x", color="tab:red", label="best action")
        axes.set(title=variant, xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xlabel="action 1")
    panels[0].set_ylabel("action 2")
    panels[0].legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    main()
