"""From a params file to the experiments of a study, all validated before anything runs.

A study is one YAML file: ``common`` holds what all experiments share, ``grid`` is a list of entries in which every
list is expanded. Each combination is one experiment: one configuration with a list of seeds, one notebook run.

A params file is not trusted: whatever is in it, it is a study or a StudyError. It cannot name a place outside the data
folder, and says nothing about where results go: that is ``results_dir``, a parameter of the notebooks which whoever
runs them gives on the command line.
"""

import itertools
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from qreg_utils.atomic import atomic_write
from qreg_utils.extensions import ExtensionError, load_extensions
from qreg_utils.names import METHODS, task_of
from qreg_utils.study.experiment import EXPERIMENTS, LISTS, THEORY, Experiment
from qreg_utils.study.messages import StudyError, key_name, short, unknown_key, validated
from qreg_utils.study.params_file import check_study_name, read_params_file

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,][A-Za-z0-9_.,-]{0,99}$")]  # goes to sbatch's command line
WORD = "1 to 100 characters of A-Z a-z 0-9 _ - . and comma, of which the first is no -"
Gres = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,50}(:[A-Za-z0-9_.]{1,50})?(:[0-9]{1,5})?$")]  # as sbatch has it
# between compared settings
MAY_DIFFER = {"method", "weight_bits", "activation_bits", "first_last_bits", "seeds"} | THEORY
MAX_EXPERIMENTS = 10_000
KEYS = ("description", "looks", "common", "grid")


