"""The page of tests.bench.gates: misses, false alarms and wrong places of every gate, and the picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from tests.bench.gate_list import BITS, CLOSE, DIFF, GATES, Gate
from tests.bench.outcomes import Examined

PARITY, README = "parity", "readme"  # the second is a family of its own: an example, counted in no table
_KINDS = {"first tensor, bits": BITS, "first tensor, 1e-3": DIFF, "first tensor, close": CLOSE}
NEAR, LOW = 5.0, 15.0  # percent: what has one label in the picture, and what has its label slanted above it
INTRODUCTION = """\
# What would the usual gates have said?

Made by `python -m tests.bench.gates`. Every run is a candidate beside transformers on the same tokens: right ones that
round otherwise (another attention, float32 inside, sums in another order), and ones with one planted bug that changes
at least one bit. *False alarms* are right candidates that a gate fails, *missed* are bugs that it passes, *wrong place*
bugs that it sees and puts at an operation that is right; most gates name no place. The gates look at the logits of all
positions, those of tensors at every activation in order. parity is asked for its verdict and for all it flags.
"""


@dataclass(frozen=True)
class Score:
    """How often a gate was wrong: false alarms among `clean` runs, misses and wrong places among `bugs`.

    `wrong_places` is None for a gate that names none; `seen` are the bugs that it does not miss.
    """

    name: str
    clean: int
    alarms: int
    bugs: int
    missed: int
    wrong_places: int | None

    @property
    def seen(self) -> int:
        """Bugs that are not missed."""
        return self.bugs - self.missed


def usable(runs: Iterable[Examined]) -> list[Examined]:
    """Runs that could be made and, where they have a bug, in which it changes anything."""
    return [run for run in runs if run.verdict != "not run" and (not run.bug or run.has_effect)]


def score(gate: Gate, runs: Sequence[Examined]) -> Score:
    """The score of a gate on usable runs."""
    clean, bugs = [run for run in runs if not run.bug], [run for run in runs if run.bug]
    seen = [run for run in bugs if not run.gates[gate.id]]
    wrong = sum(run.points[_KINDS[gate.id]] not in run.guilty for run in seen) if gate.names else None
    alarms = sum(not run.gates[gate.id] for run in clean)
    return Score(gate.id, len(clean), alarms, len(bugs), len(bugs) - len(seen), wrong)


def score_of_parity(runs: Sequence[Examined]) -> Score:
    """The score of parity on usable runs: a run that is inconclusive neither accuses nor finds."""
    clean, bugs = [run for run in runs if not run.bug], [run for run in runs if run.bug]
    seen = [run for run in bugs if run.verdict == "diverged"]
    wrong = sum(not run.is_placed for run in seen)
    alarms = sum(run.verdict == "diverged" for run in clean)
    return Score(PARITY, len(clean), alarms, len(bugs), len(bugs) - len(seen), wrong)


def page(runs: Sequence[Examined]) -> str:
    """The tables, by dtype and by family, and the sources."""
    shown = [run for run in runs if run.family == README]
    good = usable(run for run in runs if run.family != README)
    parts = [INTRODUCTION, "![Misses and false alarms of each gate](gates.svg)"]
    for dtype in ("bfloat16", "float32"):
        if mine := [run for run in good if run.dtype == dtype]:
            parts += ["", f"## {dtype}", "", *table(mine), "", *better(mine), *missed_by_parity(mine)]
    parts += ["", "## Missed bugs, by where they were planted", "", *by_family(good), ""]
    parts += [*(one_by_one(shown) if shown else []), "## Sources", ""]
    parts += [f"- {gate.id}: {gate.used_by}{f' ({gate.source})' if gate.source else ''}" for gate in GATES]
    return "\n".join(parts) + "\n"


def table(runs: Sequence[Examined]) -> list[str]:
    """All scores on these runs."""
    lines = ["| gate | false alarms | missed | wrong place |", "|---" * 4 + "|"]
    for each in scores(runs):
        place = "names none" if each.wrong_places is None else f"{each.wrong_places} of {each.seen}"
        name = f"**{each.name}**" if each.name == PARITY else each.name
        lines.append(f"| {name} | {each.alarms} of {each.clean} | {each.missed} of {each.bugs} | {place} |")
    return lines


def scores(runs: Sequence[Examined]) -> list[Score]:
    """Of every gate, and of parity last."""
    return [*(score(gate, runs) for gate in GATES), score_of_parity(runs)]


def better(runs: Sequence[Examined]) -> list[str]:
    """In which column a gate does better than parity."""
    *gates, ours = scores(runs)
    alarms = [each.name for each in gates if each.alarms < ours.alarms]
    missed = [each.name for each in gates if each.missed < ours.missed]
    places = [
        each.name for each in gates if each.wrong_places is not None and each.wrong_places < (ours.wrong_places or 0)
    ]
    columns = {"false alarms": alarms, "misses": missed, "wrong places": places}
    said = [f"Fewer {column} than parity: {', '.join(names)}." for column, names in columns.items() if names]
    return said or ["No gate does better than parity in any column."]


def missed_by_parity(runs: Sequence[Examined]) -> list[str]:
    """The bugs that parity passes."""
    missed = [f"{run.bug} in {run.model}" for run in runs if run.bug and run.verdict != "diverged"]
    return ["", f"parity misses: {', '.join(missed)}."] if missed else []


def by_family(runs: Sequence[Examined]) -> list[str]:
    """How many bugs each gate misses in each family, in both dtypes."""
    families = list(dict.fromkeys(run.family for run in runs))
    columns = {family: scores([run for run in runs if run.family == family]) for family in families}
    heads = [f"{family} ({columns[family][0].bugs})" for family in families]
    lines = ["| gate | " + " | ".join(heads) + " |", "|---" * (len(families) + 1) + "|"]
    for number, name in enumerate([*(gate.id for gate in GATES), PARITY]):
        lines.append(f"| {name} | " + " | ".join(str(columns[f][number].missed) for f in families) + " |")
    return lines


def one_by_one(runs: Sequence[Examined]) -> list[str]:
    """What each gate says of each run of the README's example."""
    lines = ["## The example of the README", "", f"| gate | {' | '.join(run.what for run in runs)} |"]
    lines.append("|---" * (len(runs) + 1) + "|")
    for gate in GATES:
        cells = ["passes" if run.gates[gate.id] else _failed(gate, run) for run in runs]
        lines.append(f"| {gate.id} | {' | '.join(cells)} |")
    return [*lines, f"| parity | {' | '.join(', '.join([run.verdict, *run.named]) for run in runs)} |", ""]


