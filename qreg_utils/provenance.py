"""Where numbers come from: which experiments made a figure, by which code, on what, and what of that is not the same.

``runs`` are the contents of run.json files by experiment id. What is flagged can change numbers, and need not: whether
two commits differ in what decides them is not known here. The summary shows it all, as HTML and Markdown.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from html import escape

import pandas as pd

from qreg_utils.metrics import CONFIGURATION
from qreg_utils.study import Experiment

Runs = Mapping[str, Mapping]
MINUS_FP32 = ("delta", "improvement", "relative_error_improvement")  # columns that hold differences to FP32
CODE = ("commit", "changes")
HARDWARE = ("platform", "processor", "cores", "threads", "GPU")
CHANGES = {True: "uncommitted changes", False: "no uncommitted changes", None: "unknown changes"}
UNKNOWN = "unknown commit"
MANY = 8  # experiments are counted and no longer named
# The row that a link has led to is marked.
STYLE = """<style>
.made-by tr:target td {background: #fff3c4; color: black}
.made-by th:first-child, .made-by td:first-child {text-align: left}
</style>"""
QUIET = 'style="font-size: 85%; opacity: 0.75"'


def made_by(experiments: Iterable[Experiment], *drawn: pd.DataFrame) -> list[str]:
    """The ids of those finished ``experiments`` that the rows in ``drawn`` come from, in the order of ``experiments``.

    Rows name their experiment, or else its configuration, with or without a seed. Differences to FP32 come from its
    experiment as well. Raises ValueError for rows that none of the ``experiments`` can have made.
    """
    experiments = list(experiments)
    names = set().union(*(_sources(experiments, rows) for rows in drawn if len(rows)))
    return [experiment.id for experiment in experiments if experiment.id in names]


def _sources(experiments: list[Experiment], rows: pd.DataFrame) -> set[str]:
    differences = bool(set(MINUS_FP32) & set(rows))
    named = "experiment" in rows and not differences
    keys = ["experiment"] if named else [*CONFIGURATION, *({"seed"} & set(rows))]
    makers: dict[tuple, set[str]] = {}
    for experiment in experiments:
        for seed in experiment.seeds:
            columns = {**experiment.columns, "seed": seed}
            makers.setdefault(tuple(columns[key] for key in keys), set()).add(experiment.id)
    drawn = set(rows[keys].itertuples(index=False, name=None))
    if unknown := drawn - set(makers):
        raise ValueError(f"rows of no finished experiment: {sorted(unknown)}")
    if differences:
        fp32 = {(dataset, model, "fp32", 32, 32, *seed) for dataset, model, _, _, _, *seed in drawn}
        drawn |= fp32 & set(makers)  # without it there is no difference
    return set().union(*(makers[key] for key in drawn))


def facts(runs: Runs) -> pd.DataFrame:
    """What numbers depend on besides the parameters: a row for each run, a column for each fact, in words.

    ultralytics' version is one of detectors alone.
    """
    known = pd.DataFrame([_facts(run) for run in runs.values()], index=list(runs))
    return known[[*CODE, *_versions(known), *HARDWARE]]


def _versions(known: pd.DataFrame) -> list[str]:
    return [name for name in known if name not in (*CODE, *HARDWARE)]


def _facts(run: Mapping) -> dict[str, str]:
    versions = {"Python": run["python"], **run["versions"]}
    if run["parameters"]["model"] != "yolov5n":
        versions.pop("ultralytics", None)
    return {
        "commit": run["commit"][:10] if run["commit"] else UNKNOWN,
        "changes": CHANGES[run["dirty"]],
        **{name: f"{name} {version}" for name, version in versions.items()},
        "platform": run["platform"],
        "processor": run["processor"],
        "cores": f"{run['cores'] or 'unknown'} cores",
        "threads": f"{run['threads']} thread" + ("s" if run["threads"] != 1 else ""),
        "GPU": run["gpu"] or "no GPU",
    }


def _flags(runs: Runs) -> Iterator[tuple[str, str]]:
    """What is not the same for all ``runs``, or not known: in a few words, and which experiments are meant."""
    known = facts(runs)
    commits = _groups(known["commit"][known["commit"] != UNKNOWN].map("commit `{}`".format))
    if len(commits) > 1:
        yield f"{len(commits)} code versions", _told(commits)
    for column, value in (("changes", CHANGES[True]), ("commit", UNKNOWN)):
        those = _groups(known[column]).get(value, [])
        if those and len(those) == len(known):
            yield value, "all experiments"
        elif those:
            yield f"{value} ({len(those)} of {len(known)})", _named(those)
    different = _different(known)
    for columns, what in ((_versions(known), "different versions of {}"), (HARDWARE, "different hardware ({})")):
        if differ := [name for name in columns if name in different]:
            together = known[differ].dropna(how="all").apply(lambda row: as_markdown(", ".join(row.dropna())), axis=1)
            yield what.format(", ".join(differ)), _told(_groups(together))


def _different(known: pd.DataFrame) -> list[str]:
    """The facts that are not the same for all; one that a run does not have is no difference."""
    return [name for name in known if len(known[name].dropna().unique()) > 1]


def _groups(values: pd.Series) -> dict[str, list[str]]:
    """The experiments of each value."""
    return {value: values.index[values == value].tolist() for value in values.unique()}


def _told(groups: dict[str, list[str]]) -> str:
    """Which experiments have which value; the most common one is that of the others."""
    *rare, (common, others) = sorted(groups.items(), key=lambda group: len(group[1]))
    rest = _named(others) if len(others) < 3 else f"the other {len(others)}"
    return "; ".join([*(f"{value}: {_named(names)}" for value, names in rare), f"{common}: {rest}"])


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more


def warnings(runs: Runs) -> list[str]:
    """Lines of Markdown that say what about the code and the machines behind ``runs`` is not the same, or not known."""
    return [f"**WARNING: {what}**: {which}" for what, which in _flags(runs)]


def as_markdown(text: str) -> str:
    """Foreign text that Markdown shows as it is: in a code span, unless nothing in it has a meaning in Markdown."""
    return text if re.fullmatch(r"[A-Za-z0-9 .,:;()/'%+=-]*", text) else "`" + text.replace("`", "'") + "`"


def caption(runs: Runs, published: str = "") -> str:
    """The quiet line under a figure, as HTML: the experiments that made it, and what to know about them.

    ``published`` is the file in results/published/ that the figure shows as well, or alone.
    """
    paper = f'<a href="../published/{escape(published)}">results/published/{escape(published)}</a>'
    if not runs:
        return f"<div {QUIET}>The paper's numbers: {paper}</div>"
    commits = _groups(facts(runs)["commit"])
    about = f"({'commit' if len(commits) == 1 else 'commits'} {', '.join(map(_code, commits))})"
    about += f" and the paper's numbers, {paper}" if published else ""
    if flags := "; ".join(what for what, _ in _flags(runs)):
        about += f" <b>⚠ {escape(flags)}</b>"
    if len(runs) == 1:
        return f"<div {QUIET}>Made by {_link(*runs)} {about}</div>"
    lines = [f"{_code(commit)}: {', '.join(map(_link, names))}" for commit, names in commits.items()]
    return (
        f"<details {QUIET}><summary>Made from {len(runs)} experiments {about}</summary>{'<br>'.join(lines)}</details>"
    )


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _link(experiment: str) -> str:
    return f'<a href="#{_anchor(experiment)}">{escape(experiment)}</a>'


def _anchor(experiment: str) -> str:
    return f"made-by-{escape(experiment)}"


def table(runs: Runs) -> str:
    """All ``runs`` as HTML, a row each, with the anchors that captions link to; what all share is said once, above.

    The links are for a page in results/<study>/.
    """
    known = facts(runs)
    differ = _different(known)
    values = {name: escape(known[name].dropna().iloc[0]) for name in known if name not in differ}
    if values.get("commit", UNKNOWN) != UNKNOWN:
        values["commit"] = f"commit <code>{values['commit']}</code>"
    same = ", ".join(values.values())
    above = f"<p>{'The same for all' if len(runs) > 1 else 'Made with'}: {same}.</p>" if same else ""
    header = ["experiment", *differ, "wall time, minutes", "peak memory, MiB", "finished (UTC)", "files"]
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    rows = "".join(_row(name, run, known.loc[name, differ].fillna("")) for name, run in runs.items())
    return f"{STYLE}{above}<table class='made-by'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(experiment: str, run: Mapping, differing: Iterable[str]) -> str:
    finished = datetime.fromisoformat(run["finished"]).astimezone(UTC)
    numbers = [f"{run['wall_seconds'] / 60:.1f}", str(run["peak_memory_mib"]), f"{finished:%Y-%m-%d %H:%M}"]
    name = escape(experiment)
    files = [f'<a href="{name}/{file}">{file}</a>' for file in ("notebook.ipynb", "run.json")]
    cells = [name, *map(escape, [*differing, *numbers]), ", ".join(files)]
    return f'<tr id="{_anchor(experiment)}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
