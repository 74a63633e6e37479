"""The study launcher and the figures: known numbers in, the same numbers out; broken runs resumed, failures said."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PLOTS = Path(__file__).resolve().parents[1] / "plots"
sys.path.insert(0, str(PLOTS))
import figures  # noqa: E402
import studies  # noqa: E402
from studies import Column, Panel, Reported, Run, Series, Study  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Fake runs for the figures
# ---------------------------------------------------------------------------------------------------------------------

TOY = Study(
    name="toy",
    title="A toy study",
    shows="Nothing.",
    seeds=3,
    runs=(
        Run("a", "python toy.py --x 1", 1, "setting A", "", "10 ± 2", "≥ 10", "pictures/predictions"),
        Run("b", "python toy.py --x 2", 1, "setting B | wide"),
    ),
    panels=(
        Panel("loss", "loss", log_y=True, reported=(Reported("course", 0.2, "handout"),)),
        Panel("", "score", log_x=True, series=(Series("A and B", ((1, "a", "score"), (10, "b", "score"))),)),
    ),
    columns=(
        Column("first < 0.2", "loss", "first_below", 0.2),
        Column("final loss", "loss"),
        Column("score", "score"),
        Column("absent", "no/such/tag"),
    ),
)
PICTURES = {"a": 10, "b": 200}  # grey levels


def write_run(
    log_dir: Path, run: str, seed: int, losses: dict[int, float], score: float, resumed: bool = False
) -> Path:
    """A finished run folder as a script leaves it; `resumed`: killed once, its first event file has junk at the end."""
    from torch.utils.tensorboard import SummaryWriter

    folder = log_dir / f"envs-Toy-v0__toy-{run}__{seed}__170000000{seed}"
    writer = SummaryWriter(str(folder))
    steps = sorted(losses)
    for step in steps:
        if resumed and step == steps[len(steps) // 2]:
            writer.add_scalar("loss", 1e-9, step)  # logged after the last checkpoint: the resumed run says otherwise
            writer.add_scalar("loss", 1e-9, step + 1)  # never logged again: only purge_step drops it
            writer.close()
            (first,) = folder.glob("*tfevents*")
            first.write_bytes(first.read_bytes() + struct.pack("<Q", 100))  # a kill cuts a record in half
            time.sleep(1.1)  # event files are read in the order of their names, which begin with the second
            writer = SummaryWriter(str(folder), purge_step=step)
        writer.add_scalar("loss", losses[step], step)
    writer.add_scalar("score", score, steps[-1])
    # Seed 1's picture is the one to be copied; two of them, of which the last counts.
    for level in (255, PICTURES[run] + seed):
        writer.add_image("pictures/predictions", np.full((3, 4, 4), level, dtype=np.uint8), steps[-1] + level)
    writer.close()
    (folder / "result.json").write_text(json.dumps({"minutes": 2.0 * seed, "loss": losses[steps[-1]]}))
    return folder


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy study with seeds 1 and 2 of A (2 was resumed), seed 1 of B, and an unfinished one; its log directory."""
    log_dir = tmp_path_factory.mktemp("runs")
    write_run(log_dir, "a", 1, {0: 1.0, 10: 0.5, 20: 0.19, 30: 0.1}, score=4.0)
    write_run(log_dir, "a", 2, {0: 1.0, 10: 0.4, 20: 0.3, 40: 0.15}, score=7.0, resumed=True)
    write_run(log_dir, "b", 1, {0: 1.0, 30: 0.2}, score=-22422.4)  # 0.2 is not below 0.2
    (write_run(log_dir, "b", 2, {0: 9.0, 30: 9.0}, score=9.0) / "result.json").unlink()
    note = {"study": "toy", "run": "a", "seed": 1, "command": studies.full_command(TOY, TOY.runs[0], 1)}
    folder = studies.finished_runs("toy-a", log_dir)[1]
    (folder / "study.json").write_text(json.dumps(note | {"commit": "abc1234+def5678"}))
    return log_dir


