"""How a sample shows itself in a notebook: its images with their regions, question and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capa_probe.display import card, facts, picture, side_by_side, text
from capa_probe.errors import BadImageError

if TYPE_CHECKING:
    from capa_probe.samples.sample import Region, Sample

#: Images that are shown at most.
MOST_PICTURES = 4


def sample_html(sample: Sample) -> str:
    """A card with a sample's images, question, accepted answers and task; an image that cannot be used says why."""
    shown = []
    for number in range(min(len(sample.images), MOST_PICTURES)):
        label = f"image {number} of sample {sample.id}"
        boxes = sample.regions[number] if sample.regions else ()
        caption = "outlined: what the answer hangs on" if boxes else ""
        try:
            image = sample.open_image(number)
            shown.append(picture(image, _outlines(boxes, max(image.size)), label, caption))
        except BadImageError as error:
            shown.append(text(str(error)))
    more = len(sample.images) - MOST_PICTURES
    known = {
        "question": sample.question,
        "answers": ", ".join(sample.answers) or None,
        "task": sample.task,
        "images": f"{len(sample.images)}, of which {more} are not shown" if more > 0 else None,
    }
    return card(f"Sample {sample.id}", side_by_side(shown), facts(known))


def _outlines(boxes: tuple[Region, ...], side: int) -> str:
    unit = side / 384
    return "".join(
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="{colour}" '
        f'stroke-width="{thick * unit:.2f}"/>'
        for left, top, right, bottom in boxes
        for colour, thick in (("#000000", 5.0), ("#f0e442", 2.5))
    )
