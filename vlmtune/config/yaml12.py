"""Read and write YAML 1.2: `1e-5` is a number, `2:8` and `no` are texts, and a key given twice is an error.

PyYAML follows YAML 1.1: there `1e-5` is a text, `2:8` is 128, `no` is false, and the later of two equal keys
silently replaces the earlier one.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml


class YamlError(Exception):
    """Text that is no YAML, or holds a key twice. The message says at which line."""


MERGE = "tag:yaml.org,2002:merge"
MAX_NODES = 10_000  # values and keys of a text
MAX_CHARACTERS = 500_000
MAX_ALIASES = 1_000
MAX_MERGED = 10_000  # keys of a mapping, with those that `<<` brings


class _Loader(yaml.SafeLoader):
    """Counts what it builds: aliases let some lines stand for a text of any size."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise YamlError(f"has {len(text):,} characters; {MAX_CHARACTERS:,} are allowed")
        super().__init__(text)
        self._nodes = self._aliases = 0
        self._in_merge = False  # the node that is composed is the value of `<<:`

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise YamlError(f"line {line}: more than {MAX_NODES:,} values")
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if not self._merged(parent, index) or self._aliases > MAX_ALIASES:
                raise YamlError(
                    f"line {line}: an alias (*name) may only stand behind `<<:`; write the value out"
                )
        before = self._in_merge
        self._in_merge = isinstance(index, yaml.ScalarNode) and index.tag == MERGE
        if isinstance(parent, yaml.SequenceNode):
            self._in_merge = False
        node: yaml.Node | None = super().compose_node(parent, index)
        self._in_merge = before
        return node

    def _merged(self, parent: yaml.Node | None, index: Any) -> bool:
        """Whether the value of `<<:`, or an entry of a list there, comes next."""
        in_list = isinstance(parent, yaml.SequenceNode) and self._in_merge
        return in_list or (isinstance(index, yaml.ScalarNode) and index.tag == MERGE)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_MERGED:
            raise YamlError(f"line {node.start_mark.line + 1}: more than {MAX_MERGED:,} keys are merged")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_duplicate_keys(node)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_PLAIN = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first) in _PLAIN.items():
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}",
            re.compile(f"(?:{_pattern})$"),
            [*_first, *([""] if _tag == "null" else [])],
        )


def _whole_number(_: _Loader, node: yaml.Node) -> int:
    if not re.fullmatch(r"[-+]?[0-9]{1,4000}", str(node.value)):
        raise YamlError(f"line {node.start_mark.line + 1}: {node.value!r:.40} is not a whole number")
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def load_value(text: str) -> Any:
    """The value that a YAML (or JSON) text holds.

    Raises:
        YamlError: it does not parse.
    """
    with _one_line():
        return yaml.load(text, _Loader)


def load_options(text: str) -> dict[str, Any] | None:
    """The entries of a YAML mapping; None if the text is not a mapping.

    A single value stays a text, such as "8.5" or "true", as on a command line: `Flag.read` converts it. An
    empty value is None. Lists and mappings are converted here.

    Raises:
        YamlError: it does not parse.
    """
    with _one_line():
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            return None
        _refuse_duplicate_keys(node)
        loader.flatten_mapping(node)
        return {_text(key): _as_written(loader, value) for key, value in node.value}


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    """Put a text with one of Unicode's other line ends into double quotes, where PyYAML escapes the line end.

    Without quotes, PyYAML reads the line end as a space.
    """
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(values: dict[str, Any]) -> str:
    """YAML that `load_options` reads back, in the order of `values`."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _as_written(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    return loader.construct_object(node, deep=True)


def _text(key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise YamlError(f"line {key.start_mark.line + 1}: a key must be a name")
    return str(key.value)


def _refuse_duplicate_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, line) != line:
            raise YamlError(
                f"line {line}: {key.value} is given a second time; the first is in line {seen[key.value]}"
            )


@contextmanager
def _one_line() -> Iterator[None]:
    """PyYAML's errors, which take several lines, as a `YamlError` of one."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise YamlError(where + (error.problem or error.context or "does not parse")) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    except RecursionError:
        raise YamlError("is nested too deeply") from None
    except ValueError as error:  # of a tag whose value is none of its kind, such as !!float x
        raise YamlError(" ".join(str(error).split())) from None
