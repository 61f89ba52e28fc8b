"""``capa-probe run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from capa_probe.cli.app import app
from capa_probe.cli.options import Device, Dtype, ModelName, Revision, parse_keep, parse_layers, parse_tau
from capa_probe.errors import CapaProbeError

_CAPA = "CAPA alone"


@app.command()
def run(
    model: ModelName,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="The question; the model's own template goes around it.")
    ],
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="An image; may be given several times.")
    ] = None,
    method: Annotated[str, typer.Option(help="capa, fastv, random or vision-attention.")] = "capa",
    keep: Annotated[
        str,
        typer.Option(
            help="Share of the visual tokens, up to 1, which keeps all; a whole number above 1 counts tokens. Or one "
            "for each layer, with commas."
        ),
    ] = "0.25",
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="Layers before which tokens are dropped, counted from 0, such as 3 or 2,5; none for no pruning. "
            "[default: the method's own, or --paper-stage early]",
            show_default=False,
        ),
    ] = None,
    paper_stage: Annotated[
        Literal["early", "transition", "late"] | None,
        typer.Option(help="The layer of CAPA's published schedule; scaled to the depth of other models."),
    ] = None,
    execution: Annotated[
        Literal["compact", "masked"],
        typer.Option(help="compact: dropped tokens are gone. masked: they are hidden, which saves nothing."),
    ] = "compact",
    budget: Annotated[
        Literal["sample", "image"], typer.Option(help="Count --keep over all images, or over each.")
    ] = "sample",
    allow_none: Annotated[
        bool, typer.Option("--allow-none", help="Allow --keep 0, which drops every visual token.")
    ] = False,
    score: Annotated[
        Literal["contribution", "attention", "value_norm", "removal_effect", "random"] | None,
        typer.Option(help="What tokens are ranked by.  [default: contribution]", rich_help_panel=_CAPA),
    ] = None,
    ffn: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|skip",
            help="Visual tokens pass by FFNs: with the factors that capa-probe calibrate wrote, or with nothing.",
            rich_help_panel=_CAPA,
        ),
    ] = None,
    ffn_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS", help="In which layers.  [default: all of FILE]", rich_help_panel=_CAPA
        ),
    ] = None,
    rescore: Annotated[
        Literal["prefill", "every_step"] | None,
        typer.Option(help="Rank once, or anew for every generated token.", rich_help_panel=_CAPA),
    ] = None,
    protect_anchors: Annotated[
        bool,
        typer.Option("--protect-anchors", help="Never drop a Structural Anchor.", rich_help_panel=_CAPA),
    ] = False,
    only_dumps: Annotated[
        bool,
        typer.Option("--only-dumps", help="Drop nothing but Probability Dumps.", rich_help_panel=_CAPA),
    ] = False,
    tau: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|relative|auto",
            help="Threshold on sink strength, for these two. auto: 20, or relative where the model is too narrow "
            "for it.  [default: auto]",
            rich_help_panel=_CAPA,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of random scores.  [default: 0]")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Length of an answer; as many tokens are timed.")
    ] = 32,
    repeats: Annotated[int, typer.Option(min=0, metavar="N", help="How often both are timed.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers to a file as well.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Answer one prompt with and without pruning, and show what that saves and what it changes.

    Example: `capa-probe run llava-hf/llava-1.5-7b-hf --image cat.jpg --prompt "What is on the sofa?" --keep 0.25`
    """
    settings: dict[str, Any] = {"keep": parse_keep(keep), "execution": execution, "budget": budget}
    given = {"score": score, "rescore": rescore, "seed": seed}
    settings |= {name: value for name, value in given.items() if value is not None}
    flags = {"protect_anchors": protect_anchors, "only_dumps": only_dumps, "allow_none": allow_none}
    settings |= {name: True for name, value in flags.items() if value}
    if protect_anchors or only_dumps:
        settings["tau"] = parse_tau("auto" if tau is None else tau)
    elif tau is not None:
        raise CapaProbeError(
            "--tau was given without --protect-anchors or --only-dumps, which alone use it; give one of them, or leave "
            "--tau out."
        )
    if layers is not None:
        settings["layers"] = () if layers.strip() == "none" else tuple(parse_layers(layers))
    if layers is not None and paper_stage is not None:
        raise CapaProbeError("--layers and --paper-stage were given; give one of them.")
    if ffn is None and ffn_layers is not None:
        raise CapaProbeError("--ffn-layers was given without --ffn; give --ffn FILE or --ffn skip as well.")
    from capa_probe.console import status

    with status("starting"):  # importing PyTorch and transformers takes seconds
        from capa_probe.one_run import Wanted, answer_and_show

    wanted = Wanted(
        method,
        settings,
        stage=paper_stage,
        ffn=ffn,
        ffn_layers=None if ffn_layers is None else tuple(parse_layers(ffn_layers, "--ffn-layers")),
    )
    answer_and_show(
        model,
        prompt,
        image or [],
        wanted,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        json_file=json_file,
        device=device,
        load={"dtype": dtype, "revision": revision},
    )
