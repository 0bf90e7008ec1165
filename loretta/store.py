"""Many adapters of one configuration in one folder: appended to one file of numbers, found by an index.

    index.json    what all adapters share, and of each its row and checksum; replaced in whole, by renaming
    rows-N.bin    one row of numbers an adapter, memory-mapped; N grows when removed rows are left out
    lock          held by the one process that writes

A row is all tensors of an adapter, one after another, in the order of their names. So one more adapter is one write at
the end of a file, one read fetches it, and where rows are damaged or cut off the others can be read. A safetensors file
allows neither: its header comes first and has all sizes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .cli.output import RECORD, write_json

INDEX = "index.json"
FORMAT = 1
SPARE = 1.2  # a file of rows is written anew when it has more than this many rows for each adapter
TRAIN = re.compile(r".+\.loretta_(rep|adp)_\w+\.(cores|bias|value)")
# Fields of a configuration that change nothing once the adapter is trained.
FREE = {
    "peft_version", "auto_mapping", "inference_mode", "init_weights", "lora_dropout", "adapter_dropout",
    "merge_weights", "train_layernorm", "tensorize_head",
}  # fmt: skip


class Damaged(ValueError):
    """The numbers of an adapter are not those that were added."""


@dataclass(frozen=True)
class _Index:
    """What index.json holds.

    Attributes:
        config: of PEFT, that all adapters share, with the base model's name.
        source: of the base: its GGUF file, and the dtype and the quantisation with which the first adapter was trained.
        dtype: of all numbers.
        tensors: the shape of each tensor of an adapter by its name in PEFT's files, in the order of a row.
        data: the file of rows.
        rows: how many rows of that file are written; what is behind them was left by a process that died.
        row_of, checksums: by name; two dicts of numbers, since ten thousand pairs would set off Python's garbage
            collector, which takes longer than all else.
    """

    config: dict[str, Any]
    source: dict[str, Any]
    dtype: str
    tensors: dict[str, list[int]]
    data: str = "rows-0.bin"
    rows: int = 0
    row_of: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT


class AdapterStore:
    """Many trained adapters of one configuration in one folder, by name.

    Adapters come from folders that ``save_pretrained`` or ``loretta finetune`` wrote. All have the same method, base
    model, configuration, dtype and shapes; they may have trained norms beside their trains, but no heads and no biases
    of the base. Any number of processes may read while one writes. A reader sees the store as it was when it opened it
    or last called ``refresh``.

    Args:
        folder: of the store; ``AdapterStore.create`` makes one.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: its index cannot be read.

    Example:
        >>> tuned = get_peft_model(model, LorettaRepConfig(task_type="CAUSAL_LM")).eval()
        >>> tuned.save_pretrained("runs/one")
        >>> store = AdapterStore.create("shop", like="runs/one")
        >>> store.add({"one": "runs/one", "two": "runs/one"})
        >>> list(store)
        ['one', 'two']
        >>> stack = AdapterStack(tuned, store.stack(["one", "two"]))
        >>> with torch.no_grad(), stack.serving(torch.tensor([1, -1])):  # "two", and none
        ...     logits = tuned(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]])).logits
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._stamp: tuple[int, ...] = ()
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"{self.folder}: no adapter store there (no {INDEX})")
        self.refresh()

    @classmethod
    def create(cls, folder: str | os.PathLike[str], like: str | os.PathLike[str]) -> AdapterStore:
        """An empty store for adapters like the one in the folder ``like``.

        Raises:
            FileExistsError: the folder holds something already.
            ValueError: an adapter of that kind cannot be stored; the message says why.
            OSError: the adapter cannot be read, or the store not be written.
        """
        folder = Path(folder)
        config, source, tensors = _read_adapter(Path(like))
        dtype = next(iter(tensors.values())).dtype
        if not dtype.is_floating_point:
            raise ValueError(f"{like}: has numbers of {dtype}, expected a floating-point dtype")
        shapes = {key: list(tensors[key].shape) for key in sorted(tensors)}
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder}: is in use; choose another folder for the store")
        folder.mkdir(parents=True, exist_ok=True)
        index = _Index(config, source, str(dtype).removeprefix("torch."), shapes)
        write_json(folder / INDEX, vars(index))
        return cls(folder)

    def __len__(self) -> int:
        return len(self._index.row_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.row_of)

    def __contains__(self, name: object) -> bool:
        return name in self._index.row_of

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that all adapters share, as PEFT writes it."""
        return dict(self._index.config)

    @property
    def method(self) -> str:
        """The method of all adapters: "adp" or "rep"."""
        return str(self._index.config["peft_type"]).rpartition("_")[2].lower()

    @property
    def source(self) -> dict[str, Any]:
        """Of the base model: ``gguf``, ``dtype`` and ``quant``, each None where the first adapter did not say."""
        return dict(self._index.source)

    @property
    def dtype(self) -> torch.dtype:
        """Of all numbers in the store."""
        return getattr(torch, self._index.dtype)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of an adapter, by its name in PEFT's files."""
        return {key: tuple(shape) for key, shape in self._index.tensors.items()}

    @property
    def nbytes(self) -> int:
        """The bytes of the numbers of all adapters."""
        return len(self) * self._row_bytes

    @property
    def _index(self) -> _Index:
        return self._index_and_data[0]

    @property
    def _row_bytes(self) -> int:
        return sum(map(math.prod, self._index.tensors.values())) * self.dtype.itemsize

    def refresh(self) -> None:
        """See what other processes have added and removed since.

        Raises:
            ValueError: the index cannot be read.
        """
        stamp = self._now()
        while stamp != self._stamp:
            index = _read_index(self.folder / INDEX)
            data, read = _mapped(self.folder / index.data), stamp
            if (stamp := self._now()) == read:  # else a writer has just put others in their place
                self._index_and_data, self._stamp = (index, data), read

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of an adapter under the names of PEFT's files, as ``load_file`` gives them.

        Raises:
            KeyError: there is no adapter of that name.
            Damaged: its numbers are not those that were added.
        """
        return dict(zip(self._index.tensors, self._split(self._row(name)[1]), strict=True))

    def stack(
        self, names: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The tensors of several adapters, stacked, as ``AdapterStack`` takes them.

        Args:
            names: of the adapters, in the order of the stack.
            device, dtype: of the stack; None: the store's dtype.

        Returns:
            the tensors by their names in PEFT's files, ``[names, *shape]``: of cores ``[names, num_params]``, of biases
            and norms ``[names, features]``.

        Raises:
            KeyError, Damaged: as ``load``.
        """
        rows = torch.stack([self._row(name)[1] for name in names]).to(device, dtype)
        return {key: part.contiguous() for key, part in zip(self._index.tensors, self._split(rows), strict=True)}

    def places(self, count: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Places:
        """Room for so many adapters on a device, into which they are fetched by name; dtype None: the store's."""
        return Places(self, count, device, dtype or self.dtype)

    def add(self, folders: Mapping[str, str | os.PathLike[str]], replacing: bool = False) -> None:
        """Add trained adapters: all of them, or none where one is refused.

        Args:
            folders: of the adapters, by the names that they get.
            replacing: whether a name that is there already gets the new adapter.

        Raises:
            ValueError: an adapter is refused; the message names its folder and the reason.
            BlockingIOError: another process writes.
            OSError: a folder cannot be read, or the store not be written.
        """
        self.add_tensors(((name, self._read(Path(folder))) for name, folder in folders.items()), replacing)

    def add_tensors(self, adapters: Iterable[tuple[str, Mapping[str, Tensor]]], replacing: bool = False) -> None:
        """Add adapters whose tensors are at hand, under the names of PEFT's files; otherwise as ``add``."""
        with self._writing():
            index = self._index
            row_of, checksums, rows = dict(index.row_of), dict(index.checksums), index.rows
            with open(self.folder / index.data, "r+b" if (self.folder / index.data).exists() else "w+b") as file:
                file.truncate(rows * self._row_bytes)
                file.seek(0, os.SEEK_END)
                for name, tensors in adapters:
                    if not name or not name.isprintable():
                        raise ValueError(f"{name!r}: cannot be the name of an adapter")
                    if name in row_of and not (replacing and row_of[name] < index.rows):
                        raise ValueError(f"{name}: there is an adapter of that name already")
                    row = self._flat(name, tensors)
                    file.write(row)
                    row_of[name], checksums[name] = rows, zlib.crc32(row)
                    rows += 1
                file.flush()
                os.fsync(file.fileno())
            self._publish(replace(index, rows=rows, row_of=row_of, checksums=checksums))

    def remove(self, names: Iterable[str]) -> None:
        """Remove adapters; their place on disk is given back when it is a sixth of the whole.

        Raises:
            ValueError: there is no adapter of one of the names; none is removed.
            BlockingIOError: another process writes.
        """
        names = set(names)
        with self._writing():
            if unknown := sorted(names - set(self)):
                raise ValueError(f"{self.folder}: there is no adapter {', '.join(unknown[:5])}")
            kept = {name: row for name, row in self._index.row_of.items() if name not in names}
            checksums = {name: self._index.checksums[name] for name in kept}
            self._publish(replace(self._index, row_of=kept, checksums=checksums))

    def verify(self) -> list[str]:
        """The names of the adapters whose numbers are not those that were added; all others can be used."""
        index, data = self._index_and_data
        found = {name: zlib.crc32(self._bytes(data, row)) for name, row in index.row_of.items()}
        return [name for name in found if found[name] != index.checksums[name]]

    def _row(self, name: str, known: Container[Any] = ()) -> tuple[tuple[str, int, int], Tensor]:
        """What tells an adapter from all others, and its numbers [num_params], or none of them if it is known."""
        index, data = self._index_and_data
        if name not in index.row_of:
            raise KeyError(f"{self.folder}: there is no adapter {name}")
        row, checksum = index.row_of[name], index.checksums[name]
        identity = index.data, row, checksum
        if identity in known:
            return identity, torch.empty(0)
        numbers = bytearray(self._bytes(data, row))
        if zlib.crc32(numbers) != checksum:
            raise Damaged(f"{self.folder}: the numbers of {name} are damaged; remove it and add it again")
        return identity, torch.frombuffer(numbers, dtype=self.dtype)

    def _split(self, rows: Tensor) -> list[Tensor]:
        """Views of rows [..., num_params], one for each tensor of an adapter."""
        shapes = self._index.tensors.values()
        return [
            part.unflatten(-1, shape)
            for part, shape in zip(rows.split([math.prod(shape) for shape in shapes], -1), shapes, strict=True)
        ]

    def _bytes(self, data: mmap.mmap | bytes, row: int) -> bytes:
        """A copy of a row, which stays as it is whatever happens to the file."""
        start, size = row * self._row_bytes, self._row_bytes
        if isinstance(data, mmap.mmap) and start < len(data):  # one read from disk, of this row and nothing around it
            first = start - start % mmap.PAGESIZE
            data.madvise(mmap.MADV_WILLNEED, first, start + size - first)
        return data[start : start + size]

    def _now(self) -> tuple[int, ...]:
        """What changes whenever another index takes the place of this one."""
        status = (self.folder / INDEX).stat()
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _read(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of a folder whose configuration and base model are the store's."""
        config, source, tensors = _read_adapter(folder)
        mine = self._index.config | {"gguf": self._index.source["gguf"]}
        given = config | {"gguf": source["gguf"]}
        for name in sorted((mine.keys() | given.keys()) - FREE):
            if mine.get(name) != given.get(name):
                raise ValueError(f"{folder}: has {name} {given.get(name)!r}, where the store has {mine.get(name)!r}")
        return tensors

    def _flat(self, name: str, tensors: Mapping[str, Tensor]) -> bytes:
        """The row of an adapter, checked."""
        shapes = self.shapes
        if wrong := sorted(shapes.keys() ^ tensors.keys()):
            verb = "lacks" if wrong[0] in shapes else "has"
            raise ValueError(f"{name}: {verb} {wrong[0]}, unlike the adapters of the store")
        for key, tensor in tensors.items():
            if tensor.shape != shapes[key] or tensor.dtype != self.dtype:
                raise ValueError(
                    f"{name}: {key} is {list(tensor.shape)} in {tensor.dtype}, where the store has "
                    f"{list(shapes[key])} in {self.dtype}"
                )
        flat = torch.cat([tensors[key].detach().cpu().reshape(-1) for key in shapes])
        if not flat.isfinite().all():
            raise ValueError(f"{name}: has values that are not finite")
        return bytes(flat.view(torch.uint8).numpy())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The exclusive right to write, on the store as it is now, without what a process that died left."""
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise BlockingIOError(f"{self.folder}: another process is writing there; wait for it to end") from error
        try:
            self.refresh()
            for path in self.folder.glob("rows-*.bin"):
                if path.name != self._index.data:
                    path.unlink()
            yield
        finally:
            lock.release()

    def _publish(self, index: _Index) -> None:
        """Put a new index in the place of the old one; where too many rows are unused, with a new file of rows."""
        old = index.data
        if index.rows > SPARE * len(index.row_of):
            index = self._compact(index)
        write_json(self.folder / INDEX, vars(index))
        if index.data != old:
            (self.folder / old).unlink()
        self.refresh()

    def _compact(self, index: _Index) -> _Index:
        """The same adapters in another file, one row each."""
        size, number = self._row_bytes, int(re.findall(r"\d+", index.data)[0]) + 1
        data = f"rows-{number}.bin"
        with open(self.folder / index.data, "rb") as old, open(self.folder / data, "wb") as new:
            for row in index.row_of.values():
                old.seek(row * size)
                new.write(old.read(size).ljust(size, b"\0"))  # what is damaged stays so
            new.flush()
            os.fsync(new.fileno())
        row_of = {name: row for row, name in enumerate(index.row_of)}
        return replace(index, data=data, rows=len(row_of), row_of=row_of)


class Places:
    """Room for some adapters of a store on a device: those that were asked for last. Made by ``AdapterStore.places``.

    One thread at a time may use it.

    Attributes:
        tensors: stacked, as ``AdapterStack`` takes them; of a place that was never filled zeros.
    """

    def __init__(self, store: AdapterStore, count: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self._store = store
        shapes = store.shapes.items()
        self.tensors = {key: torch.zeros(count, *shape, device=device, dtype=dtype) for key, shape in shapes}
        self._device = device
        self._of: OrderedDict[Any, int] = OrderedDict((place, place) for place in range(count))  # last used last

    def fetch(self, name: str) -> int:
        """The place of an adapter, where it stays until as many others as there are places were asked for.

        Raises:
            KeyError, Damaged: as ``AdapterStore.load``.
        """
        identity, numbers = self._store._row(name, self._of)
        if identity not in self._of:
            _, place = self._of.popitem(last=False)
            parts = self._store._split(numbers.to(self._device))  # one copy to the device
            torch._foreach_copy_([stacked[place] for stacked in self.tensors.values()], parts)
            self._of[identity] = place
        self._of.move_to_end(identity)
        return self._of[identity]


def _mapped(file: Path) -> mmap.mmap | bytes:
    """The bytes of a file, mapped; no bytes where it is empty or missing, so that every row reads as damaged."""
    try:
        with open(file, "rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError):
        return b""


def _read_index(file: Path) -> _Index:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version of loretta reads {FORMAT}")
        return _Index(**content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as the index of an adapter store: {error}") from error


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """An adapter that a store can hold: its configuration, what is recorded of its base, its tensors."""
    file = folder / "adapter_model.safetensors"
    for needed in (folder / "adapter_config.json", file):
        if not needed.is_file():
            raise FileNotFoundError(f"{folder}: no adapter there (no {needed.name})")
    config = _read_object(folder / "adapter_config.json")
    record = _read_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    method = config.get("peft_type")
    if method not in ("LORETTA_ADP", "LORETTA_REP"):
        raise ValueError(f"{folder}: a store takes LoRETTA adapters, not {method!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{folder}: holds biases of the base (bias={config['bias']!r}), which a store does not serve")
    if config.get("tensorized") is False:
        raise ValueError(f"{folder}: its projections are dense (tensorized=False), a store takes tensor trains")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    if not tensors:
        raise ValueError(f"{file}: is empty")
    if strange := [key for key, tensor in tensors.items() if tensor.dim() > 1 or not _is_known(key, config)]:
        raise ValueError(f"{file}: holds {strange[0]}; a store takes tensor trains and trained norms, nothing else")
    config = {name: _as_set(value) for name, value in config.items()}
    return config, {name: record.get(name) for name in ("gguf", "dtype", "quant")}, tensors


def _is_known(key: str, config: dict[str, Any]) -> bool:
    """Whether a tensor is of a train, or of a module that the configuration says is trained whole."""
    module = key.rpartition(".")[0]
    return bool(TRAIN.fullmatch(key)) or any(
        module.endswith(f".{name}") for name in config.get("modules_to_save") or ()
    )


def _as_set(value: Any) -> Any:
    """A list of names in one order: PEFT writes sets in any."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must be a JSON object, not {type(content).__name__}")
    return content
