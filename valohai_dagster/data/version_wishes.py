"""What outputs ask for in `valohai.dataset-versions` and `valohai.model-versions` (O-09 to O-13). Pure.

Every file of a version repeats the wish, so wishes of one execution for the same version are merged: lists are
joined, and of single values the first one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from valohai_dagster.errors import RefusedError

DATASETS = "valohai.dataset-versions"
MODELS = "valohai.model-versions"
TAGS = "valohai.tags"
DATASET_SCHEME = "dataset://"
MODEL_SCHEME = "model://"
LATEST = "latest"
MAX_NAME = 255
_DATASET_KEYS = {
    "uri",
    "from",
    "start_fresh",
    "exclude",
    "targeting_aliases",
    "packaging",
    TAGS,
    "tags",
}
_MODEL_KEYS = {"model_uri", "uri", "model_version_tags", "model_release_note"}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DatasetWish:
    """One new version of a dataset. `base` is a version or alias of the same dataset, or a whole URI."""

    dataset: str
    version: str
    base: str | None = None
    start_fresh: bool = False
    exclude: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    packaging: bool = False

    @property
    def uri(self) -> str:
        return f"{DATASET_SCHEME}{self.dataset}/{self.version}"

    @property
    def carries_over(self) -> str | None:
        return None if self.start_fresh else self.base


@dataclass(frozen=True, kw_only=True)
class ModelWish:
    """The next version of a model."""

    slug: str
    tags: tuple[str, ...] = ()
    release_note: str | None = None

    @property
    def uri(self) -> str:
        return f"{MODEL_SCHEME}{self.slug}/"


@dataclass(kw_only=True)
class Wishes:
    """Of one file, or of all files of an execution; `problems` name what was not understood."""

    datasets: list[DatasetWish] = field(default_factory=list)
    models: list[ModelWish] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def wishes_of(metadata: Mapping[str, Any]) -> Wishes:
    """What one file's metadata asks for; wrong entries become problems and the others still count."""
    found = Wishes()
    for entry in _entries(metadata, DATASETS, found.problems):
        try:
            found.datasets.append(_dataset_wish(entry, found.problems))
        except RefusedError as error:
            found.problems.append(f"{DATASETS}: {error}; ignored")
    for entry in _entries(metadata, MODELS, found.problems):
        try:
            found.models.append(_model_wish(entry, found.problems))
        except RefusedError as error:
            found.problems.append(f"{MODELS}: {error}; ignored")
    return found


def merge_dataset_wishes(wishes: Iterable[DatasetWish]) -> DatasetWish:
    """One wish of several for the same version, at least one."""
    first, *others = wishes
    for other in others:
        first = replace(
            first,
            base=first.base or other.base,
            start_fresh=first.start_fresh or other.start_fresh,
            exclude=_joined(first.exclude, other.exclude),
            aliases=_joined(first.aliases, other.aliases),
            tags=_joined(first.tags, other.tags),
            packaging=first.packaging or other.packaging,
        )
    return first


def merge_model_wishes(wishes: Iterable[ModelWish]) -> ModelWish:
    first, *others = wishes
    for other in others:
        first = replace(
            first,
            tags=_joined(first.tags, other.tags),
            release_note=first.release_note or other.release_note,
        )
    return first


def split_dataset_uri(uri: str) -> tuple[str, str]:
    """Dataset and version of `dataset://<dataset>/<version>`; the version may be empty.

    >>> split_dataset_uri("dataset://faces/2026-05")
    ('faces', '2026-05')
    """
    if not uri.startswith(DATASET_SCHEME):
        raise RefusedError(f"{_short(uri)} is not of the form dataset://DATASET/VERSION")
    dataset, _, version = uri.removeprefix(DATASET_SCHEME).partition("/")
    return check_name(dataset, "dataset name"), version


def split_model_uri(uri: str) -> tuple[str, str]:
    """Slug and version of `model://<slug>/<version>`; the version may be empty."""
    if not uri.startswith(MODEL_SCHEME):
        raise RefusedError(f"{_short(uri)} is not of the form model://SLUG/")
    slug, _, version = uri.removeprefix(MODEL_SCHEME).partition("/")
    return check_name(slug, "model slug"), version


