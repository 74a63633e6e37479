"""Figures, tables and README rows from finished runs.

    python plots/figures.py                    every study that has finished runs
    python plots/figures.py q1                 this one
    python plots/figures.py --table-only       the README's tables again from the committed CSVs, without any runs

For each study of plots/studies.py it reads the TensorBoard event files of the finished run folders and writes
plots/NAME.png (the figure), plots/NAME.csv (one row per run and seed), plots/curves/NAME.csv (what the figure draws),
plots/NAME-RUN.png (pictures that the runs logged), and the table in README.md between `<!-- table: NAME -->` and
`<!-- end table: NAME -->`. The table is made from the CSV alone (`table_markdown`), so a number in the README is always
one that stands in a committed file. From all these CSVs it makes plots/glance.csv, the README's first table.

A run folder need not be kept. A run and seed that has none any more stays in the CSV and in the figure as it was, as
long as its command is still the catalogue's; where even its curve is not on file, its last value is drawn as a dot.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from studies import (
    HEADLINES,
    ROOT,
    STUDIES,
    Column,
    Panel,
    Parser,
    Run,
    Study,
    experiment,
    fail,
    find_study,
    finished_runs,
    full_command,
    read_note,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS = Path(__file__).resolve().parent
README = ROOT / "README.md"
# Okabe and Ito's colours, which colour-blind readers can tell apart; without their yellow, too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LEADING = ("study", "run", "setting", "command", "seed", "commit", "steps")
TRAILING = ("minutes", "reported", "target")
"""The columns around a study's metrics in its CSV."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading runs
# ---------------------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A scalar over one run: ascending steps and the value at each."""

    steps: np.ndarray
    values: np.ndarray


def read_events(folder: Path) -> Any:
    """All events of a run folder, also when a resume has added event files."""
    from tensorboard.backend.event_processing import event_accumulator

    everything = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)  # 0: no thinning out of long curves
    return event_accumulator.EventAccumulator(str(folder), size_guidance=everything).Reload()


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Every scalar of a run. A run without event files (tabular_mbrl.py) is read from its metrics.csv."""
    points: dict[str, dict[int, float]] = {}
    if any(folder.glob("*tfevents*")):
        events = read_events(folder)
        for tag in events.Tags()["scalars"]:
            # A killed run has logged steps beyond its checkpoint, which the resumed run logs again: the later counts.
            points[tag] = {event.step: event.value for event in events.Scalars(tag)}
    elif (folder / "metrics.csv").exists():
        with (folder / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                points.setdefault(row["tag"], {})[int(row["step"])] = float(row["value"])
    return {
        tag: Curve(np.array(sorted(at)), np.array([at[step] for step in sorted(at)], dtype=float))
        for tag, at in points.items()
    }


@dataclass(frozen=True)
class Finished:
    """One finished seed of a run: what it measured, and its row of the CSV."""

    seed: int
    curves: dict[str, Curve]
    row: dict[str, str]
    folder: Path | None
    """None: a run that is known from the committed files alone."""


def drawn_tags(study: Study) -> set[str]:
    """The tags that the study's figure needs."""
    tags = {tag for panel in study.panels for tag in (panel.tag, panel.x_tag, *(tag for tag, _ in panel.tags))}
    return tags | {tag for panel in study.panels for each in panel.series for _, _, tag in each.points}


def read_run(study: Study, run: Run, seed: int, folder: Path) -> Finished:
    """A finished run folder."""
    note, curves = read_note(folder), read_scalars(folder)
    command, commit = str(note.get("command", full_command(study, run, seed))), str(note.get("commit", "unknown"))
    if command != full_command(study, run, seed):
        print(f"{study.name}: {folder} was made by another command than the catalogue's", file=sys.stderr)
    row = {"study": study.name, "run": run.name, "setting": run.label, "command": command, "seed": str(seed)}
    row |= {"commit": commit, "steps": str(last_step(study, curves))}
    row |= {column.heading: cell(column, curves) for column in study.columns}
    row["minutes"] = f"{json.loads((folder / 'result.json').read_text())['minutes']:.3g}"
    return Finished(seed, curves, row, folder)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_committed(study: Study, run: Run) -> dict[int, Finished]:
    """The seeds of a run in plots/NAME.csv with their curves; those whose command has changed are left out."""
    committed = {}
    points = [row for row in read_rows(PLOTS / "curves" / f"{study.name}.csv") if row["run"] == run.name]
    for row in read_rows(PLOTS / f"{study.name}.csv"):
        seed = int(row["seed"])
        if row["run"] != run.name:
            continue
        if row["command"] != full_command(study, run, seed):
            print(f"{study.name}: dropped seed {seed} of {run.name}, by another command", file=sys.stderr)
            continue
        at: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            if int(point["seed"]) == seed:
                at.setdefault(point["tag"], []).append((int(point["step"]), float(point["value"])))
        for column in study.columns:
            if column.take == "last" and row.get(column.heading):
                at.setdefault(column.tag, [(int(row["steps"]), float(row[column.heading]))])
        committed[seed] = Finished(seed, {tag: Curve(*np.array(xy).T) for tag, xy in at.items()}, row, folder=None)
    return committed