def _failed(gate: Gate, run: Examined) -> str:
    return f"fails at {run.points[_KINDS[gate.id]]}" if gate.names else "fails"


def _together(found: Sequence[Score]) -> dict[tuple[float, float], list[str]]:
    """Where each score is in the picture, with the names of all that are too near to it for a label of their own."""
    spots: dict[tuple[float, float], list[str]] = {}
    for each in found:
        x, y = 100 * each.alarms / max(each.clean, 1), 100 * each.missed / max(each.bugs, 1)
        near = (
            (x, y) if each.name == PARITY else next((s for s in spots if abs(s[0] - x) + abs(s[1] - y) < NEAR), (x, y))
        )
        spots.setdefault(near, []).append(each.name)
    return spots


def picture(runs: Sequence[Examined], path: Path) -> None:
    """False alarms across, misses upwards, in percent: the best gate is at the lower left."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "gates", "font.size": 9}
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    for spot, names in _together(scores(usable(run for run in runs if run.family != README))).items():
        ours, low = PARITY in names, spot[1] < LOW < spot[0]
        axes.plot(*spot, "o", color="#c0392b" if ours else "#34495e", markersize=10 if ours else 6, clip_on=False)
        axes.annotate(
            "\n".join(wrap(", ".join(names), 60)),
            spot,
            xytext=(2, 8) if low else (9, 0),
            textcoords="offset points",
            rotation=25 if low else 0,
            va="bottom" if low else "center",
            fontweight="bold" if ours else "normal",
        ).set_in_layout(False)
    axes.set(xlim=(-2, 102), ylim=(-2, None), xlabel="right candidates that are failed, %", ylabel="bugs that pass, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
