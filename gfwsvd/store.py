"""The statistics directory: what calibration collected, to be reused for other methods and ratios.

It holds `statistics.json` (settings, digests of model, data, files and itself, the numbers of each layer) and
`statistics-*.safetensors`, read layer by layer where they are needed: see `packed.py`.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .calibration import Statistics
from .errors import GfwsvdError
from .folders import (
    atomic_folder,
    check_digests,
    check_seal,
    digests_of,
    read_headers,
    read_json,
    sealed,
    write_json,
)
from .host import to_host
from .packed import TENSORS, StoredLayer, check_entry, pack_layers
from .statistics import LayerStatistics

STATISTICS_VERSION = 3
JSON_NAME = "statistics.json"
_SHARD_BYTES = 4 << 30

_PLAIN = [field.name for field in fields(Statistics) if field.name not in ("layers", "collected")]


def save_statistics(
    statistics: Statistics,
    directory: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a statistics directory; it appears whole or not at all. Layers that lie in files are not read: the files
    are linked, or copied.

    Args:
        provenance: plain JSON values to keep beside, for people: names of model and text, for instance.
        overwrite: replace an existing statistics directory as a whole.

    Raises:
        GfwsvdError: when the directory cannot be written, or exists and `overwrite` is off.
    """
    shards = list(_shards(statistics.layers))
    with atomic_folder(directory, overwrite=overwrite, marker=JSON_NAME) as folder:
        files: list[Path] = []
        layers: dict[str, Any] = {}
        for number, names in enumerate(shards, start=1):
            file = folder / f"statistics-{number:05}-of-{len(shards):05}.safetensors"
            entries = _write_shard(file, {name: statistics.layers[name] for name in names})
            files.append(file)
            layers |= {name: {**entry, "file": file.name} for name, entry in entries.items()}
        described = {
            "statistics_version": STATISTICS_VERSION,
            "collected": sorted(statistics.collected),
            **{name: getattr(statistics, name) for name in _PLAIN},
            "provenance": dict(provenance or {}),
            "sha256": digests_of(files),
            "layers": layers,
        }
        write_json(folder / JSON_NAME, sealed(described))


def _shards(layers: Mapping[str, LayerStatistics]) -> Iterator[list[str]]:
    """Names of the layers that share a file: those that do now, others by size; layers of one input are together."""
    shard: list[str] = []
    source, seen, size = None, set(), 0
    for name, stats in layers.items():
        if isinstance(stats, StoredLayer):
            begins, source = stats.file != source, stats.file
        else:
            values = [value for field in TENSORS if (value := getattr(stats, field)) is not None]
            new = [value for value in values if id(value) not in seen]
            size += sum(value.nbytes for value in new)
            begins = source is not None or size > _SHARD_BYTES and len(new) == len(values)
            source = None
            seen |= {id(value) for value in new}
        if begins and shard:
            yield shard
            shard, size = [], 0
        shard.append(name)
    yield shard


def _write_shard(file: Path, layers: Mapping[str, LayerStatistics]) -> dict[str, Any]:
    """The entries of the layers, whose tensors are then in `file`."""
    stored = {name: stats for name, stats in layers.items() if isinstance(stats, StoredLayer)}
    if stored:
        for stats in stored.values():
            stats.compare()  # else the digests of the directory would be those of a file that was changed
        source = next(iter(stored.values())).file
        try:
            os.link(source, file)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, file)
        return {name: dict(stats.entry) for name, stats in stored.items()}
    tensors, entries = pack_layers(layers)
    save_file(to_host(tensors), file)
    return entries


def load_statistics(directory: str | os.PathLike[str]) -> tuple[Statistics, dict[str, Any]]:
    """The statistics of a directory and the provenance kept beside them. The tensors of a layer are read when they are
    asked for, so that statistics may be larger than memory.

    Whether they belong to a model is checked where they meet it, by `compress`.

    Raises:
        GfwsvdError: when the directory is none, of another version, or was cut short or changed; names file and tensor.
    """
    folder = Path(directory).expanduser()
    described = read_json(folder / JSON_NAME)
    if described.get("statistics_version") != STATISTICS_VERSION:
        raise GfwsvdError(
            f"this gfwsvd reads statistics_version {STATISTICS_VERSION}, {folder / JSON_NAME} has "
            f"{described.get('statistics_version')!r}; calibrate again"
        )
    check_seal(folder / JSON_NAME, described)
    try:
        digests = dict(described["sha256"])
        files = {name: folder / name for name in digests if name == Path(name).name}
        headers = {name: read_headers([file]) for name, file in files.items()}
        check_digests(folder, {name: digests[name] for name in files})
        layers: dict[str, LayerStatistics] = {}
        for name, entry in described["layers"].items():
            check_entry(name, entry, headers[entry["file"]])
            layers[name] = StoredLayer(files[entry["file"]], entry)
        plain = {name: described[name] for name in _PLAIN}
        plain |= {name: tuple(plain[name]) for name in ("unreached", "seconds")}
        return Statistics(layers, frozenset(described["collected"]), **plain), described["provenance"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise GfwsvdError(
            f"{folder / JSON_NAME} does not describe the tensors beside it ({type(error).__name__}: {error}); the "
            f"directory was changed: calibrate again"
        ) from error