def load_study(study: Study, log_dir: Path) -> dict[str, list[Finished]]:
    """The finished seeds of each run of a study, by the run's name, from run folders, else from the committed files."""
    loaded: dict[str, list[Finished]] = {}
    for run in study.runs:
        seeds = read_committed(study, run)
        for seed, folder in finished_runs(experiment(study, run), log_dir).items():
            seeds[seed] = read_run(study, run, seed, folder)
        loaded[run.name] = [seeds[seed] for seed in sorted(seeds)]
        missing = sorted(set(range(1, study.seeds + 1)) - set(seeds))
        if missing:
            print(f"{study.name}: {run.name} lacks seed {', '.join(map(str, missing))}", file=sys.stderr)
    return loaded


# ---------------------------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------------------------


def mean_and_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation (ddof=1) over the first axis, the seeds; nan for the std of a single seed."""
    if len(values) < 2:
        return values.mean(axis=0), np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), values.std(axis=0, ddof=1)


def lower_end(values: np.ndarray, log: bool) -> np.ndarray:
    """Mean − std over the seeds. A logarithm has no place for 0 and below: there it is the lowest seed's value."""
    mean, std = mean_and_std(values)
    lower: np.ndarray = mean - std
    return np.where(lower <= 0, values.min(axis=0), lower) if log else lower


def on_common_grid(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) that occur in any seed, and each seed's value there (seeds, T).

    Between its own steps a seed is interpolated linearly; after its last one it keeps its last value.
    """
    grid = np.unique(np.concatenate([curve.steps for curve in curves]))
    return grid, np.stack([np.interp(grid, curve.steps, curve.values) for curve in curves])


def whole_curves(seeds: list[Finished], tag: str) -> list[Curve]:
    """The seeds' curves. One of which the last value alone is left is shown only where there is nothing better."""
    curves = [seed.curves[tag] for seed in seeds if tag in seed.curves]
    return [curve for curve in curves if len(curve.steps) > 1] or curves


def draw_curves(axes: Axes, panel: Panel, study: Study, loaded: dict[str, list[Finished]]) -> None:
    """Mean line and ±std band over the seeds of each run."""
    for index, run in enumerate(study.runs):  # the index over all runs, so that a run has one colour in all panels
        curves = whole_curves(loaded[run.name], panel.tag)
        if not curves or (panel.runs and run.name not in panel.runs):
            continue
        grid, values = on_common_grid(curves)
        mean, std = mean_and_std(values)
        if panel.x_tag:  # the seeds' mean of another curve at the same steps
            others = [seed.curves[panel.x_tag] for seed in loaded[run.name] if panel.x_tag in seed.curves]
            if not others:  # a run of which the table alone is left
                continue
            grid = np.mean([np.interp(grid, other.steps, other.values) for other in others], axis=0)
        # With seven colours used up, the next seven runs are drawn dash-dotted (dashed lines are reported values).
        style = "-" if index < len(COLOURS) else "-."
        colour = COLOURS[index % len(COLOURS)]
        label = f"{run.label} (n = {len(curves)})"
        # A dot at the end: a run of a few steps would else be invisible beside one of many.
        axes.plot(grid, mean, style, color=colour, linewidth=1.8, marker="o", markersize=4, markevery=[-1], label=label)
        axes.fill_between(grid, lower_end(values, panel.log_y), mean + std, color=colour, alpha=0.2, linewidth=0)