def check_name(name: Any, what: str) -> str:
    """Names of datasets, versions, aliases and models must survive in a URI."""
    if not isinstance(name, str) or not name.strip():
        raise RefusedError(f"{_short(name)} is no {what}: expected a non-empty text")
    if len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        raise RefusedError(
            f"{_short(name)} is no {what}: at most {MAX_NAME} printable characters, no outer spaces"
        )
    if "/" in name or "*" in name:
        raise RefusedError(f"{_short(name)} is no {what}: it must not contain / or *")
    return name


def check_version_name(name: Any) -> str:
    if check_name(name, "version name") == LATEST:
        raise RefusedError(
            f"{LATEST!r} is no version name: it always means the newest version, or an alias of that name"
        )
    return name


def files_of_version(
    carried: Sequence[tuple[str, str]], added: Sequence[tuple[str, str]], exclude: Iterable[str]
) -> list[str]:
    """Datum ids of a version from (id, name) pairs: a new file replaces a carried one of its name (O-10).

    Of several new files with one name the last one counts.

    >>> files_of_version([("1", "a"), ("2", "b"), ("3", "c")], [("4", "b")], ["c"])
    ['1', '4']
    """
    dropped = set(exclude)
    by_name = {name: ident for ident, name in carried if name not in dropped}
    new = {name: ident for ident, name in added}
    return [*(i for name, i in by_name.items() if name not in new), *new.values()]


def _entries(metadata: Mapping[str, Any], key: str, problems: list[str]) -> list[Any]:
    value = metadata.get(key, [])
    if isinstance(value, (str, Mapping)):
        return [value]
    if not isinstance(value, list):
        problems.append(f"{key} must be a list of URIs or objects, got {_short(value)}; ignored")
        return []
    return value


def _dataset_wish(entry: Any, problems: list[str]) -> DatasetWish:
    options = {"uri": entry} if isinstance(entry, str) else entry
    if not isinstance(options, Mapping) or not isinstance(options.get("uri"), str):
        raise RefusedError(f"expected a URI, or an object with `uri`, got {_short(entry)}")
    uri = options["uri"]
    dataset, version = split_dataset_uri(uri)
    _name_unknown(options, _DATASET_KEYS, uri, problems)
    base = options.get("from")
    if base is not None and not isinstance(base, str):
        raise RefusedError(f"{uri}: `from` must be a text, got {_short(base)}")
    return DatasetWish(
        dataset=dataset,
        version=check_version_name(version),
        base=base or None,
        start_fresh=_flag(options, "start_fresh", uri),
        exclude=_texts(options, "exclude", uri),
        aliases=tuple(
            check_name(a, "dataset alias") for a in _texts(options, "targeting_aliases", uri)
        ),
        tags=_texts(options, TAGS, uri) or _texts(options, "tags", uri),
        packaging=_flag(options, "packaging", uri),
    )


def _model_wish(entry: Any, problems: list[str]) -> ModelWish:
    options = {"model_uri": entry} if isinstance(entry, str) else entry
    if not isinstance(options, Mapping):
        raise RefusedError(f"expected a URI, or an object with `model_uri`, got {_short(entry)}")
    uri = options.get("model_uri", options.get("uri"))
    if not isinstance(uri, str):
        raise RefusedError(f"expected a URI, or an object with `model_uri`, got {_short(entry)}")
    slug, version = split_model_uri(uri)
    if version:
        raise RefusedError(
            f"{uri}: versions are numbered by the registry and never change once made; write {MODEL_SCHEME}{slug}/"
        )
    _name_unknown(options, _MODEL_KEYS, uri, problems)
    note = options.get("model_release_note")
    if note is not None and not isinstance(note, str):
        raise RefusedError(f"{uri}: `model_release_note` must be a text, got {_short(note)}")
    return ModelWish(
        slug=slug, tags=_texts(options, "model_version_tags", uri), release_note=note or None
    )


def _name_unknown(
    options: Mapping[str, Any], known: set[str], uri: str, problems: list[str]
) -> None:
    unknown = sorted(str(key) for key in set(options) - known)
    if unknown:
        problems.append(f"{uri}: {', '.join(unknown)} has no meaning here and is ignored")


def _texts(options: Mapping[str, Any], key: str, uri: str) -> tuple[str, ...]:
    value = options.get(key) or []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise RefusedError(f"{uri}: `{key}` must be a list of strings, got {_short(value)}")
    return tuple(values)


def _flag(options: Mapping[str, Any], key: str, uri: str) -> bool:
    value = options.get(key)
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"{uri}: `{key}` must be true or false, got {_short(value)}")
    return bool(value)


def _joined(first: tuple[T, ...], second: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys([*first, *second]))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
