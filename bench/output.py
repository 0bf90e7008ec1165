"""What an instrument found: printed as a table or as JSON, and with --out kept in files."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """--json, --out."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="also write PATH.json and PATH.md, with the date and the versions"
    )


def emit(args: argparse.Namespace, module: str, argv: Sequence[str] | None, found: dict[str, Any], text: str) -> None:
    """Print what the module's command found, as `args` say, and keep it where they say."""
    print(json.dumps(found, ensure_ascii=False) if args.json else text)
    if args.out is None:
        return
    command = f"python -m {module} {shlex.join(sys.argv[1:] if argv is None else argv)}"
    about = {"command": command, **_versions()}
    entries = (f"{json.dumps(key)}: {_one_line_each(value)}" for key, value in {**about, **found}.items())
    versions = ", ".join(f"{name} {value}" for name, value in _versions().items())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in (
        ("json", "{\n" + ",\n".join(entries) + "\n}\n"),
        ("md", f"`{command}`\n\n{versions}\n\n```\n{text}\n```\n"),
    ):
        args.out.with_name(f"{args.out.name}.{suffix}").write_text(content, encoding="utf-8")


def _one_line_each(value: Any) -> str:
    """JSON; of a list one element a line."""
    if not isinstance(value, list) or not value:
        return json.dumps(value, ensure_ascii=False)
    return "[\n" + ",\n".join(f"  {json.dumps(element, ensure_ascii=False)}" for element in value) + "\n]"


def _versions() -> dict[str, str]:
    """The date, and what the figures may depend on."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "absent"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "device": device,
    }
