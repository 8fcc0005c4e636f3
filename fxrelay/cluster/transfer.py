"""Task: brings the cluster's configuration from a directory of FastX's store files into the store, and back. Blocking.

Both ways are planned first and carried out after: nothing is written while a line of any file is broken, and a second time changes nothing.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fxrelay.cluster import nedb
from fxrelay.cluster.content import is_collection
from fxrelay.cluster.members import NOTHING_OFF, Control
from fxrelay.cluster.ports import CONTROLS, RESERVATION_MARKS, RESERVATIONS, SERVERS, TICKETS, Store, Transporter
from fxrelay.cluster.view import encode_control
from fxtunnel.errors import ConfigError, ConfigProblem, TransporterError
from fxtunnel.kit.files import write_secret

SUFFIX: Final = "-store.db"
COLLECTIONS: Final = (CONTROLS, "config", "permissions", "system-bookmark")
IMPORTED: Final = "imported-collections"
"""Collection of the names of others that were imported, so that they are exported as well."""
LIVE: Final = frozenset({SERVERS, RESERVATIONS, RESERVATION_MARKS, TICKETS, IMPORTED})
"""What relays keep by themselves: no file may say who has which server."""
MAX_FILE_BYTES: Final = 256 << 20
_MAX_SHOWN: Final = 80


@dataclass(frozen=True, slots=True)
class Changes:
    """What becomes of one collection: ids. `skipped`: documents that cannot be written as a line, and so are left out."""

    collection: str
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    unchanged: int = 0
    skipped: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For a person: a summary, and a line for each document that is not what it was."""
        counts = f"{len(self.added)} added, {len(self.changed)} changed, {len(self.deleted)} deleted, {self.unchanged} unchanged"
        skipped = f", {len(self.skipped)} skipped (no JSON objects)" if self.skipped else ""
        marked = (("+", self.added), ("~", self.changed), ("-", self.deleted), ("!", self.skipped))
        return [f"{self.collection}: {counts}{skipped}", *(f"  {mark} {_shown(key)}" for mark, keys in marked for key in keys)]


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What an import would do. `texts`: (collection, id) to the document's text. `left_out`: files that are not for an import."""

    collections: tuple[Changes, ...]
    texts: Mapping[tuple[str, str], str]
    left_out: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For a person."""
        kept = [f"{collection}: left out, relays keep it by themselves" for collection in self.left_out]
        return [line for changes in self.collections for line in changes.lines()] + kept


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What an export would do to the files; `counts` is how many documents each collection has, `files` what is written."""

    collections: tuple[Changes, ...]
    counts: Mapping[str, int]
    files: Mapping[Path, bytes]

    def lines(self) -> list[str]:
        """For a person."""
        return [line for changes in self.collections for line in changes.lines()]


def plan_import(store: Store, directory: Path) -> ImportPlan:
    """What an import of every COLLECTION-store.db in `directory` would change. Documents that no file mentions stay; what relays keep by
    themselves is left out.

    Raises:
        ConfigError: there is no such file, one cannot be read, or lines are broken; holds every problem.
        StoreError: the store cannot be read.
    """
    contents, left_out = _read_all(directory)
    listed = {*COLLECTIONS, *(document.key for document in store.documents(IMPORTED))}
    texts: dict[tuple[str, str], str] = {}
    planned = []
    for collection, content in contents.items():
        stored = {document.key: document.text for document in store.documents(collection)}
        # What no line could hold is a document too, and differs from any in a file.
        before = {key: nedb.from_store(key, text) for key, text in stored.items()}
        planned.append(_compare(collection, before, content.documents, content.deleted))
        for key in (*planned[-1].added, *planned[-1].changed):
            texts[collection, key] = nedb.compact(content.documents[key])
        if content.documents and collection not in listed:
            texts[IMPORTED, collection] = nedb.compact({nedb.ID: collection})
    return ImportPlan(tuple(planned), texts, left_out)


def apply_import(store: Store, plan: ImportPlan) -> None:
    """Carry out a plan. Raises StoreError: a part may be done; plan and apply again."""
    for (collection, key), text in plan.texts.items():
        store.put(collection, key, text)
    for changes in plan.collections:
        for key in changes.deleted:
            store.delete(changes.collection, key)


def tell_controls(transporter: Transporter, plan: ImportPlan) -> None:
    """What a plan that was applied has switched off or on, so that relays need not wait until they read the store."""
    switched = {key: Control.parse(text) for (collection, key), text in plan.texts.items() if collection == CONTROLS}
    gone = {key: NOTHING_OFF for changes in plan.collections if changes.collection == CONTROLS for key in changes.deleted}
    told = [encode_control(key, control) for key, control in {**switched, **gone}.items()]
    if told:
        with suppress(TransporterError):  # it stands in the store: relays read it there
            transporter.publish(CONTROLS, *told)


