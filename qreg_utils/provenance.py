"""Where numbers come from: which experiments made a figure, by which code, on what, and what of that is not the same.

``runs`` are the contents of run.json files by experiment id. What is flagged can change numbers, and need not. Runs are
of one code version if the digest of the code that decides their numbers (``code``) is the same, whatever their commits;
an older run has no digest, and goes by its commit. The summary shows it all, as HTML and Markdown.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape

import pandas as pd

from qreg_utils.metrics import COMPARED_WITHIN, CONFIGURATION
from qreg_utils.names import DETECTION, Task, task_of
from qreg_utils.study import Experiment

Runs = Mapping[str, Mapping]
MINUS_FP32 = ("delta", "improvement", "relative_error_improvement")  # columns that hold differences to FP32
CODE_FACTS = ("commit", "code", "changes")
HARDWARE = ("platform", "processor", "cores", "threads", "GPU")
CHANGES = {True: "uncommitted changes", False: "no uncommitted changes", None: "unknown changes"}
UNKNOWN = "unknown commit"
MOST_NAMED_EXPERIMENTS = 8  # more are counted
# The row that a link has led to is marked.
STYLE = """<style>
.source-experiments tr:target td {background: #fff3c4; color: black}
.source-experiments th:first-child, .source-experiments td:first-child {text-align: left}
</style>"""
QUIET = 'style="font-size: 85%; opacity: 0.75"'


def source_experiments(experiments: Iterable[Experiment], *plotted: pd.DataFrame) -> list[str]:
    """The ids of those finished ``experiments`` that the rows in ``plotted`` come from, in their order.

    Rows name their experiment, or else its configuration, with or without a seed. Differences to FP32 come from its
    experiment as well. Raises ValueError for rows that none of the ``experiments`` can have made.
    """
    experiments = list(experiments)
    names = set().union(*(_sources(experiments, rows) for rows in plotted if len(rows)))
    return [experiment.id for experiment in experiments if experiment.id in names]


def _sources(experiments: list[Experiment], rows: pd.DataFrame) -> set[str]:
    differences = bool(set(MINUS_FP32) & set(rows))
    named = "experiment" in rows and not differences
    keys = ["experiment"] if named else [*CONFIGURATION, *({"seed"} & set(rows))]
    by_key: dict[tuple, set[str]] = {}
    for experiment in experiments:
        for seed in experiment.seeds:
            columns = {**experiment.columns, "seed": seed}
            by_key.setdefault(tuple(columns[key] for key in keys), set()).add(experiment.id)
    plotted = set(rows[keys].itertuples(index=False, name=None))
    if unknown := plotted - set(by_key):
        raise ValueError(f"rows of no finished experiment: {sorted(unknown)}")
    if differences:
        network, configuration = len(COMPARED_WITHIN), len(CONFIGURATION)
        fp32 = {(*key[:network], "fp32", 32, 32, *key[configuration:]) for key in plotted}
        plotted |= fp32 & set(by_key)  # without it there is no difference
    return set().union(*(by_key[key] for key in plotted))


def facts(runs: Runs) -> pd.DataFrame:
    """What numbers depend on besides the parameters: a row for each run, a column for each fact, in words.

    ultralytics' version is one of detectors alone; the digest of the code is left out where all runs are older.
    """
    known = pd.DataFrame([_facts(run) for run in runs.values()], index=list(runs))
    if not any(run.get("code") for run in runs.values()):
        known = known.drop(columns="code")
    code = [name for name in CODE_FACTS if name in known]
    return known[[*code, *_package_versions(known), *HARDWARE]]


def _package_versions(known: pd.DataFrame) -> list[str]:
    return [name for name in known if name not in (*CODE_FACTS, *HARDWARE)]


def _facts(run: Mapping) -> dict[str, str]:
    """Of all seeds of a run; where they differ, all that there are."""
    each = [_facts_of({**run, **entry}) for entry in run.get("seeds", {}).values()] or [_facts_of(run)]
    together = {name: " / ".join(dict.fromkeys(facts[name] for facts in each)) for name in each[0]}
    if CHANGES[True] in together["changes"].split(" / "):
        together["changes"] = CHANGES[True]
    return together


def _facts_of(run: Mapping) -> dict[str, str]:
    versions = {"Python": run["python"], **run["versions"]}
    if _task(run) != DETECTION:
        versions.pop("ultralytics", None)
    return {
        "commit": run["commit"][:10] if run["commit"] else UNKNOWN,
        "code": f"code {run['code']}" if run.get("code") else "unknown code",
        "changes": CHANGES[run["dirty"]],
        **{name: f"{name} {version}" for name, version in versions.items()},
        "platform": run["platform"],
        "processor": run["processor"],
        "cores": f"{run['cores'] or 'unknown'} cores",
        "threads": f"{run['threads']} thread" + ("s" if run["threads"] != 1 else ""),
        "GPU": run["gpu"] or "no GPU",
    }


def _task(run: Mapping) -> Task:
    return task_of(run["parameters"]["model"], run["parameters"].get("dataset"))


@dataclass
class CodeVersion:
    """The runs of one code version. A digest is of the code of one task, so there can be one for each."""

    digests: dict[str, str] = field(default_factory=dict)  # task -> digest
    commits: list[str] = field(default_factory=list)  # 40 hex digits, in the order in which they occur
    experiments: list[str] = field(default_factory=list)


def code_versions(runs: Runs) -> list[CodeVersion]:
    """The runs by code version, without those of which neither digest nor commit is known.

    Runs of one task with the same digest are of one version. Where one of two runs has no digest, or they are of
    different tasks, they are of two versions if their commits are known and differ.
    """
    alike: dict[tuple[str, str], CodeVersion] = {}
    for name, run in runs.items():
        task, digest = _task(run).name, run.get("code")
        if not digest and not run["commit"]:
            continue
        key = (task, digest) if digest else ("", run["commit"])
        version = alike.setdefault(key, CodeVersion(dict([key]) if digest else {}))
        version.experiments.append(name)
        if run["commit"] and run["commit"] not in version.commits:
            version.commits.append(run["commit"])
    versions: list[CodeVersion] = []
    for part in sorted(alike.values(), key=lambda version: not version.digests):  # those without join the others
        _join(versions, part)
    order = list(runs)
    for version in versions:
        version.experiments.sort(key=order.index)
    return sorted(versions, key=lambda version: order.index(version.experiments[0]))


def _join(versions: list[CodeVersion], part: CodeVersion) -> None:
    """Add ``part`` to the first of the ``versions`` that it belongs to, or as a version of its own."""
    for version in versions:
        conflict = any(version.digests.get(task, digest) != digest for task, digest in part.digests.items())
        known = version.commits and part.commits
        if not conflict and (not known or set(version.commits) & set(part.commits)):
            version.digests |= part.digests
            version.commits += [commit for commit in part.commits if commit not in version.commits]
            version.experiments += part.experiments
            return
    versions.append(part)


def _format_code_versions(versions: list[CodeVersion]) -> str:
    """Which experiments are of which version: by commit, and by digest where that does not tell them apart."""
    groups = {}
    for version in versions:
        shared = any(set(version.commits) & set(other.commits) for other in versions if other is not version)
        by_digest = [f"code `{digest}`" for digest in version.digests.values()]
        by_commit = [f"commit `{commit[:10]}`" for commit in version.commits]
        words = by_commit + (by_digest if shared or not by_commit else [])
        groups[", ".join(words)] = version.experiments
    return _format_groups(groups)


def _flags(runs: Runs) -> Iterator[tuple[str, str]]:
    """What is not the same for all ``runs``, or not known: in a few words, and which experiments are meant."""
    known = facts(runs)
    versions = code_versions(runs)
    if len(versions) > 1:
        yield f"{len(versions)} code versions", _format_code_versions(versions)
    for column, value in (("changes", CHANGES[True]), ("commit", UNKNOWN)):
        those = _groups(known[column]).get(value, [])
        if those and len(those) == len(known):
            yield value, "all experiments"
        elif those:
            yield f"{value} ({len(those)} of {len(known)})", _format_names(those)
    different = _different(known)
    for columns, what in (
        (_package_versions(known), "different versions of {}"),
        (HARDWARE, "different hardware ({})"),
    ):
        if differ := [name for name in columns if name in different]:
            together = known[differ].dropna(how="all").apply(lambda row: as_markdown(", ".join(row.dropna())), axis=1)
            yield what.format(", ".join(differ)), _format_groups(_groups(together))


def _different(known: pd.DataFrame) -> list[str]:
    """The facts that are not the same for all; one that a run does not have is no difference."""
    return [name for name in known if len(known[name].dropna().unique()) > 1]


def _groups(values: pd.Series) -> dict[str, list[str]]:
    """The experiments of each value."""
    return {value: values.index[values == value].tolist() for value in values.unique()}


def _format_groups(groups: dict[str, list[str]]) -> str:
    """Which experiments have which value; the most common one is that of the others."""
    *rare, (common, others) = sorted(groups.items(), key=lambda group: len(group[1]))
    rest = _format_names(others) if len(others) < 3 else f"the other {len(others)}"
    return "; ".join([*(f"{value}: {_format_names(names)}" for value, names in rare), f"{common}: {rest}"])


def _format_names(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED_EXPERIMENTS} more" if len(names) > MOST_NAMED_EXPERIMENTS else ""
    return ", ".join(names[:MOST_NAMED_EXPERIMENTS]) + more


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
    return f"source-{escape(experiment)}"


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
    filled = f"<table class='source-experiments'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"{STYLE}{above}{filled}"


def _row(experiment: str, run: Mapping, differing: Iterable[str]) -> str:
    finished = datetime.fromisoformat(run["finished"]).astimezone(UTC)
    numbers = [f"{run['wall_seconds'] / 60:.1f}", str(run["peak_memory_mib"]), f"{finished:%Y-%m-%d %H:%M}"]
    name = escape(experiment)
    files = [f'<a href="{name}/{file}">{file}</a>' for file in ("notebook.ipynb", "run.json")]
    cells = [name, *map(escape, [*differing, *numbers]), ", ".join(files)]
    return f'<tr id="{_anchor(experiment)}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
