"""Rich's console, made safe for texts from files; a module of its own, as it takes time to import."""

from collections.abc import Iterable
from typing import Any

from rich import console as rich_console
from rich.segment import Segment
from rich.text import Text

from normlab.common.terminal import plain


class Console(rich_console.Console):
    """Rich's console, for which [red] in a text is text, and which shows every text as `plain` has it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Leave the error to who ends the process, where Rich would end it here."""
        raise  # Rich calls this while it handles the error

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text as rich has it, which would take off the ends of escape sequences."""
        return super().render_str(plain(text), **options)

    def render(
        self, renderable: rich_console.RenderableType, options: rich_console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the parts of what is shown."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))
