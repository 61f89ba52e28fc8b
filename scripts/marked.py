"""Parts of pages that scripts write: what stands between two markers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from capa_probe.errors import CapaProbeError
from capa_probe.files import replace


@dataclass(frozen=True)
class Marked:
    """The part of a page between the lines ``<!-- NAME: start -->`` and ``<!-- NAME: end -->``.

    Attributes:
        name: of the part.
    """

    name: str

    @property
    def start(self) -> str:
        """The line before it."""
        return f"<!-- {self.name}: start -->"

    @property
    def end(self) -> str:
        """The line behind it."""
        return f"<!-- {self.name}: end -->"

    def written(self, text: str, part: str) -> str:
        """A page with this part in place of what was there.

        Raises:
            CapaProbeError: the page has not each of the two lines once, in this order.
        """
        before, start, rest = text.partition(self.start)
        _, end, after = rest.partition(self.end)
        if not (start and end) or self.start in rest or self.end in after:
            raise CapaProbeError(
                f"The page has not one line {self.start} and one line {self.end} behind it; put them where the part "
                "belongs."
            )
        return f"{before}{self.start}\n\n{part}\n{self.end}{after}"

    def put(self, page: Path, part: str) -> None:
        """Write it into a page.

        Raises:
            CapaProbeError: as :meth:`written`.
            OSError: the page cannot be read or written.
        """
        text = self.written(page.read_text(encoding="utf-8"), part)
        replace(page, lambda file: file.write_text(text, encoding="utf-8"))
