"""The command line: each verb parses, calls one public function and prints what it returns.

Under torchrun, profile, apply and evaluate share their batches among the processes, and train its own way; the first
process prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from actkit.cli.options import (
    BatchSize,
    BeyondContext,
    Data,
    Device,
    Dtype,
    Json,
    Length,
    MaxMemory,
    ModelName,
    Out,
    Overwrite,
    RemoteCode,
    Seed,
    Sequences,
    Threads,
    share,
)
from actkit.cli.terminal import alone, is_expected, note, print_error, print_result, prints, set_up, together

app = typer.Typer(
    name="actkit",
    help="Profile, change and prove the activations of any PyTorch model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Run the command line. What actkit refuses ends with one line on standard error and the exit code 1."""
    try:
        app()
    except Exception as error:
        if not is_expected(error):
            raise
        print_error(f"error: {error}")
        sys.exit(1)


@app.command()
def profile(
    model: ModelName,
    data: Data = None,
    sequences: Sequences = 32,
    length: Length = None,
    batch_size: BatchSize = 8,
    store: Annotated[
        Path | None, typer.Option(help="A folder of `actkit harvest`, in place of data: the model is not run.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Also write the pictures to this HTML file.")] = None,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show what the activations look like, and which methods that suggests."""
    set_up(threads, seed)
    from actkit import verbs

    if figure is not None and figure.exists() and not overwrite:
        raise ValueError(f"figure: {figure} exists already; choose another file, or pass --overwrite.")
    with together():
        result = verbs.profile(
            model,
            data,
            store=store,
            sequences=sequences,
            length=length,
            batch_size=batch_size,
            max_memory=max_memory,
            device=device,
            dtype=dtype,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
    print_result(result, as_json)
    if figure is not None and prints():
        result.figure().write_html(figure)
        note(f"pictures: {figure}")


@app.command()
def analyze(
    model: ModelName,
    name: Annotated[
        str, typer.Argument(help="An analysis, with settings after a colon: neuron_activity:threshold=0.1.")
    ],
    data: Data = None,
    sequences: Sequences = 32,
    length: Length = None,
    batch_size: BatchSize = 8,
    html: Annotated[Path | None, typer.Option(help="Also write its page to this HTML file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write all that it found to this JSON file.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --html and --out.")] = False,
    as_json: Json = False,
) -> None:
    """Run an analysis by its name, ours or one of a plug-in. An unknown name lists them all."""
    alone("analyze")
    set_up(threads, seed)
    from actkit import verbs

    result = verbs.analyze(
        model,
        name,
        data,
        html=html,
        out=out,
        overwrite=overwrite,
        sequences=sequences,
        length=length,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    print_result(result, as_json)
    for path in (html, out):
        if path is not None:
            note(f"written: {path}")


@app.command()
def harvest(
    model: ModelName,
    sites: Annotated[str, typer.Argument(help="Sites or patterns with commas: blocks.3.block.output,mlp.hidden.")],
    out: Out,
    tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens, in whole rows. Default: all.")] = None,
    max_disk: Annotated[str | None, typer.Option(help="Hard cap for the folder, such as 2GB.")] = None,
    data: Data = None,
    sequences: Sequences = None,
    length: Length = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Keep the activations of sites in a folder. The same command goes on after a kill."""
    set_up(threads, seed)
    from actkit import verbs

    with together():
        result = verbs.harvest(
            model,
            [site.strip() for site in sites.split(",")],
            data,
            out=out,
            tokens=tokens,
            max_disk=max_disk,
            announce=None if as_json else note,
            sequences=sequences,
            length=length,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
    print_result(result, as_json)


@app.command()
def sae(
    store: Annotated[Path, typer.Argument(help="A folder that `actkit harvest` wrote.")],
    out: Out,
    site: Annotated[str | None, typer.Option(help="Which of its sites. Default: the only one.")] = None,
    kind: Annotated[
        Literal["topk", "batchtopk", "matryoshka", "jumprelu", "gated", "standard"], typer.Option(help="Of what kind.")
    ] = "topk",
    width: Annotated[int, typer.Option(min=1, metavar="N", help="How many latents.")] = 4096,
    k: Annotated[
        float | None, typer.Option(help="Latents that are on in a row (topk and its kin). Default: 32.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Weight of the penalty (all other kinds).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of a step.")] = 4096,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. Default: by the width.")] = None,
    skip: Annotated[int, typer.Option(min=0, metavar="N", help="Leave out the first tokens of each sequence.")] = 0,
    longest: Annotated[
        float,
        typer.Option(metavar="X", help="Leave out rows whose norm is over X times the median, as of attention sinks."),
    ] = 10.0,
    held_out: Annotated[
        float, typer.Option(parser=share, metavar="SHARE", help="Of the rows, measured and not trained on: 10%.")
    ] = 0.1,
    figure: Annotated[Path | None, typer.Option(help="Also write how often latents fire to this HTML file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the state kept beside --out.")] = False,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a sparse autoencoder on activations that are kept in a folder. SAELens opens what it writes."""
    alone("sae")
    set_up(threads, seed)
    from actkit import verbs

    try:
        result = verbs.sae(
            store,
            site,
            out=out,
            kind=kind,
            latents=width,
            k=k,
            sparsity=sparsity,
            steps=steps,
            size=size,
            learning_rate=learning_rate,
            skip=skip,
            longest=longest,
            held_out=held_out,
            resume=resume,
            overwrite=overwrite,
            device=device,
            seed=seed,
        )
    except KeyboardInterrupt:
        note(f"stopped. The state is kept beside {out}; go on with the same command and --resume.")
        raise typer.Exit(130) from None
    print_result(result, as_json)
    if figure is not None:
        result.report.figure().write_html(figure)
        note(f"picture: {figure}")


@app.command()
def latents(
    autoencoder: Annotated[Path, typer.Argument(help="A folder that `actkit sae` wrote, or another tool's.")],
    store: Annotated[Path, typer.Argument(help="A folder that `actkit harvest` wrote.")],
    site: Annotated[str | None, typer.Option(help="Which of its sites. Default: the autoencoder's.")] = None,
    text_of: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Show tokens as this model's text. Default: their ids.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=5, metavar="N", help="Places of each latent.")] = 3,
    longest: Annotated[
        float, typer.Option(metavar="X", help="Leave out rows whose norm is over X times the median.")
    ] = 10.0,
    html: Annotated[Path | None, typer.Option(help="Also write a page to sort and filter to this HTML file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --html.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show what the latents of a sparse autoencoder fire on."""
    alone("latents")
    set_up(threads, 0)
    from actkit import verbs

    result = verbs.latents(
        autoencoder, store, site, text_of=text_of, count=count, longest=longest, html=html, overwrite=overwrite
    )
    print_result(result, as_json)
    if html is not None:
        note(f"page: {html}")


@app.command()
def optimize(
    model: ModelName,
    out: Out = Path("actkit-report"),
    data: Data = None,
    max_loss: Annotated[
        float, typer.Option(parser=share, metavar="SHARE", help="Largest loss of quality that is accepted: 0.02 or 2%.")
    ] = 0.02,
    target: Annotated[
        Literal["latency", "throughput", "memory", "disk", "quality"] | None,
        typer.Option(
            metavar="NAME",
            help="Choose the best for latency, throughput, memory, disk or quality; else for latency, or else disk.",
        ),
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Least speedup that is wanted, such as 1.5: what has less does not pay.")
    ] = None,
    max_peak: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most memory of a process that runs it, such as 300MB.")
    ] = None,
    max_disk: Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes on disk, such as 100MB.")] = None,
    max_recipes: Annotated[int, typer.Option(min=1, max=20, help="How many recipes to try at most.")] = 12,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Try these instead: YAML files or names like 'awq,wina'. Repeatable.")
    ] = None,
    mixes: Annotated[
        int,
        typer.Option(min=0, help="How many mixes to try, with other settings for each part of the model, such as 2."),
    ] = 0,
    minutes: Annotated[
        float | None, typer.Option(help="Spend at most so many minutes, best candidates first. --resume goes on.")
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure speed and memory in fresh processes.")] = True,
    prompt: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Measure speed behind so many tokens; from 1024 on the cache is a candidate too."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Tokens that are timed for each row, 32 if not given.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rows timed together, 1 if not given; 8 for throughput.")
    ] = None,
    prefill: Annotated[
        Literal["sparse", "dense"],
        typer.Option(metavar="NAME", help="dense: candidates that skip inputs read all of them in prompts."),
    ] = "sparse",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the journal in --out holds.")] = False,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Search for a cheaper model that is as good: measured, proved, saved, or refused with the reasons."""
    alone("optimize")
    set_up(threads, seed)
    import actkit

    try:
        result = actkit.optimize(
            model,
            out=out,
            data=data,
            max_loss=max_loss,
            target=target,
            min_speedup=min_speedup,
            max_peak=max_peak,
            max_disk=max_disk,
            max_recipes=max_recipes,
            recipes=recipe,
            mixes=mixes,
            minutes=minutes,
            speed=speed,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            batch=batch,
            prefill=prefill,
            resume=resume,
            max_memory=max_memory,
            device=device,
            dtype=dtype,
            threads=threads,
            seed=seed,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        note(f"stopped. What was measured is in {out / 'journal.jsonl'}; go on with the same command and --resume.")
        raise typer.Exit(130) from None
    print_result(result, as_json)
    if not as_json:
        from actkit.search.closing import in_short

        note(in_short(result, out))


@app.command()
def apply(
    model: ModelName,
    recipe: Annotated[str, typer.Option(help="A YAML file, or names like 'awq,wina'.")],
    out: Out,
    data: Data = None,
    sequences: Sequences = 16,
    length: Length = None,
    batch_size: BatchSize = 8,
    min_coverage: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Least share of the parameters in blocks that a transform must touch; "
            "by default what the method itself expects, mostly 0.5.",
        ),
    ] = None,
    proof: Annotated[bool, typer.Option(help="Load what was saved in a fresh process and compare.")] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a recipe of stages that was interrupted on its way to --out.")
    ] = False,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Apply a recipe, save the changed model and prove that it loads as it was."""
    set_up(threads, seed)
    from actkit import verbs

    try:
        with together():
            result = verbs.apply_and_save(
                model,
                recipe,
                out,
                data,
                sequences=sequences,
                length=length,
                batch_size=batch_size,
                min_coverage=min_coverage,
                proof=proof,
                resume=resume,
                max_memory=max_memory,
                device=device,
                dtype=dtype,
                seed=seed,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                announce=None if as_json else note,
            )
    except KeyboardInterrupt:
        from actkit.core.train.staged_run import state_of

        if not state_of(out).is_dir():  # nothing to go on with
            raise
        note(f"stopped. The state is kept in {state_of(out)}; go on with the same command and --resume.")
        raise typer.Exit(130) from None
    print_result(result, as_json)


@app.command()
def evaluate(
    model: ModelName,
    against: Annotated[str | None, typer.Option(help="The original to compare with: name, folder or hub id.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Also run these through lm-eval: 'documentation', task files or its names, with commas."),
    ] = None,
    data: Data = None,
    sequences: Sequences = None,
    length: Length = None,
    beyond_context: BeyondContext = False,
    batch_size: BatchSize = 8,
    speed: Annotated[bool, typer.Option(help="Also measure speed and memory in fresh processes.")] = False,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, for speed.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode, for speed.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded at a time, for speed.")] = 1,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure quality, cost, and with --speed also speed and memory, with intervals."""
    set_up(threads, seed)
    from actkit import verbs

    with together():
        result = verbs.evaluate(
            model,
            data,
            against=against,
            tasks=tasks,
            sequences=sequences,
            length=length,
            beyond_context=beyond_context,
            batch_size=batch_size,
            speed=speed,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            batch=batch,
            device=device,
            dtype=dtype,
            threads=threads,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
    print_result(result, as_json)


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts instead, one on each line; several are written at a time.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=8, help="Texts at a time, with --prompts; the fastest number by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Choose among the likeliest of this share.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text. Repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt, by the model's chat template.")] = False,
    cache: Annotated[
        Literal["float32", "bfloat16", "int8"] | None,
        typer.Option(help="How the decoder keeps keys and values; float32 if the model does not say another."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write text with a language model, as it comes."""
    alone("generate")
    from actkit.generating import generate as write
    from actkit.generating import generate_all, packed_folder

    texts = _prompts(prompt, prompts, batch)
    set_up(threads, seed, transformers=packed_folder(model) is None)
    from actkit.core.ground.compiling import compiling
    from actkit.core.measure.sampling import Sampling

    engine: list[str] = []
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        "stop": tuple(stop or ()),
        "chat": chat,
        "cache": cache,
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "announce": engine.append,
    }
    with compiling(lambda: note("compiling the kernels for these weights, once on this machine: about a minute")):
        if texts is not None:
            written = generate_all(model, texts, batch=batch, **settings)
            _write_all(written, texts, "\n" if chat else "", engine, as_json)
            return
        assert prompt is not None
        pieces = write(model, prompt, **settings)
        if as_json:
            print_result({"prompt": prompt, "text": "".join(pieces), "engine": engine[0]}, True)
            return
        note(f"engine: {engine[0]}")
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()


def _prompts(prompt: str | None, file: Path | None, batch: int | None) -> list[str] | None:
    """The prompts of a file, or None if one was given as an argument."""
    from actkit.core.ground.errors import DataError

    if (prompt is None) == (file is None):
        given = "neither" if prompt is None else "both"
        raise ValueError(f"prompt, prompts: {given} was given; give a text, or a file of texts with --prompts.")
    if file is None:
        if batch is not None:
            raise ValueError(f"batch: {batch} was given beside one prompt; leave it out, or give --prompts.")
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"prompts: {file} cannot be read ({error}); give a text file, one prompt on each line."
        ) from None
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if empty is not None or not lines:
        where = "no line" if empty is None else f"an empty line ({empty})"
        raise DataError(f"prompts: {file} has {where}; give one prompt on each line.")
    return lines


def _write_all(
    written: Iterator[tuple[int, str]], prompts: list[str], between: str, engine: list[str], as_json: bool
) -> None:
    """Print prompts and texts in the order of the prompts, each as soon as those before it are there."""
    if not as_json:
        note(f"engine: {engine[0]}")
    found: dict[int, str] = {}
    printed = 0
    for number, text in written:
        found[number] = text
        while not as_json and printed in found:
            typer.echo(f"[{printed + 1}] {prompts[printed]}{between}{found[printed]}")
            printed += 1
    if as_json:
        texts = [{"prompt": prompt, "text": found[number]} for number, prompt in enumerate(prompts)]
        print_result({"texts": texts, "engine": engine[0]}, True)


@app.command()
def show(
    model: ModelName,
    data: Data = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show what a model is: its parts, its coverage, and what actkit changed on it."""
    alone("show")
    set_up()
    from actkit import verbs

    print_result(verbs.show(model, data, device=device, dtype=dtype, trust_remote_code=trust_remote_code), as_json)


@app.command()
def export(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    format: Annotated[
        str,
        typer.Option(
            help="compressed-tensors (transformers, vLLM), gguf (llama.cpp), dense or transformers (plain "
            "transformers), or packed (actkit generate)."
        ),
    ] = "compressed-tensors",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write low-rank corrections as a peft adapter inside the folder.")
    ] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Evaluate the model first, for the card.")] = False,
    data: Data = None,
    sequences: Sequences = None,
    length: Length = None,
    batch_size: BatchSize = 8,
    proof: Annotated[bool, typer.Option(help="Read it back in a fresh process without actkit and compare.")] = True,
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a quantized model so that others load it without actkit, or packed as the decoder maps it."""
    set_up(threads, seed)
    import actkit

    result = actkit.export(
        model,
        out,
        format,
        adapter=adapter,
        measure=measure,
        data=data,
        sequences=sequences,
        length=length,
        batch_size=batch_size,
        proof=proof,
        dtype=dtype,
        seed=seed,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    print_result(result, as_json)


def _rate(text: str) -> tuple[str, float]:
    """A pattern of names and its learning rate, from 'PATTERN=RATE'."""
    pattern, _, rate = text.rpartition("=")
    try:
        return pattern, float(rate)
    except ValueError:
        raise ValueError(f"rate: {text!r} was given; write it like '*norm*=1e-3'.") from None


@app.command()
def train(
    model: ModelName,
    out: Out,
    data: Data = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="A training rule, such as 'prosparse:preset=7b'. Repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 1e-4,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="adamw, sgd:momentum=0.9, muon ...")] = "adamw",
    trainable: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="Train only parameters of such names: '*norm*'. Repeatable."),
    ] = None,
    rates: Annotated[
        list[str] | None,
        typer.Option("--rate", metavar="NAMES=RATE", help="Another peak for some: '*norm*=1e-3'. Repeatable."),
    ] = None,
    score: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Judges the best step: accuracy:better=higher. Default: loss.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(metavar="NAME", help="Of the rate: cosine, linear, constant or wsdc:stable=0.6.")
    ] = "cosine",
    warmup: Annotated[float, typer.Option(min=0, help="Share of the steps in which the rate rises.")] = 0.05,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimizer step.")] = 1,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Train low-rank changes instead of the weights: lora:rank=8, eva:rank=8 ..."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the changes to the weights; else --out holds the adapter alone.")
    ] = False,
    sequences: Sequences = None,
    length: Length = None,
    beyond_context: BeyondContext = False,
    batch_size: BatchSize = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the state kept in --out.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model, under training rules if any. Keeps the least validation loss, or what the rules ask for."""
    set_up(threads, seed)
    from actkit import verbs

    try:
        result = verbs.train(
            model,
            data,
            out=out,
            rules=rule or (),
            steps=steps,
            learning_rate=learning_rate,
            learning_rates=dict(map(_rate, rates or ())),
            optimizer=optimizer,
            trainable=trainable or None,
            score=score,
            schedule=schedule,
            warmup=warmup,
            accumulation=accumulation,
            adapter=adapter,
            merge=merge,
            sequences=sequences,
            length=length,
            beyond_context=beyond_context,
            batch_size=batch_size,
            resume=resume,
            device=device,
            dtype=dtype,
            seed=seed,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        kept = f"The state is kept in {out}; go on with the same command and --resume."
        note(f"stopped. {kept if adapter is None else 'Nothing is kept of a training of adapters.'}")
        raise typer.Exit(130) from None
    print_result(result, as_json)


@app.command("compare-functions")
def compare_functions(
    names: Annotated[str, typer.Argument(help="Arms with commas, the baseline first: silu,relu,gr_kan.")],
    on: Annotated[str, typer.Option(help="digits-mlp, digits-cnn, digits-vit, text, formulas or tabular.")],
    out: Out = Path("compared"),
    equal: Annotated[
        Literal["steps", "time"],
        typer.Option(metavar="NAME", help="steps; or time, to train each for the baseline's seconds."),
    ] = "steps",
    seeds: Annotated[int, typer.Option(metavar="N", help="How many, 2 or more.")] = 5,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of the baseline's trainings. Default: the task's own.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of the baseline. Default: the task's own.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the journal in --out holds.")] = False,
    threads: Threads = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare functions, MLPs, pooling or attention on one task, with equal parameters, tuning and data."""
    alone("compare-functions")
    set_up(threads, seed)
    import actkit

    try:
        result = actkit.compare_functions(
            names,
            on=on,
            out=out,
            equal=equal,
            seeds=seeds,
            steps=steps,
            width=width,
            resume=resume,
            overwrite=overwrite,
            seed=seed,
        )
    except KeyboardInterrupt:
        note(f"stopped. What was measured is in {out / 'journal.jsonl'}; go on with the same command and --resume.")
        raise typer.Exit(130) from None
    print_result(result, as_json)
    if not as_json:
        note(f"page: {out / 'index.html'}")


@app.command()
def papers(
    slug: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family, such as sparsity.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind, such as transform.")] = None,
    status: Annotated[str | None, typer.Option(help="working, built or planned.")] = None,
    year: Annotated[int | None, typer.Option(help="Year of the first public version.")] = None,
    text: Annotated[str | None, typer.Option(help="Words that must occur in names or summary.")] = None,
    as_json: Json = False,
) -> None:
    """List the catalogue of papers."""
    from actkit import catalogue

    found = (
        [catalogue.paper(slug)]
        if slug
        else catalogue.papers(family=family, kind=kind, status=status, year=year, text=text)
    )
    if as_json:
        print_result([entry.to_dict() for entry in found], True)
        return
    from rich.console import Console

    Console(highlight=False).print(catalogue.details(found[0]) if slug else catalogue.table(found))


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(help="The paper's slug, as in: actkit papers.")],
    subject: Annotated[
        str | None,
        typer.Option(help="Only the claims about this model, such as smollm2; else about all that comes with actkit."),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the outcome as the paper's evidence on these subjects.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run a paper's claims as experiments: what it says, what it measures here, and whether that holds."""
    alone("reproduce")
    set_up(threads)
    import actkit

    outcome = actkit.reproduce(slug, subject=subject, record=record)
    print_result(outcome, as_json)


if __name__ == "__main__":
    main()
