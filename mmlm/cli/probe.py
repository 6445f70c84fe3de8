"""`mmlm probe`: what an image encoder takes, gives and costs, and what its features look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmlm.cli.base import Command, Options, Parser, hush
from mmlm.config import parse_yaml

_MOST_ROWS = 1000


def _arguments(parser: Parser) -> None:
    parser.word("encoder", metavar="ENCODER", help="timm:NAME, a Hub id or folder, or {use: …}")
    parser.add_argument("--side", type=int, metavar="PX", help="side of the pictures")
    parser.add_argument("--untrained", action="store_true", help="do not read weights (timm)")
    parser.add_argument("--weights", metavar="FILE", help="a weight file (timm)")
    parser.add_argument("--image", metavar="FILE", help="a picture whose features are drawn")
    parser.add_argument(
        "--texts", nargs="+", metavar="TEXTS", help="encoders of texts to compare it with (CKA)"
    )
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="ENCODER", help="and further encoders"
    )
    parser.add_argument("--rows", metavar="FILE", help="pictures with captions, for --texts")
    parser.add_argument(
        "--out", metavar="PNG", default="probe.png", help="where they are drawn (probe.png)"
    )


def words_of(options: Options, named: str | None = None) -> dict[str, Any]:
    """Turn the command line into the words of a recipe."""
    named = options.encoder if named is None else named
    assert named is not None
    if named.lstrip().startswith("{"):
        words: dict[str, Any] = dict(parse_yaml(named, origin="ENCODER"))
    elif named.startswith("timm:"):
        words = {"use": "timm", "checkpoint": named.removeprefix("timm:")}
    else:
        words = {"use": "hf", "checkpoint": named}
    if options.side:
        words["side_px"] = options.side
    if options.untrained:
        words["pretrained"] = False
    if options.weights:
        words["weights"] = options.weights
    return words


def _run(options: Options) -> None:
    hush()
    from mmlm.vision import encoders, measure

    if options.texts:
        _compare(options)
        return
    config = encoders.read(words_of(options), origin="ENCODER")
    encoder = config.load().eval().requires_grad_(False)
    facts = encoder.facts
    parameters = sum(weight.numel() for weight in encoder.parameters())
    print(f"encoder     {options.encoder}: {parameters / 1e6:,.1f} M parameters")
    print(f"takes       {measure.sizes_that_work(config, encoder)}")
    print(f"pixels      mean {_numbers(facts.mean)}, deviation {_numbers(facts.std)}")
    print(f"            {facts.resample}, {facts.channels} channels")
    for stage in measure.stages(encoder):
        grid = f"{stage.rows} × {stage.columns}"
        print(f"gives       {grid:>9} = {stage.num_tokens:>5,} × {stage.width:,}  {stage.name}")
    if facts.num_prefix:
        print(f"prefix      {facts.num_prefix} tokens, {facts.kept_prefix} handed on")
    print(f"costs       {measure.flops_of(encoder) / 1e9:,.2f} GFLOPs a picture")
    print(f"speed       {measure.images_per_second(encoder):,.1f} pictures a second here")
    if options.image:
        print(f"drawn       {_draw(options, encoder)}")


def _compare(options: Options) -> None:
    """Print how alike encoders of pictures and of texts see the same rows."""
    from mmlm.data.mixture import open_mixture
    from mmlm.data.schema import BadRowError
    from mmlm.errors import ConfigError
    from mmlm.evaluation.probes.pairs import rank_pairs
    from mmlm.messages import images_of

    if not options.rows:
        raise ConfigError("--texts needs --rows: a file of pictures with captions, as for training")
    source = open_mixture(options.rows, folder=Path.cwd()).sources[0]
    rows: list[tuple[Any, str]] = []
    for number in range(min(len(source), _MOST_ROWS)):
        try:
            messages = source.sample(number).messages
        except BadRowError:
            continue
        said = " ".join(each.text for each in messages if each.role == "assistant").strip()
        if said and len(images_of(messages)) == 1:
            rows.append((images_of(messages)[0], said))
    names = [options.encoder, *options.against]
    found = rank_pairs({name: words_of(options, name) for name in names}, options.texts, rows)
    print(f"compared    {len(rows):,} pictures with their captions; 1 is alike, 0 unrelated")
    for pair in found:
        print(f"alike       {pair.score:6.3f}  {pair.vision}  and  {pair.text}")


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _draw(options: Options, encoder: Any) -> Path:
    """Draw the picture, and the colours of its features beside it."""
    import torch

    from mmlm.images import open_image
    from mmlm.processing import MMLMImageProcessor
    from mmlm.vision import measure

    image = open_image(options.image)
    policy = "native" if encoder.facts.rule == "multiple" else "squash"
    looks = MMLMImageProcessor({"use": policy}, encoder.facts.to_dict(), None, {"use": "linear"})
    pixels, size = looks.look(image)
    with torch.no_grad():
        tiles = [tile.size for tile in looks.counter.plan(size).tiles]
        if looks.counter.is_flat:
            features = encoder.encode_numbers(pixels, tiles)
        else:
            features = encoder(pixels)
    out = Path(options.out)
    measure.draw_maps(image, measure.colours(features)).save(out)
    return out


COMMANDS = {
    "probe": Command(
        name="probe",
        usage="ENCODER [options]",
        about="Load an image encoder and say what it takes, gives and costs here; with --image,\n"
        "draw its features in colours (their three principal components).",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm probe google/siglip2-base-patch16-256", "a checkpoint of transformers"),
            ("mmlm probe timm:convnext_tiny --untrained", "a network of timm, no weights"),
            ("mmlm probe FOLDER --image cat.jpg", "writes probe.png"),
            ("mmlm probe FOLDER --texts BERT --rows rows.jsonl", "how alike both see the rows"),
        ],
    )
}
