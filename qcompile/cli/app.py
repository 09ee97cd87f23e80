"""The commands and their options; what they do is in the modules beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompile.cli import EXIT_CODES

app = typer.Typer(
    name="qcompile",
    help="Compile a language model and a recipe into a smaller, faster model, and prove that it is the same model.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would take as long to import as all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="An HF directory or hub id, a .pt2 file, a directory that qcompile saved, or zoo:llama, zoo:opt, zoo:moe. "
        "Left out: the embedded Llama.",
    ),
]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="A preset's name or a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Override a field: weights.group=64, activations=null."),
]
Data = Annotated[
    str | None,
    typer.Option(help="Calibration and evaluation text: a file, .jsonl, a data set's name, or generated (default)."),
]
Resume = Annotated[
    Path | None,
    typer.Option(help="Keep finished segments in this directory; the same command goes on behind the last of them."),
]
CalibrationSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="calibration.FIELD=VALUE",
        help="How data is read: calibration.samples=8, calibration.bos=document, calibration.packing=documents.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def export(
    model: Model = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="What to make; `qcompile targets` lists them.",
            show_default="the recipe's, or onnx_qcdq",
        ),
    ] = None,
    recipe: RecipeOption = "int4-g128",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new or empty directory.", show_default="qcompile-out/…")
    ] = None,
    settings: Settings = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="An option of the target: opset=23.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="GPUs that the triton target compiles for: sm_90,gfx942; none."),
    ] = None,
    packing: Annotated[
        str | None, typer.Option(metavar="HOW", help="How torch_mlir stores codes: packed, unpacked.")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(metavar="HOW", help="Parts of a torch_mlir artifact: none, layers:N, tensor:N.")
    ] = None,
    dialect: Annotated[
        str | None, typer.Option(metavar="NAME", help="What torch_mlir writes: iree, brevitas (text alone).")
    ] = None,
    cpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="CPU that torch_mlir compiles for: host, x86-64-v3, …")
    ] = None,
    also: Annotated[
        str | None, typer.Option(metavar="NAMES", help="GPUs that torch_mlir compiles for as well: cuda:sm_80,rocm.")
    ] = None,
    data: Data = None,
    resume: Resume = None,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity and KL before and after.")] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile and export a model; run the result and compare it.

    Nothing is put in place before it ran in its own runtime and agreed with the program.
    """
    from qcompile.cli.export import run

    named = {"gpu": gpu, "packing": packing, "shards": shards, "dialect": dialect, "cpu": cpu, "also": also}
    run(model, target, recipe, out, settings or [], option or [], named, data, resume, evaluate, json)