def plan_export(store: Store, directory: Path, collections: Sequence[str] = ()) -> ExportPlan:
    """What an export to `directory` would change; by default of all collections but those that relays keep by themselves. What files
    there mark as deleted stays marked; what they hold and the store does not is marked.

    Raises:
        ConfigError: a file that is there already cannot be read, or lines of it are broken; holds every problem.
        StoreError: the store cannot be read.
    """
    problems: list[ConfigProblem] = []
    planned, counts, files = [], {}, {}
    imported = () if collections else sorted({document.key for document in store.documents(IMPORTED)} - LIVE)
    collections = collections or tuple(dict.fromkeys((*COLLECTIONS, *filter(is_collection, imported))))
    for collection in collections:
        path = directory / f"{collection}{SUFFIX}"
        there = _read(path, problems) if path.exists() else nedb.Content()
        stored = {document.key: nedb.from_store(document.key, document.text) for document in store.documents(collection)}
        after = {key: found for key, found in stored.items() if found is not None}
        gone = (there.deleted | there.documents.keys()) - after.keys()
        skipped = tuple(sorted(stored.keys() - after.keys()))
        planned.append(_compare(collection, dict(there.documents), after, gone, skipped))
        counts[collection] = len(after)
        if after or gone:
            files[path] = nedb.encode(nedb.Content(after, gone))
    if problems:
        raise ConfigError(problems)
    return ExportPlan(tuple(planned), counts, files)


def apply_export(plan: ExportPlan) -> None:
    """Write the files, mode 0600, each of them all or nothing; a file that would stay the same is not touched. Raises ConfigError."""
    for path, data in plan.files.items():
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.is_file() and not stat.S_IMODE(path.lstat().st_mode) & 0o077 and path.read_bytes() == data:
                continue
        except OSError as exc:
            raise ConfigError.one(path, "", f"cannot be written: {exc.strerror or exc}") from exc
        write_secret(path, data)


def export_store(store: Store, directory: Path, collections: Sequence[str] = ()) -> Mapping[str, int]:
    """Plan and apply; returns how many documents each collection has. Raises as `plan_export` and `apply_export`."""
    plan = plan_export(store, directory, collections)
    apply_export(plan)
    return plan.counts


def _compare(
    collection: str,
    before: Mapping[str, dict[str, Any] | None],
    after: Mapping[str, dict[str, Any]],
    deleted: set[str],
    skipped: tuple[str, ...] = (),
) -> Changes:
    added = tuple(sorted(after.keys() - before.keys()))
    # As text: to Python 1 equals true.
    changed = tuple(sorted(key for key in after.keys() & before.keys() if _canonical(after[key]) != _canonical(before[key])))
    unchanged = len(after) - len(added) - len(changed)
    return Changes(collection, added, changed, tuple(sorted(deleted & before.keys())), unchanged, skipped)


def _canonical(document: dict[str, Any] | None) -> str:
    return "" if document is None else nedb.compact(dict(sorted(document.items())))


def _read_all(directory: Path) -> tuple[dict[str, nedb.Content], tuple[str, ...]]:
    problems: list[ConfigProblem] = []
    contents = {}
    left_out = []
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))
    except OSError as exc:
        raise ConfigError.one(directory, "", f"cannot be read: {exc.strerror or exc}") from exc
    if not names:
        raise ConfigError.one(directory, "", f"holds no COLLECTION{SUFFIX}")
    for name in names:
        collection = name.removesuffix(SUFFIX)
        if collection in LIVE:
            left_out.append(collection)
        elif is_collection(collection):
            contents[collection] = _read(directory / name, problems)
        else:
            problems.append(ConfigProblem(str(directory / name), "", "a collection's name has 1 to 64 of the characters A-Z a-z 0-9 . _ -"))
    if problems:
        raise ConfigError(problems)
    return contents, tuple(left_out)


def _read(path: Path, problems: list[ConfigProblem]) -> nedb.Content:
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            problems.append(ConfigProblem(str(path), "", f"is not a regular file of at most {MAX_FILE_BYTES >> 20} MiB"))
            return nedb.Content()
        data = path.read_bytes()
    except OSError as exc:
        problems.append(ConfigProblem(str(path), "", f"cannot be read: {exc.strerror or exc}"))
        return nedb.Content()
    content, broken = nedb.parse(data)
    problems += [ConfigProblem(str(path), f"line {line.number}", line.message) for line in broken]
    return content


def _shown(key: str) -> str:
    return key if key.isprintable() and len(key) <= _MAX_SHOWN else repr(key[:_MAX_SHOWN])
