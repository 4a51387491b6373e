"""The command line: `python -m app VERB`. Results go to stdout, progress and notes to stderr.

`--help` and wrong usage are answered at once: what takes seconds to import is imported by the verb that needs it.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback

import argparse
import json
import logging
import os
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from app.console import LogHandler, Report, complain, emit, progress_bar, say
from app.console_batch import make_batch, plan_batch
from app.console_bench import show_bench, show_curve, show_point
from app.messages import plain_sentence
from app.recipe import Item, parse_recipe, read_recipe
from app.settings import FRAMINGS, CompletionSettings
from app.sources import find_files, list_files
from core.allocator import keep_freed_memory
from core.errors import shortened
from core.plans import plan_names

if TYPE_CHECKING:
    from app.service import FileScore, ModelInfo, ScoreTotal, Service

EXIT_CODES = "Exit codes: 0 all done, 1 something failed, 2 wrong usage, 130 and 143 ended by Ctrl-C and by SIGTERM."


def run_ui(args: argparse.Namespace) -> int:
    """Serves the page until it is stopped."""
    from app.without_stubs import import_page

    ui = import_page()
    from app.service import Service

    try:
        ui.launch(Service(args.device, listed_only=True), args.host, args.port, not args.no_browser)
    except SystemExit as ended:
        # All is put away. Threads that followed jobs may be inside torch still, and it aborts the process if they come back
        # while the interpreter takes itself apart.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(ended.code)
    return 0


def run_train(args: argparse.Namespace) -> int:
    """Trains a preset, or goes on with a run."""
    from app.service import train_model

    overrides = [assignment for group in args.set for assignment in group]
    result = train_model(
        args.preset, args.data, args.valid, args.out, resume=args.resume, device=args.device, overrides=overrides, log=say
    )
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks for all
        seen = f"{result.steps} steps and {result.bytes_seen} bytes"
        emit(f"{result.bits_per_byte:.4f} bits/byte after {seen}, model in {result.export}")
    return 0


def run_score(args: argparse.Namespace) -> int:
    """Scores files and folders: a line for each, then one for all of them."""
    if args.resume and args.out is None:
        args.parser.error("--resume goes on with the results in a folder; say which with --out")
    from app.score_folder import score_into
    from app.service import Failure, ScoreTotal

    service, report, total = _service(args), Report(args.json), ScoreTotal()
    files = list_files(args.paths)
    options = {"scored_as": args.bytes, **{name: getattr(args, name) for name in ("model", "hop", "strided", "adapt")}}
    with progress_bar() as advance:
        options["progress"] = advance
        if args.out is None:
            results = service.score_files(files, **options)
        else:
            results = score_into(service, files, args.out, options, resume=args.resume, force=args.force)
        for file, result in zip(files, results, strict=True):
            if isinstance(result, Failure):
                report.failure(file, result.message)
                continue
            total.add(result)
            report.notes(file, result.notes)
            report.result(result.to_dict(), f"{_figures(result)}  {result.model}  {file}")
    report.result({"total": total.to_dict()}, f"{_figures(total)}  total, files: {total.num_files}")
    return report.exit_code


def run_generate(args: argparse.Namespace) -> int:
    """Completes files, makes something from nothing, or does all that a recipe asks for."""
    items = _items(args)
    from app.batch import Batch

    batch, report = Batch(_service(args), items, args.out, resume=args.resume, force=args.force), Report(args.json)
    if args.dry_run:
        plan_batch(batch, report)
    else:
        make_batch(batch, report, is_summed=args.recipe is not None)
    return report.exit_code


def run_bench(args: argparse.Namespace) -> int:
    """Measures speeds beside the limits of this machine."""
    report = Report(args.json)
    if args.what == "curve":
        from core.curve import cost_curve

        points = []
        for point in cost_curve(most_seconds=args.most_seconds, device=args.device, log_line=say):
            points.append(point)
            show_point(point, report)
        show_curve(points, args.out, report)
        return report.exit_code
    from core.bench import bench

    options = {name: getattr(args, name) for name in ("model", "batch_size", "length", "device", "engine", "rounds")}
    show_bench(bench(args.what, preset_name=args.preset, against_flat=args.against == "flat", **options), report)
    return report.exit_code


def run_compare(args: argparse.Namespace) -> int:
    """Trains and scores the models of a plan, or goes on with that, and prints the table."""
    from app.comparison import compare_models
    from core.distributed import usable_device

    place = usable_device(args.device)
    options = {"budget": args.budget, "resume": args.resume, "device": str(place)}
    size = args.size or ("cpu" if place.type == "cpu" else "gpu")
    found = compare_models(args.plan, size, args.data, args.out, **options, log=say)
    if args.json:
        for result in found.results:
            emit(json.dumps(result.to_dict()))
    else:
        for line in found.table.splitlines():
            emit(line)
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Says what the models are."""
    from app.service import Service

    report, service = Report(args.json), Service()
    for info in [service.model_info(args.model)] if args.model else service.models():
        report.result(info.to_dict(), _description(info))
    return report.exit_code


