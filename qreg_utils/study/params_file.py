"""The hardened reader of params files: YAML's plain types, bounded in size and depth, and none of its traps."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from qreg_utils.study.messages import StudyError, key_name, short

RESERVED = ("published", "scratch", "walkthroughs")  # folders of results/ that belong to no study
MAX_SIZE = 200_000  # bytes of a params file, and characters that it stands for with its aliases written out
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
AMBIGUOUS = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-9.]+)+)")  # octal (010) and sexagesimal (1:30) in YAML 1.1
MAX_DEPTH = 20  # of lists and mappings within each other


def check_study_name(path: Path) -> None:
    """The name becomes a folder of results/, and a word of the batch's shell commands."""
    if path.stem in RESERVED:
        raise StudyError(f"{path}: a study cannot be called {path.stem}: results/{path.stem} is for something else")
    if not re.fullmatch(r"\w[\w.-]{0,99}", path.stem):
        allowed = "1 to 100 letters, digits, _ - and ., of which the first is no - or ."
        raise StudyError(f"{key_name(str(path))}: a study cannot be called {short(path.stem)}: {allowed}")


def read_params_file(path: Path) -> dict:
    """The content of a params file, a mapping of plain values. Raises StudyError, in one line, and nothing else."""
    text = _read_text(path)
    try:
        content = _ParamsLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not valid YAML for a params file: {_format_yaml_error(error, text)}") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path}: {short(content)} is not allowed: a mapping with the keys common and grid")
    return content


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # /dev/zero has no end
            raise StudyError(f"{path}: not a file")
        with path.open("rb") as file:
            content = file.read(MAX_SIZE + 1)
        if len(content) > MAX_SIZE:
            raise StudyError(f"{path}: too large for a params file: more than {MAX_SIZE} bytes")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        studies = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise StudyError(f"{path}: no such file; studies there: {', '.join(studies) or 'none'}") from None
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: cannot be read: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:  # a path that no system would take is a ValueError
        raise StudyError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


class _ParamsLoader(yaml.SafeLoader):
    """YAML's plain types and none of its traps.

    Refused are duplicate keys, of which pyyaml takes the last, keys that are lists or mappings, and aliases that
    contain themselves or stand for gigabytes. A date stays text; so does a number that Python cannot hold.
    """

    def construct_undefined(self, node: yaml.Node) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _refused(
            node.start_mark, f"the tag {short(tag)} is not allowed: text, numbers, lists and mappings need none"
        )

    yaml_constructors: ClassVar = {
        f"tag:yaml.org,2002:{kind}": getattr(yaml.SafeLoader, f"construct_yaml_{kind}")
        for kind in ("null", "bool", "int", "float", "str", "seq", "map")
    } | {"tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str, None: construct_undefined}

    def __init__(self, text: str):
        super().__init__(text)
        self._measured: dict[yaml.Node, tuple[int, int]] = {}

    def get_single_node(self) -> yaml.Node | None:
        try:
            return super().get_single_node()
        except RecursionError:
            raise _refused(self.get_mark(), f"more than {MAX_DEPTH} levels") from None
        except (ArithmeticError, ValueError):  # pyyaml does not expect "\\Uffffffff"
            raise _refused(self.get_mark(), "a number that is too large") from None

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self._measured[node] = self._measure(node)
        elif node not in self._measured:
            raise _refused(event.start_mark, "an alias of something that it is in itself")
        return node

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        """How many characters and levels a node is, with its aliases written out."""
        if isinstance(node, yaml.ScalarNode):
            if re.search("[\ud800-\udfff]", node.value):
                raise _refused(node.start_mark, "half a character (a surrogate)")
            return len(node.value) + 1, 0
        pairs = node.value if isinstance(node, yaml.MappingNode) else zip(node.value)
        parts = [self._measured[part] for pair in pairs for part in pair]
        size = 1 + sum(size for size, _ in parts)
        levels = 1 + max((levels for _, levels in parts), default=0)
        if size > MAX_SIZE:
            raise _refused(node.start_mark, f"more than {MAX_SIZE} characters, with aliases written out")
        if levels > MAX_DEPTH:
            raise _refused(node.start_mark, f"more than {MAX_DEPTH} levels")
        return size, levels

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(key.start_mark, "a key must be text")
            if key.value in lines:
                raise _refused(
                    key.start_mark, f"{key_name(key.value)}: a duplicate key: line {lines[key.value]} has it already"
                )
            lines[key.value] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, LookupError, ValueError):  # thousands of digits, 1:59:...:59.5, !!int many
            return self.constructed_objects.setdefault(node, node.value)
        if isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS and AMBIGUOUS.fullmatch(node.value):
            raise _refused(node.start_mark, _two_readings(node.value, value))
        return value


def _two_readings(written: str, in_yaml_1_1: float) -> str:
    """What is said about a number that YAML 1.1 and 1.2 read differently: both readings, and what to write."""
    if ":" in written:
        reading = in_yaml_1_1
        return f"{short(written)} is not allowed: YAML 1.1 reads it as {reading}, YAML 1.2 as text: write {reading}"
    in_yaml_1_2 = int(written.replace("_", ""))
    meant = sorted({str(in_yaml_1_1), str(in_yaml_1_2)}, key=len, reverse=True)
    return (
        f"{short(written)} is not allowed: YAML 1.1 reads it as {in_yaml_1_1}, YAML 1.2 as {in_yaml_1_2}: "
        f"write {' or '.join(meant)}"
    )


def _refused(mark: yaml.Mark, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _format_yaml_error(error: yaml.YAMLError, text: str) -> str:
    """One line instead of pyyaml's several."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: character #x{error.character:02x} is not allowed"
    mark = error.problem_mark
    problem = ", ".join(filter(None, (error.context, error.problem)))[:200]  # it may name a tag of any length
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