@pytest.fixture
def toy(toy_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy study as the catalogue, a README with its markers and an empty folder for the results; the runs."""
    (tmp_path / "plots").mkdir()
    (tmp_path / "README.md").write_text(
        "before\n<!-- table: toy -->\nold\n<!-- end table: toy -->\nbetween\n<!-- table: q1 -->\nq1 stays\n"
        "<!-- end table: q1 -->\nafter\n"
    )
    monkeypatch.setattr(figures, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(figures, "README", tmp_path / "README.md")
    monkeypatch.setattr(studies, "STUDIES", (TOY,))
    monkeypatch.setattr(figures, "STUDIES", (TOY,))
    return toy_runs


TABLE = """\
| setting | n | first < 0.2 | final loss | score | absent | minutes | reported | target |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |
| setting A | 2 | 30.0 ± 14.1 | 0.125 ± 0.035 | 5.50 ± 2.12 | – | 3.00 ± 1.41 | 10 ± 2 | ≥ 10 |
| setting B \\| wide | 1 | never | 0.200 | -22422 | – | 2.00 | – | – |"""


def test_figures_end_to_end(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figure, CSV, picture and README from fake runs; what is missing is said."""
    assert figures.main(["toy", "--log-dir", str(toy)]) == 0
    output = capsys.readouterr()
    assert "toy: a lacks seed 3" in output.err
    assert "toy: b lacks seed 2, 3" in output.err
    assert "made by another command" not in output.err

    with (tmp_path / "plots" / "toy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"]) for row in rows] == [("a", "1"), ("a", "2"), ("b", "1")]
    assert [row["first < 0.2"] for row in rows] == ["20", "40", "never"]
    assert [row["final loss"] for row in rows] == ["0.1", "0.15", "0.2"]
    assert [row["score"] for row in rows] == ["4", "7", "-22422.4"]
    assert [row["steps"] for row in rows] == ["30", "40", "30"]
    assert [row["minutes"] for row in rows] == ["2", "4", "2"]
    assert [row["commit"] for row in rows] == ["abc1234+def5678", "unknown", "unknown"]
    assert rows[0]["command"] == "python toy.py --x 1 --exp-name toy-a --seed 1 --num-threads 1"
    assert rows[0]["absent"] == ""

    png = (tmp_path / "plots" / "toy.png").read_bytes()
    assert png[:4] == b"\x89PNG" and len(png) < 200_000
    width = struct.unpack(">I", png[16:20])[0]
    assert 850 <= width <= 950

    from PIL import Image

    assert Image.open(tmp_path / "plots" / "toy-a.png").getpixel((0, 0)) == (11, 11, 11)  # seed 1's last one
    assert not (tmp_path / "plots" / "toy-b.png").exists()  # run b names no picture

    assert figures.table_markdown(tmp_path / "plots" / "toy.csv") == TABLE
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith(f"before\n<!-- table: toy -->\n{TABLE}\n<!-- end table: toy -->\nbetween\n")
    assert "old" not in readme and "\nq1 stays\n" in readme and readme.endswith("\nafter\n")


def test_a_heat_map_shows_each_value_in_its_place(toy: Path) -> None:
    import matplotlib.pyplot as plt

    loaded = figures.load_study(TOY, toy)
    last = {run: np.mean([seed.curves["score"].values[-1] for seed in loaded[run]]) for run in ("a", "b")}
    series = (Series("up", ((1, "a", "score"), (2, "b", "score"))), Series("down", ((1, "b", "score"),)))
    series = (series[0], Series("down", (*series[1].points, (2, "a", "none"))))
    figure, axes = plt.subplots()
    figures.draw_heat(axes, Panel("", "score", heat=True, series=series), loaded)
    shown = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(shown, [[last["a"], last["b"]], [last["b"], np.nan]])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["up", "down"]
    assert [text.get_text() for text in axes.texts] == [f"{last[run]:.2f}" for run in ("a", "b", "b")]
    plt.close(figure)