def _service(args: argparse.Namespace) -> "Service":
    """The service, after a look at the model asked for: what is wrong with it is said once, not for each file."""
    from app.service import Service

    service = Service(args.device)
    if args.model:
        service.model_info(args.model)
    return service


def _items(args: argparse.Namespace) -> list[Item]:
    """What the recipe asks for, or else the paths; leaves with exit code 2 if the settings are wrong."""
    given = {field.name: getattr(args, field.name) for field in fields(CompletionSettings) if hasattr(args, field.name)}
    if args.recipe is not None:
        if args.paths or given or args.model:
            args.parser.error("--recipe says what to complete and how; leave out files, --model and settings")
        folder = args.recipe.parent
        return parse_recipe(read_recipe(args.recipe), lambda pattern: find_files(pattern, folder))
    try:
        settings = CompletionSettings(**given)
    except ValueError as error:
        args.parser.error(str(error))
    files = list_files(args.paths) if args.paths else [None]
    return [Item(job=1, source=file, model=args.model, settings=settings) for file in files]


def _figures(result: "FileScore | ScoreTotal") -> str:
    rate = "none" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    return f"{rate:>8} bits/byte {result.num_bytes:10d} bytes"


def _description(info: "ModelInfo") -> str:
    rates = [f"{split} {entry['value']:.4f}" for split, entry in info.measured.items()]
    size = f"{info.num_parameters / 1e6:.2f} M parameters, context {info.max_seq_len} bytes, patches of {info.patch_size}"
    facts = [info.modality, size, info.codec, f"data {info.data}", f"bits/byte {', '.join(rates) or 'not measured'}"]
    return f"{info.name}: {'; '.join(facts)}; SHA-256 {info.digest[:16]}; {info.path}"