@app.command(name="eval")
def evaluate_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|ARTIFACT", help="What to measure; artifacts run in their runtime.")
    ],
    against: Annotated[
        str | None, typer.Option(help="The original, for KL and top-1 agreement; an artifact knows its own.")
    ] = None,
    data: Data = None,
    limit: Annotated[int, typer.Option(help="Sequences (or documents) to measure on, at most.")] = 64,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence; the model's context if not given.")] = None,
    documents: Annotated[
        bool, typer.Option(help="Each document on its own, cut to the context, instead of packed text.")
    ] = False,
    field: Annotated[
        str | None, typer.Option(help="What holds the text in a .jsonl file or a data set, if not text.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, and KL and agreement with the original."""
    from qcompile.cli.evaluate import run

    run(model, against, data, field, limit, length, documents, json)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="An exported artifact or a saved model.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check an artifact's files, codes and logits.

    Files by their hashes, weights by their codes, logits in the artifact's runtime.
    """
    from qcompile.cli.verify import run

    run(directory, json)


@app.command()
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL|ARTIFACT|PROGRAM", help="What to look at.", show_default="the embedded Llama"),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the program as IR text.")] = False,
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            metavar="SPEC",
            help="Show what this spec would do to each weight of MODEL, or of --weights: bits, relative squared error, "
            "SQNR. Several give a column each.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Look at the tensors of a .safetensors file, or of an HF directory."),
    ] = None,
    spaces: Annotated[
        bool,
        typer.Option("--spaces", help="Show the channel spaces: what may act on which channels, what forbids more."),
    ] = False,
    passes: Annotated[
        str | None,
        typer.Option(
            "--passes",
            "-p",
            help="Run these first. With --spaces raise-norms runs if none are given, for a norm that is spelled out "
            "stops every space; '' runs none.",
        ),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(help="Only spaces that admit it: permutation, diagonal, orthogonal or linear."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="A row for each layer's spaces, not one for all alike.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the spaces into an .svg or .html file.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model, an artifact or a program consists of, its channel spaces, or what a format would do to it.

    With --spec or --weights: every float tensor of two or more axes, one in memory at a time, with its largest
    magnitude and that over its root mean square. No architecture is needed, and nothing is captured.
    """
    from qcompile.cli.inspect import Look, run

    run(model, Look(text, spaces, passes, level, every, picture), spec or [], weights, json)


@app.command()
def formats(
    spec: Annotated[
        list[str] | None, typer.Argument(metavar="SPEC", help="Explain this format or spec, as 'mxfp4(even)'.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List what a spec string can say, or explain one.

    Without SPEC: elements, named formats, and every other word with its meaning. With it: each field and where it comes
    from, what is stored and its bits, the error on random data, and which targets take it.
    """
    from qcompile.cli.formats import run

    run(spec or [], json)


@app.command()
def plan(
    model: Model = None,
    recipe: RecipeOption = "int4-g128",
    settings: Settings = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Also list what this target cannot take.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a recipe would give each layer, and why, and the memory and time that calibration would take.

    Nothing is computed and no weight is read; this machine's speed is measured in a fraction of a second.
    """
    from qcompile.cli.plan import run

    run(model, recipe, settings or [], target, json)


@app.command()
def opt(
    program: Annotated[str, typer.Argument(help="IR text (.qir), a .pt2 file, a saved program, or a model.")],
    passes: Annotated[str, typer.Option("--passes", "-p", help="Like 'pass-a, pass-b(option=3)'.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=".qir: text; .pt2: a torch.export program; else a directory.")
    ] = None,
    data: Data = None,
    settings: CalibrationSettings = None,
    resume: Resume = None,
    dump: Annotated[Path | None, typer.Option(help="Write the program after each pass into this directory.")] = None,
    print_changed: Annotated[bool, typer.Option(help="Print the program after each pass that changed it.")] = False,
    drift: Annotated[bool, typer.Option(help="Measure how far each pass moves the outputs.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run passes on a program and say what each did."""
    from qcompile.cli.opt import run

    run(program, passes, out, data, settings or [], resume, dump, print_changed, drift, json)


@app.command()
def bisect(
    program: Annotated[str, typer.Argument(help="IR text (.qir), a .pt2 file, a saved program, or a model.")],
    passes: Annotated[str, typer.Option("--passes", "-p", help="The pipeline that breaks it.")],
    tolerance: Annotated[float, typer.Option(help="Largest max|Δ|/max|output| that counts as unchanged.")] = 1e-4,
    data: Data = None,
    settings: CalibrationSettings = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the first pass that changes what a program computes."""
    from qcompile.cli.opt import run_bisect

    run_bisect(program, passes, tolerance, data, settings or [], json)


@app.command()
def passes(json: Json = False, debug: Debug = False) -> None:
    """List the passes with their options."""
    from qcompile.cli.lists import passes as run

    run(json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this preset as YAML.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the preset recipes, or print one."""
    from qcompile.cli.lists import recipes as run

    run(name, json)


@app.command()
def targets(json: Json = False, debug: Debug = False) -> None:
    """List the targets with their options."""
    from qcompile.cli.lists import targets as run

    run(json)


@app.command(name="run")
def run_command(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT|MODEL", help="What to run; an artifact runs in its runtime.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--tokens", "-n", help="How many tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy; above: sampled.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a text."""
    from qcompile.cli.generate import run

    run(artifact, prompt, max_new_tokens, temperature, seed, json)


@app.command()
def tune(
    directory: Annotated[Path, typer.Argument(help="An artifact of the triton target.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure an artifact's kernels on this machine's GPU and write the best choices back."""
    from qcompile.cli.tune import run

    run(directory, json)


@app.command()
def version() -> None:
    """Print the version."""
    import qcompile

    print(qcompile.__version__)