def test_a_panel_none_of_whose_runs_has_finished_is_left_out(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in toy.glob("*toy-a*"):
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    monkeypatch.setattr(figures, "PLOTS", tmp_path)
    monkeypatch.setattr(figures, "README", tmp_path / "README.md")
    drawn: list[str] = []
    monkeypatch.setattr(figures, "draw_figure", lambda study, panels, *_: drawn.extend(p.title for p in panels))
    score = Series("score", ((1, "a", "score"), (2, "b", "score")))
    others = (Panel("loss", "", title="a", runs=("a",)), Panel("loss", "", title="b", runs=("b",)))
    others += (Panel("", "", title="both", series=(score,)), Panel("loss", "", title="all"))
    figures.draw_study(dataclasses.replace(TOY, panels=others), tmp_path / "runs")
    assert drawn == ["a", "both", "all"]


def test_the_picture_of_two_modes_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import two_modes

    trained = two_modes.trained
    monkeypatch.setattr(two_modes, "trained", lambda variant, obs, action: trained(variant, obs, action, steps=3))
    two_modes.main(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    obs, action = two_modes.demonstrations(2_000)
    assert obs.shape == (2_000, 1) and action.shape == (2_000, 2)
    for side in (-1, 1):
        rows = action[action[:, 0] * side > 0]
        assert len(rows) == 1_000
        np.testing.assert_allclose(rows.mean(0), [side * 0.7, side * 0.4], atol=0.02)


def test_table_only_needs_no_runs(toy: Path, tmp_path: Path) -> None:
    """The README follows the committed CSV alone; without a CSV there is one line and exit code 2."""
    with pytest.raises(SystemExit) as ended:
        figures.main(["toy", "--table-only", "--log-dir", str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert figures.main(["--log-dir", str(toy)]) == 0
    path = tmp_path / "plots" / "toy.csv"
    path.write_text(path.read_text().replace("-22422.4", "-13600"))
    assert figures.main(["--table-only", "--log-dir", str(tmp_path / "nowhere")]) == 0
    assert "| -13600 |" in (tmp_path / "README.md").read_text()


def test_the_first_table_sums_up_the_studies(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows are means over the seeds in the CSVs; what has not run is left out; each call of figures.py makes it."""
    headlines = (studies.Headline("A toy", "toy", "a"), studies.Headline("None", "toy", "c"))
    headlines += (studies.Headline("B, no steps", "toy", "b", acts=False), studies.Headline("None", "missing", "a"))
    monkeypatch.setattr(figures, "HEADLINES", headlines)
    (tmp_path / "plots" / "toy.csv").write_text(
        "study,run,setting,command,seed,commit,steps,return,minutes,reported,target\n"
        "toy,a,A,python toy.py --x 1,1,c,3000,4,1,10 ± 2,\ntoy,a,A,python toy.py --x 1,2,c,3000,7,3,10 ± 2,\n"
        "toy,b,B,python other.py,1,c,30,-22422.4,2,,\n"
    )
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: glance -->\n<!-- end table: glance -->\n")
    assert figures.main(["toy", "--table-only"]) == 0
    assert readme.read_text().splitlines()[3:-1] == [
        "| A toy | toy.py | 3,000 | 5.50 ± 2.12 | 2.00 ± 1.41 | 2 | 10 ± 2 |",
        "| B, no steps | other.py | – | -22422 | 2.00 | 1 | – |",
    ]


def test_the_committed_first_table_is_of_the_committed_rows() -> None:
    for headline in studies.HEADLINES:
        assert headline.run in [run.name for run in studies.find_study(headline.study).runs], headline
    assert figures.read_rows(figures.PLOTS / "glance.csv") == figures.glance_rows()


def test_runs_that_are_no_more_stay_in_table_and_figure(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows and curves come from the committed files where a folder is gone, and from the folder where there is one."""
    assert figures.main(["toy", "--log-dir", str(toy)]) == 0
    plots = tmp_path / "plots"
    files = {path: path.read_bytes() for path in (plots / "toy.csv", plots / "curves" / "toy.csv", plots / "toy.png")}
    (plots / "toy.png").unlink()
    assert figures.main(["toy", "--log-dir", str(tmp_path / "nowhere")]) == 0
    assert {path: path.read_bytes() for path in files} == files
    with (plots / "curves" / "toy.csv").open() as file:
        points = [(row["run"], row["seed"], row["step"], row["value"]) for row in csv.DictReader(file)]
    assert ("a", "2", "40", "0.15") in points and len(points) == 13

    write_run(tmp_path / "new", "a", 2, {0: 1.0, 40: 0.125}, score=8.0)
    assert figures.main(["toy", "--log-dir", str(tmp_path / "new")]) == 0
    with (plots / "toy.csv").open() as file:
        assert [row["final loss"] for row in csv.DictReader(file)] == ["0.1", "0.125", "0.2"]

    # Without the curves, the last values are what is left to draw.
    (plots / "curves" / "toy.csv").unlink()
    curves = figures.load_study(TOY, tmp_path / "nowhere")["a"][0].curves
    assert [(tag, *curve.steps, *curve.values) for tag, curve in curves.items()] == [
        ("loss", 30, 0.1),
        ("score", 30, 4),
    ]
    # They would be a flat line beside another seed's curve.
    seeds = figures.load_study(TOY, tmp_path / "new")["a"]
    drawn = figures.whole_curves(seeds, "loss")
    assert [seed.seed for seed in seeds] == [1, 2] and [curve.values.tolist() for curve in drawn] == [[1.0, 0.125]]
    assert [len(curve.steps) for curve in figures.whole_curves(seeds[:1], "loss")] == [1]

    capsys.readouterr()
    changed = dataclasses.replace(TOY, runs=(dataclasses.replace(TOY.runs[0], command="python toy.py --x 9"),))
    assert figures.load_study(changed, tmp_path / "nowhere") == {"a": []}
    assert "dropped seed 1 of a, by another command" in capsys.readouterr().err


def test_nothing_finished_exits_2(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        figures.main(["toy", "--log-dir", str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert "python plots/studies.py run toy" in capsys.readouterr().err


def test_readme_without_markers_is_said(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("no markers\n")
    assert figures.main(["toy", "--log-dir", str(toy)]) == 0
    assert "<!-- table: toy -->" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "no markers\n"


def test_resumed_run_counts_each_step_once(toy: Path) -> None:
    """What a killed run logged after its checkpoint is dropped, whether or not the resumed run logs that step again."""
    curve = figures.read_scalars(studies.finished_runs("toy-a", toy)[2])["loss"]
    assert curve.steps.tolist() == [0, 10, 20, 40]
    np.testing.assert_allclose(curve.values, [1.0, 0.4, 0.3, 0.15], rtol=1e-6)


def test_metrics_csv_is_read_without_event_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,tag,value\n0,x,1.5\n20,x,2.5\n10,x,2\n0,y,7\n")
    scalars = figures.read_scalars(tmp_path)
    assert scalars["x"].steps.tolist() == [0, 10, 20] and scalars["x"].values.tolist() == [1.5, 2.0, 2.5]
    assert scalars["y"].values.tolist() == [7.0]


def test_mean_and_std_over_seeds_on_a_common_grid() -> None:
    """Union of the steps, linear in between, last value kept; the std is the sample's (ddof=1)."""
    long = figures.Curve(np.array([0, 10, 20]), np.array([0.0, 10.0, 20.0]))
    short = figures.Curve(np.array([0, 5, 10]), np.array([2.0, 2.0, 4.0]))
    grid, values = figures.on_common_grid([long, short])
    assert grid.tolist() == [0, 5, 10, 20]
    assert values.tolist() == [[0, 5, 10, 20], [2, 2, 4, 4]]
    mean, std = figures.mean_and_std(values)
    assert mean.tolist() == [1, 3.5, 7, 12]
    np.testing.assert_allclose(std, [statistics.stdev(pair) for pair in zip(*values.tolist(), strict=True)])
    assert np.isnan(figures.mean_and_std(values[:1])[1]).all()  # one seed has no spread, so no band of width 0
    low = np.array([[1.0, 9.0, 1.0], [9.0, 11.0, 2.0]])  # mean − std is below 0, and twice not
    np.testing.assert_allclose(figures.lower_end(low, log=True), [1.0, 10 - 2**0.5, 1.5 - 0.5**0.5])
    np.testing.assert_allclose(figures.lower_end(low, log=False), [5 - 32**0.5, 10 - 2**0.5, 1.5 - 0.5**0.5])


@pytest.mark.parametrize(
    ("take", "threshold", "expected"),
    [
        ("last", np.nan, "2"),
        ("max", np.nan, "9"),
        ("mean", np.nan, "4"),
        ("steps", np.nan, "30"),
        ("first_below", 2.0, "10"),
        ("first_above", 1.0, "0"),
        ("first_above", 3.0, "20"),
        ("first_below", 1.0, "never"),
    ],
)
def test_column_takes_one_number_from_a_curve(take: str, threshold: float, expected: str) -> None:
    curve = figures.Curve(np.array([0, 10, 20, 30]), np.array([4.0 - 1.0, 1.0, 9.0 + 1e-12, 2.0 + 1e-12]))
    if take == "mean":
        curve = curve._replace(values=np.array([3.0, 1.0, 9.0, 3.0]))
    assert figures.cell(Column("x", "tag", take, threshold), {"tag": curve}) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "2", "3"], "2.00 ± 1.00"),
        (["4204.4", "5000.1"], "4602 ± 563"),
        (["0.5"], "0.500"),
        (["10", "20", "never"], "15.0 ± 7.1 (2 of 3)"),
        (["never", "never"], "never"),
        (["", ""], "–"),
        (["1e-7", "3e-7"], "2.0e-07 ± 1.4e-07"),
        (["0", "0"], "0 ± 0"),
        (["nan", "1"], "nan ± nan"),
    ],
)
def test_mean_std_text(cells: list[str], expected: str) -> None:
    assert figures.mean_std_text(cells) == expected


# ---------------------------------------------------------------------------------------------------------------------
# The launcher, with a stub for a script
# ---------------------------------------------------------------------------------------------------------------------

STUB = """
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("mode", "exp-name", "seed", "num-threads", "log-dir", "resume"):
    parser.add_argument(f"--{name}")
args = parser.parse_args()
if args.resume:
    folder = pathlib.Path(args.resume)
else:
    folder = pathlib.Path(args.log_dir or "runs") / f"Stub-v0__{args.exp_name}__{args.seed}__{time.time_ns()}"
    folder.mkdir(parents=True)
with (folder / "seen.txt").open("a") as seen:  # what this process was started with
    seen.write(json.dumps([sys.argv[1:], os.environ.get("OMP_NUM_THREADS"), os.getcwd()]) + "\\n")
if args.mode == "fail":
    sys.exit("ValueError: the horizon is 0")
if args.mode == "break":
    (folder / "checkpoint.pt").write_text("")
    sys.exit("killed halfway")
if args.mode == "wait":
    def stop(signum, frame):
        time.sleep(0.3)  # a checkpoint takes a while: the launcher has to wait for it
        (folder / "checkpoint.pt").write_text(str(signum))
        sys.exit(1)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").write_text("")
    time.sleep(20)
if args.mode != "silent":
    (folder / "result.json").write_text(json.dumps({"minutes": 1.5}))
"""


def stub_study(*modes: str, name: str = "stub") -> Study:
    runs = tuple(Run(mode, f"python stub.py --mode {mode}", 1, mode) for mode in modes)
    return Study(name, "Stubs", "Nothing.", runs, (Panel("loss", "loss"),), (), seeds=2)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository root with the stub in it and no git history."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.setattr(studies, "current_commit", lambda: "abc1234")
    return tmp_path


def launch(root: Path, monkeypatch: pytest.MonkeyPatch, catalogue: tuple[Study, ...], *arguments: str) -> int:
    monkeypatch.setattr(studies, "STUDIES", catalogue)
    return studies.main(["run", *arguments, "--log-dir", str(root / "runs")])


def seen(folder: Path) -> list[list[object]]:
    return [json.loads(line) for line in (folder / "seen.txt").read_text().splitlines()]


def test_run_finishes_and_is_skipped_then(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two seeds run once, from the root, with one thread; study.json is left; the second call starts nothing."""
    catalogue = (stub_study("ok"),)
    assert launch(root, monkeypatch, catalogue, "stub") == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"started +stub-ok seed [12]", output)) == 2
    assert len(re.findall(r"finished stub-ok seed [12] in 1.5 minutes", output)) == 2
    folders = studies.finished_runs("stub-ok", root / "runs")
    assert list(folders) == [1, 2]
    arguments = ["--mode", "ok", "--exp-name", "stub-ok", "--seed", "1", "--num-threads", "1"]
    assert seen(folders[1]) == [[arguments, "1", str(root)]]
    assert studies.read_note(folders[2]) == {
        "study": "stub",
        "run": "ok",
        "seed": 2,
        "command": "python stub.py --mode ok --exp-name stub-ok --seed 2 --num-threads 1",
        "commit": "abc1234",
    }
    assert (root / "runs" / "stub-ok__1.log").exists()

    assert launch(root, monkeypatch, catalogue, "stub") == 0
    output = capsys.readouterr().out
    assert output.count("skipped") == 2 and "started" not in output
    assert len(list((root / "runs").glob("Stub-v0*"))) == 2

    # A finished run of another command is not silently taken for the catalogue's.
    changed = Run("ok", "python stub.py --mode silent", 1, "ok")
    launch(root, monkeypatch, (Study("stub", "", "", (changed,), (), ()),), "stub", "--seeds", "1")
    assert "another command" in capsys.readouterr().out


def test_failed_run_exits_1_with_its_last_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure is said with exit code and the log's last line, the others run on; no result.json is a failure too."""
    catalogue = (stub_study("fail", "silent", "ok"),)
    assert launch(root, monkeypatch, catalogue, "stub", "--seeds", "1") == 1
    output = capsys.readouterr().out
    assert "failed   stub-fail seed 1: exit code 1: ValueError: the horizon is 0" in output
    assert "failed   stub-silent seed 1: exit code 0, but it wrote no result.json" in output
    assert "finished stub-ok seed 1" in output
    # Without a checkpoint there is nothing to resume: the next call leaves the folder and starts a fresh one.
    assert launch(root, monkeypatch, catalogue, "stub", "--seeds", "1") == 1
    assert "started  stub-fail seed 1" in capsys.readouterr().out
    assert len(studies.run_folders("stub-fail", root / "runs")[1]) == 2


def test_broken_run_is_resumed(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint without a result is continued with --resume and nothing else; both commits are on record."""
    catalogue = (stub_study("break"),)
    assert launch(root, monkeypatch, catalogue, "stub", "--seeds", "1") == 1
    assert "killed halfway" in capsys.readouterr().out
    monkeypatch.setattr(studies, "current_commit", lambda: "def5678-dirty")
    assert launch(root, monkeypatch, catalogue, "stub", "--seeds", "1") == 0
    assert "resumed  stub-break seed 1" in capsys.readouterr().out
    (folder,) = studies.run_folders("stub-break", root / "runs")[1]
    assert seen(folder)[1][0] == ["--resume", str(folder)]
    assert studies.read_note(folder)["commit"] == "abc1234+def5678-dirty"


def test_shared_run_is_run_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that names another's experiment reuses its run."""
    shared = Run("again", "python stub.py --mode ok", 1, "again", exp_name="stub-ok")
    other = Study("other", "", "", (shared,), (), ())
    assert launch(root, monkeypatch, (stub_study("ok"), other), "stub", "other", "--seeds", "1", "--workers", "1") == 0
    assert len(list((root / "runs").glob("Stub-v0*"))) == 1


def test_log_dir_is_passed_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log directory that is not the default reaches the script, but not the command on record."""
    monkeypatch.setattr(studies, "STUDIES", (stub_study("ok"),))
    assert studies.main(["run", "stub", "--seeds", "1", "--log-dir", str(root / "elsewhere")]) == 0
    (folder,) = studies.finished_runs("stub-ok", root / "elsewhere").values()
    assert "elsewhere" not in str(studies.read_note(folder)["command"])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_reaches_the_children_and_is_waited_for(root: Path, signum: signal.Signals) -> None:
    """The launcher passes the signal on, waits for the checkpoint, starts nothing more and exits with 128 + n."""
    driver = root / "driver.py"
    driver.write_text(
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(PLOTS)!r}); import studies\n"
        "from studies import Run, Study\n"
        "studies.ROOT = Path(__file__).parent\n"
        "runs = (Run('wait', 'python stub.py --mode wait', 1, 'wait'),)\n"
        "studies.STUDIES = (Study('stub', '', '', runs, (), ()),)\n"
        "sys.exit(studies.main(['run', 'stub', '--workers', '2', '--log-dir', str(studies.ROOT / 'runs')]))\n"
    )
    launcher = subprocess.Popen([sys.executable, str(driver)], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 10
        while len(list(root.glob("runs/*/ready"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        launcher.send_signal(signum)
        output, _ = launcher.communicate(timeout=10)
    finally:
        launcher.kill()
    assert launcher.returncode == 128 + signum
    assert [path.read_text() for path in root.glob("runs/*/checkpoint.pt")] == [str(int(signum))] * 2
    assert output.count("started") == 2 and output.count("stopped") == 2  # seed 3 was waiting and stays so


def test_running_run_is_not_started_twice(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a process of an earlier launcher lives, another launcher leaves its run alone."""
    monkeypatch.setattr(studies, "STUDIES", (stub_study("wait"),))
    (root / "runs").mkdir()
    job = studies.Job(studies.STUDIES[0], studies.STUDIES[0].runs[0], 1, root / "runs")
    assert job.start()
    assert job.process is not None
    try:
        assert launch(root, monkeypatch, studies.STUDIES, "stub", "--seeds", "1") == 0
        assert "another launcher is running it" in capsys.readouterr().out
    finally:
        job.process.kill()
        job.process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The command line and the catalogue
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nope"], "unknown study 'nope'; the studies are: "),
        (["show", "nope"], "unknown study 'nope'; the studies are: "),
        (["run", "q1", "--seeds", "0"], "--seeds"),
        (["run", "q1", "--workers", "two"], "--workers"),
        (["run"], "NAME"),
        ([], "action"),
    ],
)
def test_bad_input_exits_2_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        studies.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_list_and_show(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studies.main(["list", "--log-dir", str(toy)]) == 0
    # 2 runs, 3 seeds, 6 minutes; 3 of 6 finished and 1 started.
    assert re.search(r"^toy +2 +3 +6 +3/6 +1 +A toy study$", capsys.readouterr().out, re.MULTILINE)
    assert studies.main(["show", "toy", "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [studies.full_command(TOY, run, 1) for run in TOY.runs]
    assert lines[1] == "python toy.py --x 1 --exp-name toy-a --seed 1 --num-threads 1"


def test_commit_says_dirty_and_survives_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert studies.current_commit() == "unknown"

    def git(*arguments: str) -> None:
        subprocess.run(("git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments), cwd=tmp_path, check=True)

    git("init", "--quiet")
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "notes.md").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    clean = studies.current_commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "notes.md").write_text("2")  # only Python files change what a run does
    (tmp_path / "new.py").write_text("untracked")
    assert studies.current_commit() == clean
    (tmp_path / "a.py").write_text("2")
    assert studies.current_commit() == f"{clean}-dirty"


def test_catalogue_is_consistent() -> None:
    """Names are unique, panels and columns name runs that exist, and a shared experiment has one command."""
    assert len({study.name for study in studies.STUDIES}) == len(studies.STUDIES)
    commands: dict[str, str] = {}
    for study in studies.STUDIES:
        names = [run.name for run in study.runs]
        assert len(set(names)) == len(names)
        for run in study.runs:
            command = f"{run.command} {run.extra_flags}"
            assert commands.setdefault(studies.experiment(study, run), command) == command
            assert run.command.startswith("python ") and "--seed" not in command and "--exp-name" not in command
            assert "__" not in studies.experiment(study, run)  # it separates the parts of a run folder's name
        for panel in study.panels:
            assert set(panel.runs) <= set(names)
            assert {run for series in panel.series for _, run, _ in series.points} <= set(names)
        headings = [column.heading for column in study.columns]
        assert len(set(headings)) == len(headings)
        assert not set(headings) & {*figures.LEADING, *figures.TRAILING}