def draw_tags(axes: Axes, panel: Panel, loaded: dict[str, list[Finished]]) -> None:
    """Mean line and ±std band over the seeds of each tag of one run."""
    for index, (tag, label) in enumerate(panel.tags):
        curves = whole_curves(loaded[panel.runs[0]], tag)
        if not curves:
            continue
        grid, values = on_common_grid(curves)
        mean, std = mean_and_std(values)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            grid, mean, color=colour, linewidth=1.8, marker="o", markersize=3, label=f"{label} (n = {len(curves)})"
        )
        axes.fill_between(grid, lower_end(values, panel.log_y), mean + std, color=colour, alpha=0.2, linewidth=0)


def draw_error_bars(axes: Axes, panel: Panel, loaded: dict[str, list[Finished]]) -> None:
    """Last values against a chosen x, mean ± std over the seeds."""
    ticks: set[float] = set()
    for index, series in enumerate(panel.series):
        points = []
        for x, run, tag in series.points:
            last = [seed.curves[tag].values[-1] for seed in loaded[run] if tag in seed.curves]
            if last:
                mean, std = mean_and_std(np.array(last))
                points.append((x, mean, mean - lower_end(np.array(last), panel.log_y), std, len(last)))
        if not points:
            continue
        xs, means, below, above, counts = zip(*points, strict=True)
        ticks.update(xs)
        n = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"
        colour = COLOURS[index % len(COLOURS)]
        label = f"{series.label} (n = {n})"
        axes.plot(xs, means, color=colour, marker="o", markersize=4, linewidth=1.5, label=label)
        axes.errorbar(xs, means, (below, above), color=colour, fmt="none", capsize=3)
    axes.set_xticks(sorted(ticks), [f"{x:g}" for x in sorted(ticks)])
    axes.minorticks_off()


def draw_heat(axes: Axes, panel: Panel, loaded: dict[str, list[Finished]]) -> None:
    """Last values as a map, mean over the seeds: a row for each series, a column for each x; what lacks stays white."""
    table = np.full((len(panel.series), len(panel.series[0].points)), np.nan)
    for row, series in enumerate(panel.series):
        for column, (_, run, tag) in enumerate(series.points):
            last = [seed.curves[tag].values[-1] for seed in loaded[run] if tag in seed.curves]
            if last:
                table[row, column] = np.mean(last)
                axes.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center")
    axes.imshow(table, cmap="viridis", vmin=0, vmax=1.2 * np.nanmax(table), aspect="auto")  # light enough for black
    axes.set_xticks(range(table.shape[1]), [f"{x:g}" for x, _, _ in panel.series[0].points])
    axes.set_yticks(range(table.shape[0]), [series.label for series in panel.series])


def runs_in(panel: Panel, study: Study) -> set[str]:
    """The names of the runs that a panel draws."""
    if panel.series:
        return {name for series in panel.series for _, name, _ in series.points}
    return set(panel.runs) or {run.name for run in study.runs}


