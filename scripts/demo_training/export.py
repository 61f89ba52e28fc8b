"""Writes the trained model as an ordinary Hugging Face directory, with its model card and training curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import Environment, StrictUndefined
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from demo_training.evaluation import MAX_NEW_TOKENS, mean_of
from demo_training.recipe import RECIPE, Recipe
from demo_training.training_table import write_training

CURVE = "training_curve.png"
#: Stages of the tower alone, which have tasks of their own.
_TOWER = ("tower", "shrunk")


def export(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: Path,
    log: list[dict[str, Any]],
    facts: dict[str, Any],
    recipe: Recipe = RECIPE,
) -> None:
    """Write everything beside the old folder, then put it in its place.

    Args:
        model, processor: trained, in float32 on any device.
        folder: where to, replaced if it exists.
        log: the lines of ``log.jsonl``.
        facts: what the model card says besides; see :func:`model_card`.
        recipe: how it was made.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    model.cpu().save_pretrained(temporary)
    for file in temporary.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    processor.save_pretrained(temporary)
    _draw_curve(log, temporary / CURVE, recipe)
    write_training(log, temporary)
    (temporary / "README.md").write_text(model_card(log, facts, recipe), encoding="utf-8")
    (temporary / "evaluation.json").write_text(
        json.dumps(facts["accuracy"], indent=2) + "\n", encoding="utf-8"
    )
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def model_card(log: list[dict[str, Any]], facts: dict[str, Any], recipe: Recipe = RECIPE) -> str:
    """The model card.

    Args:
        log: the lines of ``log.jsonl``.
        facts: ``accuracy`` (of :func:`evaluation.evaluate`), ``seed``, ``machine``, ``n_parameters``, ``start_from``
            (the folder that the decoder's weights came from, or None) and ``profile`` (sentences on what a profile of
            the model shows).
        recipe: how the model was made.
    """
    seconds = {name: [line for line in log if line["stage"] == name][-1]["seconds"] for name in recipe.stages}
    stages = [
        {
            "name": name,
            "what": recipe.what[name],
            "schedule": recipe.schedules[name],
            "steps": recipe.schedules[name].stop or recipe.schedules[name].steps,
            "images": " or ".join(
                str(n)
                for n in sorted(
                    {phase.scenes or recipe.scenes[name] for phase in recipe.phases.get(name, ())}
                    or {recipe.scenes[name]}
                )
            ),
            "minutes": seconds[name] / 60,
        }
        for name in recipe.stages
    ]
    template = Environment(
        keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
    ).from_string((Path(__file__).parent / "model_card.md.j2").read_text(encoding="utf-8"))
    world = recipe.world
    per_scene = recipe.phases["joint"][-1].style.per_scene
    return template.render(
        **facts,
        stages=stages,
        cut_short=[name for name in recipe.stages if recipe.schedules[name].stop],
        world=world,
        sizes=recipe.sizes,
        family=recipe.family,
        vision=recipe.family.describe(recipe.sizes, world),
        per_scene="Ten" if per_scene == 10 else per_scene,
        tasks=world.tasks,
        curve=CURVE,
        mean=mean_of(facts["accuracy"], world.plain_tasks),
        two_hop_mean=mean_of(facts["accuracy"], world.two_hop_tasks),
        minutes=sum(seconds.values()) / 60,
        vocabulary=len(recipe.family.tokenizer(world)),
    )


def _draw_curve(log: list[dict[str, Any]], file: Path, recipe: Recipe) -> None:
    shown = [name for name in recipe.stages if name != "projector"]  # which answers nothing
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.75 * len(shown), 4.2), sharey=True, layout="constrained"
    )
    # A task has the same color in all panels but the tower's, which has tasks of its own.
    found = {name for line in log for name in line["accuracy"] if line["stage"] not in _TOWER}
    names = [*recipe.world.tasks, *sorted(found - set(recipe.world.tasks))]
    for axis, stage in zip(axes, shown, strict=True):
        # A stage that was stopped has some steps twice; those that count come last.
        lines = list({line["step"]: line for line in log if line["stage"] == stage}.values())
        lines.sort(key=lambda line: line["step"])
        order = names if stage not in _TOWER else list(lines[0]["accuracy"])
        table = pd.DataFrame([line["accuracy"] for line in lines], index=[line["step"] for line in lines])
        smooth = table.rolling(3, min_periods=1, center=True).mean().where(table.notna())
        for name in sorted(smooth.columns, key=order.index):
            number = order.index(name)
            axis.plot(
                smooth.index, smooth[name], label=name, linewidth=1.2, color=f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
            )  # fmt: skip
        axis.set(title=f"{stage} ({lines[-1]['seconds'] / 60:.0f} min)", xlabel="step", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    axes[0].set_ylabel("share right (means of 75 steps)")
    figure.savefig(file, dpi=110)
    plt.close(figure)
