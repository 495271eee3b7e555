"""Reading a YAML file and `key=value` overrides into a schema: a dataclass whose fields are sections of settings.

    @dataclass
    class Training:
        steps: int = setting(5000, "optimizer steps", low=1)

    @dataclass
    class Config:
        training: Training = field(default_factory=Training)

    cfg = read_config(Config(), Path("config.yaml"), ["training.steps=10"])

The schema gives every key its type, its default, its bounds and what it is for; a mistake is one line that names the
file, the key, what was found and what was expected. This room knows no key: the schema stands in train.py.

Types are the schema's, not YAML's: YAML 1.1 reads 1e-5 as text, 001 as a number and `yes` as true.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import SettingError

KINDS = {
    "None": "null", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text",
    "list[int]": "a list of whole numbers", "list[float]": "a list of numbers", "list[str]": "a list of texts",
    "dict[str, str]": "a mapping of names to texts",
}  # fmt: skip

Schema = TypeVar("Schema")


def setting(
    default: Any, doc: str, *, choices: Sequence[str] = (), low: float | None = None, path: bool = False,
    words: Sequence[str] = (),
) -> Any:  # fmt: skip
    """A field of a section.

    Args:
        default: its value when no file and no override says otherwise.
        doc: what it is for, with its unit; error messages quote it.
        choices: the texts that are allowed.
        low: the least number that is allowed.
        path: a text that is the path of a file or folder, and is made absolute.
        words: texts that are no path, although the setting is one.
    """
    metadata = {"doc": doc, "choices": tuple(choices), "low": low, "path": path, "words": tuple(words)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read_config(schema: Schema, path: Path, overrides: Sequence[str] = ()) -> Schema:
    """Read a config file into `schema`, a dataclass of sections that holds the defaults; then apply the overrides.

    Sections and keys that the file leaves out keep their defaults. A relative path in the file, or a default one, is
    relative to the file's folder; one in an override to the working directory.

    Args:
        schema: is changed and returned.
        path: the YAML file.
        overrides: texts `section.key=value`, as given to --override.

    Raises:
        SettingError: unreadable file, not YAML, unknown key, wrong type, value out of bounds; one line, naming it.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingError(f"{path}: cannot read the config ({getattr(exc, 'strerror', None) or exc})") from None
    content = parse_yaml(text, str(path)) or {}
    if not isinstance(content, dict):
        raise SettingError(f"{path}: expected sections ({', '.join(_sections(schema))}), found {content!r:.60}")
    for section, spec in _settings(schema):
        setattr(section, spec.name, _absolute(getattr(section, spec.name), spec, path.parent))
    for section_name, values in content.items():
        if section_name not in _sections(schema):
            near = difflib.get_close_matches(str(section_name), _sections(schema), 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; the sections are {', '.join(_sections(schema))}"
            raise SettingError(f"{path}: unknown key {section_name}{hint}")
        if values in ("", "null", "~"):
            continue
        if not isinstance(values, dict):
            raise SettingError(f"{path}: {section_name}: found {values!r}, expected a section of keys")
        for name, raw in values.items():
            _set(schema, f"{section_name}.{name}", raw, str(path), path.parent)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        where = f"--override {override}"
        if not equals:
            raise SettingError(f"{where}: expected key=value, for example training.lr=5e-5")
        raw = parse_yaml(text, where) if text.startswith(("[", "{")) else text
        _set(schema, dotted.strip(), raw, where, Path.cwd())
    return schema


def _sections(schema: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(schema)]


def _settings(schema: Any) -> Iterator[tuple[Any, dataclasses.Field]]:
    """(section, field) of every setting."""
    for name in _sections(schema):
        section = getattr(schema, name)
        for spec in dataclasses.fields(section):
            yield section, spec


def _set(schema: Any, dotted: str, raw: Any, where: str, base: Path) -> None:
    """Set one key from raw YAML; a relative path is resolved against `base`."""
    section_name, _, name = dotted.partition(".")
    section = getattr(schema, section_name) if section_name in _sections(schema) else None
    fields = {f.name: f for f in dataclasses.fields(section)} if section is not None else {}
    if name not in fields:
        known = [f"{s}.{f.name}" for s in _sections(schema) for f in dataclasses.fields(getattr(schema, s))]
        near = difflib.get_close_matches(dotted, known, 1, 0.5) or [k for k in known if k.endswith(f".{dotted}")]
        raise SettingError(f"{where}: unknown key {dotted}" + (f"; did you mean {near[0]}?" if near else ""))
    spec = fields[name]
    kinds, doc = str(spec.type).split(" | "), spec.metadata["doc"]
    found = repr(raw) if isinstance(raw, str) else f"{'a list' if isinstance(raw, list) else 'a mapping'} {raw}"
    try:
        value = _convert(raw, kinds)
    except ValueError:
        expected = " or ".join(KINDS[k] for k in kinds)
        raise SettingError(f"{where}: {dotted}: found {found}, expected {expected} ({doc})") from None
    choices, low = spec.metadata["choices"], spec.metadata["low"]
    if choices and value not in choices:
        raise SettingError(f"{where}: {dotted}: found {found}, expected one of {', '.join(choices)} ({doc})")
    if low is not None and value is not None and not value >= low:
        raise SettingError(f"{where}: {dotted}: found {found}, expected at least {low:g} ({doc})")
    setattr(section, name, _absolute(value, spec, base))


def _absolute(value: Any, spec: dataclasses.Field, base: Path) -> Any:
    if spec.metadata["path"] and isinstance(value, str) and value not in spec.metadata["words"]:
        return os.path.abspath(base / Path(value).expanduser())
    return value


# -- YAML to values -----------------------------------------------------------------------------------------------


class _RawLoader(yaml.BaseLoader):
    """YAML with every scalar as its raw text; the schema decides the type.

    So 1e-5 is a number, 001 stays the text 001 where a text is expected, and `yes` is not silently true. A key that is
    given twice is refused; it does not overwrite the first.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """YAML as texts, lists and mappings: no scalar is given a type. Raises SettingError, a line that names `where`."""
    try:
        return yaml.load(text, Loader=_RawLoader)  # noqa: S506 - BaseLoader constructs only texts, lists and mappings
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(exc, "problem", None) or exc).split())
        hint = "; indent with spaces, not tabs" if "\\t" in problem else ""
        raise SettingError(f"{where}: not valid YAML{line}: {problem}{hint}") from None


def _convert(raw: Any, kinds: Sequence[str]) -> Any:
    """Raw YAML (text, list, mapping) to the first of the `kinds` that fits; raises ValueError when none does."""
    for kind in sorted(kinds, key=list(KINDS).index):
        if kind.startswith("list[") and isinstance(raw, list):
            return [_convert(item, [kind[5:-1]]) for item in raw]
        if kind.startswith("dict[") and isinstance(raw, dict):
            return {_convert(k, ["str"]): _convert(v, ["str"]) for k, v in raw.items()}
        if not isinstance(raw, str):
            continue
        if kind == "None" and raw.lower() in ("null", "~", ""):
            return None
        if kind == "bool" and raw.lower() in ("true", "false"):
            return raw.lower() == "true"
        if kind == "int" and re.fullmatch(r"[+-]?\d+", raw):
            return int(raw)
        if kind == "float" and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", raw):
            return float(raw)
        if kind == "str":
            return raw
    raise ValueError