def draw_figure(study: Study, panels: list[Panel], loaded: dict[str, list[Finished]], path: Path) -> None:
    """One PNG of about 900 pixels' width with these panels of the study side by side, three in a row."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    # Many curves, or narrow axes, leave no room for their names among them.
    outside = columns == 3 or any(panel.tags or len(runs_in(panel, study)) > 5 for panel in panels if not panel.heat)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(9, 0.8 + (4.4 if outside else 3.4) * rows),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        if panel.log_x:
            axes.set_xscale("log")
        if panel.log_y:
            axes.set_yscale("log")
        if panel.heat:
            draw_heat(axes, panel, loaded)
        elif panel.series:
            draw_error_bars(axes, panel, loaded)
        elif panel.tags:
            draw_tags(axes, panel, loaded)
        else:
            draw_curves(axes, panel, study, loaded)
            if not panel.log_x:
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 1M
        for index, reported in enumerate(panel.reported):
            dashes = (0, (5 - index % 3, 2))
            label = f"{reported.label} ({reported.source})"
            axes.axhline(reported.value, color="0.35", linestyle=dashes, linewidth=1.3, label=label)
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        if panel.heat:
            continue
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        below: dict[str, Any] = {}
        if outside:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2 if columns == 1 else 1}
        axes.legend(fontsize=8, framealpha=0.8, edgecolor="none", **below)
    figure.suptitle(study.title, fontsize=12)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_pictures(study: Study, loaded: dict[str, list[Finished]]) -> None:
    """Copy the picture that a run logged, as its first finished seed logged it last, to plots/STUDY-RUN.png."""
    for run in study.runs:
        folder = loaded[run.name][0].folder if run.picture and loaded[run.name] else None
        if folder is None:
            continue
        events = read_events(folder)
        if run.picture not in events.Tags()["images"]:
            print(f"{study.name}: {folder} has no picture {run.picture}", file=sys.stderr)
            continue
        (PLOTS / f"{study.name}-{run.name}.png").write_bytes(events.Images(run.picture)[-1].encoded_image_string)


# ---------------------------------------------------------------------------------------------------------------------
# The CSV
# ---------------------------------------------------------------------------------------------------------------------


def first_step(curve: Curve, hit: np.ndarray) -> float | str:
    """The first step at which `hit` is true, else "never"."""
    return int(curve.steps[hit][0]) if hit.any() else "never"


TAKE: dict[str, Callable[[Curve, float], float | str]] = {
    "last": lambda curve, _: curve.values[-1],
    "max": lambda curve, _: curve.values.max(),
    "mean": lambda curve, _: curve.values.mean(),
    "steps": lambda curve, _: int(curve.steps[-1]),
    "first_below": lambda curve, threshold: first_step(curve, curve.values < threshold),
    "first_above": lambda curve, threshold: first_step(curve, curve.values > threshold),
}


def cell(column: Column, curves: dict[str, Curve]) -> str:
    """A metric of one seed as it stands in the CSV; empty when the script never logged the tag."""
    if column.tag not in curves:
        return ""
    value = TAKE[column.take](curves[column.tag], column.threshold)
    return f"{value:.6g}" if isinstance(value, float) else str(value)  # event files hold float32: about 7 digits


def last_step(study: Study, curves: dict[str, Curve]) -> int:
    """How long the run was: the last step of the study's main curve, or of anything where the run has no such curve."""
    tags = [panel.tag for panel in study.panels if panel.tag in curves and not panel.series] or list(curves)
    return max((int(curves[tag].steps[-1]) for tag in tags), default=0)


def write_csv(study: Study, loaded: dict[str, list[Finished]]) -> None:
    """One row per run and seed, runs in the catalogue's order; and every point of the curves that the figure draws."""
    headings = [*LEADING, *(column.heading for column in study.columns), *TRAILING]
    (PLOTS / "curves").mkdir(exist_ok=True)
    with (
        (PLOTS / f"{study.name}.csv").open("w", newline="") as table,
        (PLOTS / "curves" / f"{study.name}.csv").open("w", newline="") as drawn,
    ):
        rows = csv.DictWriter(table, headings, restval="", extrasaction="ignore", lineterminator="\n")
        points = csv.writer(drawn, lineterminator="\n")
        rows.writeheader()
        points.writerow(["run", "seed", "tag", "step", "value"])
        for run in study.runs:
            for seed in loaded[run.name]:
                rows.writerow(seed.row | {"setting": run.label, "reported": run.reported, "target": run.target})
                for tag in sorted(drawn_tags(study) & set(seed.curves)):
                    for step, value in zip(*seed.curves[tag], strict=True):
                        points.writerow([run.name, seed.seed, tag, int(step), f"{value:.6g}"])


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def mean_std_text(cells: list[str]) -> str:
    """The seeds' cells as "mean ± std" (ddof=1), three significant digits of the larger; a single seed has no std."""
    if all(text == "" for text in cells):
        return "–"
    if all(text in ("", "never") for text in cells):
        return "never"
    numbers = [float(text) for text in cells if text not in ("", "never")]
    mean, std = (float(value) for value in mean_and_std(np.array(numbers)))
    size = abs(mean) if len(numbers) == 1 else max(abs(mean), std)
    if 0 < size < 1e-3 or not math.isfinite(size):
        form = ".1e"
    else:
        form = f".{max(0, 2 - math.floor(math.log10(size))) if size else 0}f"
    text = f"{mean:{form}}" if len(numbers) == 1 else f"{mean:{form}} ± {std:{form}}"
    # A mean over some of the seeds says so: a crossing that one seed never made must not look like all made it.
    return text if len(numbers) == len(cells) else f"{text} ({len(numbers)} of {len(cells)})"


