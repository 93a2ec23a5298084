"""Commands that take a ticket elsewhere: other formats, and how fast each is."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import Set, app, errors

Deployed = Annotated[
    str,
    typer.Argument(
        metavar="TICKET",
        help="a search's folder, for its trained weights; a ticket, mostly of untrained ones; or a compact model",
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="with a ticket: a checkpoint (timm's .pth.tar, .safetensors) trained under it")
]
ImageSize = Annotated[int | None, typer.Option(min=1, help="pixels; the search's where that is known, else timm's")]
Arguments = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="of timm.create_model, where the ticket lacks one: img_size=64"),
]


@app.command()
def export(
    ticket: Deployed,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="timm, compact, onnx, openvino, 2:4 or csr")],
    output: Annotated[Path | None, typer.Option(help="the file; here, named after the ticket, if not given")] = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    batch: Annotated[int | None, typer.Option(min=1, help="images at a time, fixed; any number if not given")] = None,
    model_kwargs: Arguments = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="to onnx and openvino: take out first the channels that nothing reads")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that stands there")] = False,
) -> None:
    """Write a sparse model for others: plain timm, compacted, ONNX, OpenVINO, 2:4 or CSR; say whose weights it has."""
    with errors():
        from ..deploy.formats import check_format

        check_format(to)
        from ..deploy.export import export as run

        _write(run, ticket, to, output, weights, image_size, model_kwargs, overwrite, batch=batch, compact=compact)


@app.command()
def compact(
    ticket: Deployed,
    output: Annotated[Path | None, typer.Option(help="the file; here, named after the ticket, if not given")] = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    model_kwargs: Arguments = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that stands there")] = False,
) -> None:
    """Write the smaller model: without the channels and heads that nothing reads; as `export --to compact`."""
    with errors():
        from ..deploy.export import export as run

        _write(run, ticket, "compact", output, weights, image_size, model_kwargs, overwrite)


@app.command()
def speed(
    ticket: Deployed,
    weights: Weights = None,
    data: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="score its test images; the search's by default")
    ] = None,
    set: Set = None,
    batch: Annotated[int, typer.Option(min=2, help="images of a batch")] = 32,
    rounds: Annotated[int, typer.Option(min=2, help="how often each model is timed")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="that each engine works with")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="torch, onnxruntime, openvino; all if not given")] = None,
    image_size: ImageSize = None,
    model_kwargs: Arguments = None,
) -> None:
    """Time a ticket on this CPU: dense, with zeros, compacted and exported, side by side; say what got faster."""
    with errors():
        from ..config.files import read_overrides
        from ..deploy.speed import measure
        from ..deploy.speed_report import conditions, table, verdict

        console = Console()
        done = measure(
            ticket,
            weights=weights,
            image_size=image_size,
            arguments=read_overrides(model_kwargs or ()),
            batch=batch,
            rounds=rounds,
            threads=threads,
            engines=engine,
            data=data,
            overrides=set or (),
            say=lambda text: _say(console, text),
        )
        console.print(table(done))
        for text in (*conditions(done), *verdict(done)):
            _say(console, text)


def _write(
    run: Any,
    ticket: str,
    to: str,
    output: Path | None,
    weights: Path | None,
    image_size: int | None,
    model_kwargs: list[str] | None,
    overwrite: bool,
    **more: Any,
) -> None:
    """Export, and say what was written."""
    from ..config.files import read_overrides

    arguments = read_overrides(model_kwargs or ())
    given = {"weights": weights, "image_size": image_size, "arguments": arguments, "overwrite": overwrite}
    done = run(ticket, to, output, **given, **more)
    console = Console()

    _say(console, f"{done.path}: {done.path.stat().st_size:,} bytes")
    untrained = done.source.trained is False  # nobody is to find that out from an accuracy
    _say(Console(stderr=True) if untrained else console, "warning: " * untrained + f"weights: {done.source.told}")
    for line in done.told:
        _say(console, line)
    _say(console, "in Python:")
    for line in done.code:
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)


def _say(console: Console, text: str) -> None:
    """A paragraph: between its words on a terminal; as one line elsewhere."""
    console.print(text, soft_wrap=not console.is_terminal, highlight=False, markup=False)
