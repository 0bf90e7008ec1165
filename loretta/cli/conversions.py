"""`loretta merge`, `export`, `convert` and `compress`: an adapter turned into something else, in a new folder."""

import argparse
import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loretta import compress_lora, convert_upstream, export_lora
from loretta.cli.adapters import adapter_base, load_with_adapter, read_object, read_record
from loretta.cli.models import load_tokenizer
from loretta.cli.output import RECORD, OutputFolder, size_on_disk, write_json
from loretta.cli.report import UserError, log, print_result, refusing, size_text, table

INHERITED = ("task", "labels", "seq_len", "batch_size", "dtype")  # by the record of a merged model


def run(args: argparse.Namespace) -> None:
    """Fill a new folder, swap it in when it is complete, print what was done."""
    if Path(args.adapter).expanduser().resolve() == Path(args.output).expanduser().resolve():
        raise UserError(f"{args.output}: is the adapter itself; choose another folder")
    convert = {"merge": _merge, "export": _export, "convert": _convert, "compress": _compress}[args.command]
    with OutputFolder(args.output) as output:
        with refusing(args.adapter, OSError, TypeError, ValueError, UserWarning):
            record, result, text = convert(args, output)
        write_json(output.new / RECORD, record)
        output.publish()
    print_result(result, text, args.json)


def _load(args: argparse.Namespace, action: str) -> tuple[Any, Any, dict[str, Any]]:
    """The adapter on its base, the tokenizer and the adapter's record.

    Args:
        action: what cannot be done to an adp adapter with a nonlinearity: "merged" or "exported".
    """
    base = adapter_base(args.adapter, args)
    if base.quant != args.quant:
        log(f"the adapter was trained on a {base.quant} base; --load-in-{base.quant} quantises it here too")
        base = replace(base, quant=None)
    folder = Path(args.adapter).expanduser()
    config = read_object(folder / "adapter_config.json")
    if config.get("peft_type") == "LORETTA_ADP" and config.get("non_linearity") not in ("identity", "linear"):
        raise UserError(f"{args.adapter}: an adp adapter cannot be {action}: it has a nonlinearity inside")
    tokenizer = load_tokenizer(base)
    log(f"loading {base.model}")
    return load_with_adapter(base, tokenizer, args.adapter), tokenizer, read_record(folder)


def _merge(args: argparse.Namespace, output: OutputFolder) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A model that needs neither loretta nor PEFT, with the tokenizer."""
    model, tokenizer, record = _load(args, "merged")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="merging gave a bias")  # that the saved model would not have
        merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(output.new)
    tokenizer.save_pretrained(output.new)
    inherited = {name: record[name] for name in INHERITED if name in record}
    size = size_on_disk(output.new, "*.safetensors")
    text = table([("merged model", f"{output.path} ({size_text(size)})")])
    return inherited | {"merged_from": args.adapter}, {"merged": str(output.path), "bytes": size}, text


def _export(args: argparse.Namespace, output: OutputFolder) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A plain LoRA checkpoint."""
    model, _, record = _load(args, "exported")
    export_lora(model, output.new, target=args.target)
    size = size_on_disk(output.new, "adapter_*")
    rank = json.loads((output.new / "adapter_config.json").read_text())["r"]
    record |= {"exported_from": args.adapter, "exported_for": args.target}
    result = {"exported": str(output.path), "for": args.target, "rank": rank, "bytes": size}
    text = f"{output.path} ({size_text(size)}), rank {rank}, for {args.target}"
    return record, result, table([("LoRA checkpoint", text)])


def _convert(args: argparse.Namespace, output: OutputFolder) -> tuple[dict[str, Any], dict[str, Any], str]:
    """An adapter that the released package wrote, as one of this package."""
    base = args.model and (str(Path(args.model).expanduser().resolve()) if Path(args.model).exists() else args.model)
    done = convert_upstream(args.adapter, output.new, base, missing=args.missing)
    for name in done.from_base:
        log(f"not in the folder, left to the base model: {name}")
    record: dict[str, Any] = {"converted_from": args.adapter}
    if done.config.task_type == "SEQ_CLS" and done.num_labels:
        record |= {"task": "seq_cls", "labels": [str(number) for number in range(done.num_labels)]}
    size = size_on_disk(output.new, "adapter_*")
    result = {"converted": str(output.path), "method": done.method, "from_base": done.from_base, "bytes": size}
    lines = [(f"{done.method} adapter", f"{output.path} ({size_text(size)})")]
    for matrix, shape in done.trains.items():
        lines.append((matrix, f"{shape.in_modes} x {shape.out_modes}, ranks {shape.ranks}"))
    return record, result, table(lines)


def _compress(args: argparse.Namespace, output: OutputFolder) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A LoRA adapter as a rep adapter, with the error of every layer."""
    report = compress_lora(args.adapter, args.rank, output.new)
    layers = [asdict(layer) for layer in report.layers]
    result = {"compressed": str(output.path), "worst": report.worst, "layers": layers}
    return {"compressed_from": args.adapter}, result, str(report)
