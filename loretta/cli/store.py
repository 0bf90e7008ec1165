"""`loretta store`: many adapters in one folder; adding, listing, removing, verifying."""

import argparse
import shutil
import sys
from pathlib import Path

from loretta.cli.output import size_on_disk
from loretta.cli.report import UserError, print_result, refusing, size_text, table
from loretta.store import INDEX, AdapterStore


def run(args: argparse.Namespace) -> None:
    """Do one thing to the store, print what it holds; exit with 1 where adapters are damaged."""
    wanted = {"add": "folders of adapters", "remove": "names of adapters"}.get(args.action)
    if bool(wanted) != bool(args.items):
        raise UserError(f"{args.action} STORE takes {wanted or 'nothing else'}")
    if args.replace and args.action != "add":
        raise UserError("--replace belongs to add")
    path = Path(args.store).expanduser()
    with refusing(args.store, OSError, ValueError):
        store = _add(path, args.items, args.replace) if args.action == "add" else AdapterStore(path)
        if args.action == "remove":
            store.remove(args.items)
        damaged = store.verify() if args.action == "verify" else []
    result = {"store": args.store, "base": store.config["base_model_name_or_path"], "method": store.method}
    result |= {"dtype": str(store.dtype).removeprefix("torch."), "adapters": len(store), "bytes": size_on_disk(path)}
    text = table([(name, size_text(value) if name == "bytes" else str(value)) for name, value in result.items()])
    if args.action == "list":
        result["names"] = list(store)
        text = "\n".join([text, "", *store])
    if args.action == "verify":
        result["damaged"] = damaged
        text = "\n".join([text, *(f"damaged: {name}" for name in damaged)])
    print_result(result, text, args.json)
    if damaged:
        sys.exit(1)


def _add(path: Path, items: list[str], replacing: bool) -> AdapterStore:
    """Add the adapters of the folders, to a new store where there is none."""
    named = [_named(item) for item in items]
    folders = dict(named)
    if len(folders) < len(named):
        names = [name for name, _ in named]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two adapters would be called {twice}; give NAME=FOLDER")
    made = not (path / INDEX).exists()
    store = AdapterStore.create(path, named[0][1]) if made else AdapterStore(path)
    try:
        store.add(folders, replacing)
    except Exception:
        if made:
            shutil.rmtree(path)
        raise
    return store


def _named(item: str) -> tuple[str, Path]:
    """FOLDER or NAME=FOLDER as a name and a folder."""
    name, given, folder = item.partition("=")
    if not given or Path(item).is_dir():
        name, folder = "", item
    path = Path(folder).expanduser()
    return name or path.resolve().name, path
