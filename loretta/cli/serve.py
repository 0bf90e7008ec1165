"""`loretta serve`: OpenAI's protocol for a base model and the adapters of a store."""

import argparse
import socket
from pathlib import Path

from loretta.cli.adapters import base_of, checked_record
from loretta.cli.models import load_base, load_tokenizer
from loretta.cli.report import UserError, log, need, refusing
from loretta.store import AdapterStore

PLACES = 64  # adapters that stay on the device


def run(args: argparse.Namespace) -> None:
    """Load the base, listen until interrupted."""
    for package in ("fastapi", "uvicorn"):
        need(package, "loretta serve", "serve")
    import uvicorn

    from loretta.serve.adapters import StoreModel
    from loretta.serve.app import make_app
    from loretta.serve.batching import Batcher

    with refusing(args.store, OSError, ValueError):
        store = AdapterStore(Path(args.store).expanduser())
    record = {name: value for name, value in store.source.items() if value is not None}
    base = base_of(args.store, store.config, checked_record(args.store, record), args)
    if base.task != "causal_lm":
        raise UserError(f"{args.store}: holds adapters of classifiers; only language models are served")
    with refusing(f"--host {args.host} --port {args.port}", OSError):  # before the model is loaded
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listening = socket.create_server((args.host, args.port), family=family, backlog=2048)
    tokenizer = load_tokenizer(base)
    log(f"loading {base.model}")
    with refusing(args.store, ValueError):
        model = StoreModel(load_base(base, tokenizer), store, max(PLACES, args.max_batch))
    name = args.name or Path(base.model).name
    app = make_app(Batcher(model, tokenizer, args.max_batch, args.max_waiting), name)
    log(f"serving {name} and {len(store)} adapters at http://{args.host}:{listening.getsockname()[1]}/v1")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
    server.run(sockets=[listening])