class ClusterResources(BaseModel):
    """What a cluster job gets. No parameter of the experiment: the numbers must not depend on it.

    The defaults, which no file can give, mean that nothing is asked for.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    runtime: int = Field(0, ge=1, le=100_000, description="minutes, an integer from 1 to 100000")
    mem_mb: int = Field(0, ge=100, le=10_000_000, description="megabytes, an integer from 100 to 10000000")
    gres: Gres = Field("", description="such as gpu, gpu:1 or gpu:a100:1")
    slurm_partition: Word = Field("", description=WORD)
    slurm_account: Word = Field("", description=WORD)


@dataclass(frozen=True)
class Study:
    """A validated params file."""

    name: str
    description: str
    experiments: tuple[Experiment, ...]
    resources: Mapping[str, Mapping[str, int | str]]  # experiment id -> what the file asks for, {} where it does not
    looks: tuple[int, ...] = ()  # numbers of seeds at which it was planned to look at the verdicts; () for one look


def load_study(path: str | Path) -> Study:
    """Read, validate and expand a params file; its name is the study's.

    Raises StudyError, and nothing else, with one line for each mistake, before anything else happens.
    """
    path = Path(path)
    check_study_name(path)
    try:
        load_extensions()
    except ExtensionError as error:
        raise StudyError(str(error)) from None
    content = read_params_file(path)
    for key in content:
        if key not in KEYS:
            raise StudyError(f"{path}: {unknown_key(key, list(KEYS))}")
    description = "" if content.get("description") is None else content["description"]
    if not isinstance(description, str):
        raise StudyError(f"{path}: description: {short(description)} is not allowed: text")
    common, entries = _common_and_grid(path, content)
    common, for_all = _without_resources(common, f"{path}: common: ")
    experiments, resources = [], {}
    for position, entry in enumerate(entries):
        where = f"{path}: grid[{position}]: "
        entry, for_entry = _without_resources(entry, where)
        places = dict.fromkeys(common, f"{path}: common: ") | dict.fromkeys(entry, where)
        for values in _expand(entry):
            values = {**common, **values}
            experiment = validated(values, places, where, _kind(values), also=("resources",))
            experiments.append(experiment)
            resources[experiment.id] = for_all | for_entry
    _check_grid(path, experiments)
    return Study(path.stem, description.strip(), tuple(experiments), resources, _looks(path, content.get("looks")))


def write_params(study: Study, params_file: str | Path, results: Path) -> None:
    """Lay out ``results``: a copy of the params file, and params.yaml for each experiment (papermill's ``-f``).

    A file that already says the same, or the same for more seeds, is left alone, so that its time of change means
    something. Raises StudyError where this cannot be written; a folder that was not there before is then not there
    either.
    """
    new = not results.exists()
    try:
        _write_if_new(results / f"{study.name}.yaml", Path(params_file).read_bytes())
        for experiment in study.experiments:
            path = results / experiment.id / "params.yaml"
            if not _asks_for_all(path, experiment):
                _write_if_new(path, params_text(experiment).encode())
    except OSError as error:
        if new:
            shutil.rmtree(results, ignore_errors=True)
        raise StudyError(f"{results}: cannot be written: {error.strerror or error}") from None


def params_text(experiment: Experiment) -> str:
    """What params.yaml says of an experiment: all its parameters, for papermill's ``-f``."""
    return yaml.safe_dump(experiment.model_dump(), sort_keys=False)


def _asks_for_all(path: Path, experiment: Experiment) -> bool:
    """Whether a params.yaml asks for this experiment with all its seeds, and more of them."""
    try:
        written = type(experiment).model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    same = written.model_dump(exclude={"seeds"}) == experiment.model_dump(exclude={"seeds"})
    return same and len(experiment.seeds) > 1 and set(written.seeds) > set(experiment.seeds)


def _write_if_new(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    with atomic_write(path) as part:
        part.write_bytes(content)


def _looks(path: Path, looks: object) -> tuple[int, ...]:
    if looks is None:
        return ()
    numbers = isinstance(looks, list) and all(type(look) is int and 2 <= look <= 1000 for look in looks)
    if not looks or not numbers or looks != sorted(set(looks)):
        raise StudyError(f"{path}: looks: {short(looks)} is not allowed: a list of growing integers from 2 to 1000")
    return tuple(looks)


def _common_and_grid(path: Path, content: dict) -> tuple[dict, list[dict]]:
    common, grid = content.get("common"), content.get("grid")
    common = {} if common is None else common
    if not isinstance(common, dict):
        raise StudyError(f"{path}: common: {short(common)} is not allowed: a mapping of parameters")
    if not isinstance(grid, list) or not grid or not all(isinstance(entry, dict) for entry in grid):
        raise StudyError(f"{path}: grid: {short(grid)} is not allowed: a list of one or more mappings")
    for position, entry in enumerate(grid):
        for key, value in entry.items():
            if value == []:
                where = f"{path}: grid[{position}]: {key_name(key)}"
                raise StudyError(f"{where}: [] is not allowed: an empty list makes no experiment")
    if sum(math.prod(map(len, _choices(entry).values())) for entry in grid) > MAX_EXPERIMENTS:
        raise StudyError(f"{path}: grid: its lists make more than {MAX_EXPERIMENTS} experiments, which is not allowed")
    return common, grid


def _without_resources(parameters: dict, where: str) -> tuple[dict, dict[str, int | str]]:
    """The parameters proper, and the resources that were given beside them."""
    parameters = dict(parameters)
    given = parameters.pop("resources", None)
    if given is None:
        return parameters, {}
    if not isinstance(given, dict):
        allowed = ", ".join(ClusterResources.model_fields)
        raise StudyError(f"{where}resources: {short(given)} is not allowed: a mapping with any of {allowed}")
    return parameters, validated(given, {}, f"{where}resources.", ClusterResources).model_dump(exclude_unset=True)


def _kind(values: dict) -> type[Experiment]:
    """Which kind of experiment some parameters mean; where they mix the two, validation says what does not fit."""
    return EXPERIMENTS[task_of(values.get("model"), values.get("dataset")).name]


def _choices(entry: dict) -> dict[Any, list]:
    """What each key is expanded to: the lists of a grid, but for those that are kept together."""
    together = (*LISTS, "resources")
    return {key: value if isinstance(value, list) and key not in together else [value] for key, value in entry.items()}


def _expand(entry: dict) -> list[dict]:
    """Every combination of the entry's choices. Seeds become jobs of their own, lists of seeds a job each."""
    combinations = [dict(zip(entry, choice, strict=True)) for choice in itertools.product(*_choices(entry).values())]
    for values in combinations:
        if "seeds" in values and not isinstance(values["seeds"], list):
            values["seeds"] = [values["seeds"]]
    return combinations


def _check_grid(path: Path, experiments: list[Experiment]) -> None:
    """Ids are unique, settings that will be compared have the same data, budget, recipe and seeds, and the noise of a
    control has a source."""
    seen: dict[str, Experiment] = {}
    for experiment in experiments:
        if experiment.id in seen:
            hint = "" if experiment.variant else "; a word as variant keeps settings apart that differ in nothing else"
            raise StudyError(f"{path}: grid: {experiment.id} is there twice{hint}")
        seen[experiment.id] = experiment
    for experiment in experiments:
        source = experiment.noise_source
        if source and not _trained_alike(source, seen.get(source.id)):
            raise StudyError(
                f"{path}: grid: {experiment.id} has the noise of {source.id}, which is missing; "
                f"add method: {source.method}, weight_bits: {_as_yaml(source.weight_bits)}, activation_bits: "
                f"{_as_yaml(source.activation_bits)}, with the same seeds and first_last_bits: {source.first_last_bits}"
            )
    for compared in _compared(experiments):
        _check_recipe(path, compared)
        _check_seeds(path, compared)


def _as_yaml(bits: int | None) -> str:
    return "null" if bits is None else str(bits)


def _trained_alike(experiment: Experiment, other: Experiment | None) -> bool:
    return other is not None and experiment.training_parameters() == other.training_parameters()


def _compared(experiments: list[Experiment]) -> list[list[Experiment]]:
    """The experiments that are compared with each other: those of one data set, network and variant."""
    groups: dict[tuple, list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault((experiment.dataset, experiment.model, experiment.variant), []).append(experiment)
    return list(groups.values())


def _check_recipe(path: Path, compared: list[Experiment]) -> None:
    """An ordinary regularizer may differ by its strength."""
    reference, *others = sorted(compared, key=lambda experiment: bool(METHODS[experiment.method].strength))
    for experiment in others:
        may_differ = MAY_DIFFER | {METHODS[experiment.method].strength}
        for key in (name for name in type(experiment).model_fields if name not in may_differ):
            ours, theirs = getattr(experiment, key), getattr(reference, key)
            if ours != theirs:
                raise StudyError(
                    f"{path}: {key}: {short(theirs)} for {reference.id} but {short(ours)} for {experiment.id}; "
                    "settings that are compared need the same, or a variant of their own"
                )


def _check_seeds(path: Path, compared: list[Experiment]) -> None:
    """Settings that are compared have the same seeds, or some of full precision's, where there is that."""
    seeds: dict[str, set[int]] = {}
    for experiment in sorted(compared, key=lambda experiment: experiment.method != "fp32"):
        name = "-".join(filter(None, (experiment.dataset, experiment.model, experiment.variant, experiment.setting)))
        seeds.setdefault(name, set()).update(experiment.seeds)
    (reference, expected), *others = seeds.items()
    some_will_do = any(experiment.method == "fp32" for experiment in compared)
    for setting, found in others:
        if found != expected and not (some_will_do and found < expected):
            raise StudyError(
                f"{path}: seeds: {short(sorted(expected))} for {reference} but {short(sorted(found))} for {setting}; "
                f"settings that are compared need {'some of these' if some_will_do else 'the same'}"
            )