def _add_ui(verbs: "argparse._SubParsersAction[Parser]") -> None:
    parser = verbs.add_parser("ui", help="the page (the default)", description="Serves the page on this machine.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=_port, default=7860, help="port to listen on (%(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    _add_device(parser)
    parser.set_defaults(handler=run_ui)


def _add_train(verbs: "argparse._SubParsersAction[Parser]") -> None:
    parser = verbs.add_parser(
        "train", help="train a model", description="Trains a model. Under torchrun, all processes together."
    )
    parser.add_argument("--preset", required=True, metavar="NAME", help="configuration to start from")
    parser.add_argument("--data", required=True, nargs="+", type=Path, metavar="PATH", help="files or folders to learn from")
    parser.add_argument("--valid", required=True, nargs="+", type=Path, metavar="PATH", help="files or folders to validate on")
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    _add_device(parser)
    parser.add_argument(
        "--set", nargs="+", action="append", default=[], metavar="KEY=VALUE", help="replace settings, such as train.lr=1e-3"
    )
    parser.set_defaults(handler=run_train)


def _add_score(verbs: "argparse._SubParsersAction[Parser]") -> None:
    parser = verbs.add_parser("score", help="bits per byte of files", description="Says how likely each byte of files is.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files, or folders of files")
    _add_model(parser)
    parser.add_argument(
        "--bytes", choices=("media", "file"), default="media", help="score pixels, samples and text, or the file's own bytes"
    )
    parser.add_argument("--hop", type=_at_least_1, default=0, metavar="N", help="bytes from one window to the next (the window)")
    parser.add_argument("--strided", action="store_true", help="strided inference: two passes, better predictions")
    parser.add_argument(
        "--adapt", action="store_true", help="resample a sound of another rate, enlarge a picture smaller than the model's"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write each file's bits (NPZ) and heatmap (PNG) here")
    _add_manners(parser)
    parser.set_defaults(handler=run_score, parser=parser)


def _add_generate(verbs: "argparse._SubParsersAction[Parser]") -> None:
    parser = verbs.add_parser("generate", help="complete files", description="Keeps the first part of files and makes the rest.")
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="files, or folders of files; none starts from nothing"
    )
    _add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--recipe", type=Path, metavar="TOML", help="files, texts and settings of many jobs, instead of PATHs")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made and how long it takes; write nothing")
    # A setting that is not given is not there, so that a recipe can be told from the command line.
    setting = partial(parser.add_argument, default=argparse.SUPPRESS)
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument(
        "--keep", type=_decimal, metavar="FRACTION", default=argparse.SUPPRESS, help="part that is kept, 0 to 1 (0.5)"
    )
    keep.add_argument("--keep-bytes", type=_whole, metavar="N", default=argparse.SUPPRESS, help="the same as a number of bytes")
    setting(
        "--num-bytes", type=_whole, metavar="N", help="bytes to make (rest of a picture, as much sound as was cut, 500 of text)"
    )
    setting("--samples", type=_whole, metavar="N", help="completions of each file (1)")
    setting("--temperature", type=_decimal, metavar="T", help="0 takes the likeliest byte (1)")
    setting("--top-k", type=_whole, metavar="K", help="choose among the K likeliest bytes, 1 to 256 (all)")
    setting("--top-p", type=_decimal, metavar="P", help="choose among bytes of this total probability (1)")
    setting("--seed", type=_whole, metavar="S", help="the same seed gives the same bytes (0)")
    setting("--framing", choices=FRAMINGS, help="a larger picture at its own size in tiles, or scaled to the model's (tiles)")
    setting("--upside-down", action="store_true", help="keep the bottom of a picture and make its top")
    setting("--first-bytes", metavar="HEX", help="new bytes that every sample begins with, such as 4a6f")
    _add_manners(parser)
    parser.set_defaults(handler=run_generate, parser=parser)


def _add_bench(verbs: "argparse._SubParsersAction[Parser]") -> None:
    parser = verbs.add_parser(
        "bench",
        help="speeds beside the machine's limits",
        description="Measures how fast a model generates, scores or learns (forward and backward), in alternating rounds.",
    )
    parser.add_argument(
        "what",
        choices=("generate", "score", "train", "curve"),
        help="curve: seconds for 2^10 to 2^20 bytes, for several patch sizes",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", default="bench-tiny", metavar="NAME", help="sizes, with random weights (%(default)s)")
    _add_model(which)
    parser.add_argument("--against", choices=("flat",), help="also a flat byte Transformer of equal FLOPs per byte in matrices")
    parser.add_argument("--batch-size", type=_at_least_1, default=0, metavar="N", help="at a time (1; train: 8192 bytes)")
    parser.add_argument(
        "--length", type=_at_least_1, default=0, metavar="T", help="bytes of context (generate 2048, score 8192, train 1024)"
    )
    parser.add_argument("--engine", default="", metavar="NAME", help="that generates, as in MEGABYTE_ENGINE (the fastest)")
    _add_device(parser)
    parser.add_argument("--rounds", type=_at_least_1, default=5, metavar="N", help="rounds that count (%(default)s)")
    parser.add_argument(
        "--most-seconds", type=_at_least_1, default=60, metavar="S", help="curve: leave out what would take longer (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("curve.png"), metavar="PNG", help="curve: its picture (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(handler=run_bench)


def _add_compare(verbs: "argparse._SubParsersAction[Parser]") -> None:
    parser = verbs.add_parser(
        "compare",
        help="models against each other at equal cost",
        description="Trains the models of a plan on the same data with the same FLOPs and scores them on the same test items.",
    )
    parser.add_argument("--plan", required=True, choices=plan_names(), help="what is compared: %(choices)s", metavar="NAME")
    parser.add_argument("--data", required=True, type=Path, metavar="ROOT", help="folder of the data sets, see the README")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the comparison")
    parser.add_argument("--resume", action="store_true", help="go on with the comparison in --out")
    _add_device(parser)
    parser.add_argument("--size", choices=("cpu", "gpu"), help="sizes of the models (what fits the device)")
    parser.add_argument(
        "--budget", type=_positive, default=0.0, metavar="FLOPS", help="of each model, such as 1e14 (the plan's own)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a model instead of the table")
    parser.set_defaults(handler=run_compare)


def _add_info(verbs: "argparse._SubParsersAction[Parser]") -> None:
    parser = verbs.add_parser("info", help="the models", description="Says what the shipped models and those in runs/ are.")
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a model")
    parser.set_defaults(handler=run_info)


def _add_model(parser: "argparse._ActionsContainer") -> None:
    parser.add_argument("--model", metavar="NAME|DIR", help="a shipped model, or the folder of a run or an export")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (%(default)s)")


def _add_manners(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    parser.add_argument("--resume", action="store_true", help="leave out what an earlier call has made in the same folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object a result")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shortened(text)} is no whole number, or too large") from None


def _decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shortened(text)} is no number") from None


def _at_least_1(text: str) -> int:
    number = _whole(text)
    if not 1 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be at least 1 and less than 2^31")
    return number


def _positive(text: str) -> float:
    number = _decimal(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be a positive number")
    return number


def _port(text: str) -> int:
    number = _whole(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{shortened(text)} must lie in 1..65535")
    return number


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and never guesses at shortened option names."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        complain(f"{message}; {self.prog} --help lists the options")
        raise SystemExit(2)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The verb's handler and its settings; leaves with exit code 2 on wrong usage."""
    description = "Byte-level likelihood and generation for pictures, sound and text."
    parser = Parser(prog="python -m app", description=description, epilog=EXIT_CODES)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for add in (_add_ui, _add_train, _add_score, _add_generate, _add_bench, _add_compare, _add_info):
        add(verbs)
    # The page is the default, also with options of its own.
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["ui", *arguments]
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs one verb; the exit code."""
    args = parse(arguments)
    try:
        return args.handler(args)
    except BrokenPipeError:
        # Whoever read the results has gone; the interpreter's own flush at the end must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        complain(plain_sentence(error, None))
        return 1


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    # Read when torch is imported: threads that wait must sleep. Spinning ones take the processor from other programs and from
    # each other; on two busy cores everything took 5 to 10 times as long. For the first tenth of a millisecond they may spin:
    # waking one up after each of the many short operations of decoding takes longer than the operation.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if sys.argv[1:2] in (["score"], ["bench"]):  # others live longer than their largest tensors
        keep_freed_memory()
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _leave)
    # A caller may have closed the standard streams; no file of ours must get their numbers.
    while (_number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(_number)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for _stream in (sys.stdout, sys.stderr):
        _stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter still gets the line
    logging.basicConfig(level=logging.WARNING, handlers=[LogHandler()])
    sys.exit(main(sys.argv[1:]))