def table_markdown(csv_path: Path) -> str:
    """The Markdown table of a CSV: a row per run, metrics as mean ± std over the seeds; no newline at its end.

    A CSV that is no study's (plots/speed.py writes one) has no seeds to average over and is shown as it is.
    """
    rows = read_rows(csv_path)
    if "seed" not in rows[0]:
        return markdown([[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)])
    metrics = [heading for heading in rows[0] if heading not in LEADING + TRAILING]
    # Reported values and targets get a column only where some run has one.
    texts = [heading for heading in ("reported", "target") if any(row[heading] for row in rows)]
    seeds_of: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        seeds_of.setdefault(row["run"], []).append(row)
    lines = [["setting", "n", *metrics, "minutes", *texts]]
    lines.append(["---", *["---:"] * (len(metrics) + 2), *["---"] * len(texts)])
    for seeds in seeds_of.values():
        numbers = [mean_std_text([row[heading] for row in seeds]) for heading in (*metrics, "minutes")]
        lines.append([seeds[0]["setting"], str(len(seeds)), *numbers, *(seeds[0][heading] or "–" for heading in texts)])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def refresh_readme(name: str) -> None:
    """Put the study's table between its markers in README.md; say so when they are not there."""
    start, end = f"<!-- table: {name} -->", f"<!-- end table: {name} -->"
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        print(f"{name}: {README.name} has no place for the table: put {start} and {end} there", file=sys.stderr)
        return
    README.write_text(f"{before}{start}\n{table_markdown(PLOTS / f'{name}.csv')}\n{end}{after}", encoding="utf-8")


def glance_rows() -> list[dict[str, str]]:
    """What the README shows first: the headlines that have rows in a study's CSV."""
    table = []
    for headline in HEADLINES:
        seeds = [row for row in read_rows(PLOTS / f"{headline.study}.csv") if row["run"] == headline.run]
        if seeds:
            steps = f"{max(int(row['steps']) for row in seeds):,}" if headline.acts else "–"
            row = {"task": headline.task, "script": seeds[0]["command"].split()[1], "environment steps": steps}
            row |= {heading: mean_std_text([seed[heading] for seed in seeds]) for heading in ("return", "minutes")}
            table.append(row | {"seeds": str(len(seeds)), "others report": seeds[0]["reported"] or "–"})
    return table


def write_glance() -> None:
    """plots/glance.csv and its table."""
    table = glance_rows()
    if table:
        with (PLOTS / "glance.csv").open("w", newline="") as file:
            rows = csv.DictWriter(file, [*table[0]], lineterminator="\n")
            rows.writeheader()
            rows.writerows(table)
        refresh_readme("glance")


def draw_study(study: Study, log_dir: Path) -> bool:
    """Figure, CSVs, pictures and README table of one study; False when nothing of it is finished."""
    on_file = (PLOTS / "curves" / f"{study.name}.csv").exists()
    if not on_file and not any(finished_runs(experiment(study, run), log_dir) for run in study.runs):
        return False
    loaded = load_study(study, log_dir)
    begun = [panel for panel in study.panels if any(loaded[name] for name in runs_in(panel, study))]
    if begun:  # a single number per run needs no figure
        draw_figure(study, begun, loaded, PLOTS / f"{study.name}.png")
    write_csv(study, loaded)
    write_pictures(study, loaded)
    refresh_readme(study.name)
    print(f"{study.name}: {sum(map(len, loaded.values()))} runs -> {PLOTS / study.name}.png and .csv")
    return True


def main(argv: list[str] | None = None) -> int:
    """Read the command line; return the exit code."""
    parser = Parser(
        prog="figures.py", description="Figures and tables from finished runs (plots/studies.py makes them)."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="studies (default: all that have something to show)")
    parser.add_argument("--log-dir", type=Path, default=ROOT / "runs", help="where the run folders are")
    parser.add_argument("--table-only", action="store_true", help="only the README's tables, from the committed CSVs")
    args = parser.parse_args(argv)

    named = [find_study(name) for name in args.names]
    empty = []
    for study in named or STUDIES:
        if args.table_only:
            done = (PLOTS / f"{study.name}.csv").exists()
            if done:
                refresh_readme(study.name)
        else:
            done = draw_study(study, args.log_dir.resolve())
        if not done:
            empty.append(study.name)
    write_glance()
    # Without names, a study that nobody has run yet is no mistake; with nothing at all to draw, it is.
    if empty and (named or len(empty) == len(STUDIES)):
        what = "no plots/NAME.csv yet" if args.table_only else f"nothing finished in {args.log_dir}"
        fail(f"{', '.join(empty)}: {what}; make the runs with: python plots/studies.py run {' '.join(empty)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
