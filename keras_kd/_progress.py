"""How far is a long job, and how long will it take? One line that counts samples, silent or sparse where nobody watches."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")
Verbose = Literal["auto"] | int

_IN_PLACE_SECONDS = 0.2
_LOG_SECONDS = 10.0
_SHORT_SECONDS = 1.0


class Progress:
    """Counts what is done, with rate and time left.

    On a terminal and in a notebook it rewrites one line. In a log it prints a line every 10 seconds at most, and a last one.

    Args:
        total: how much there is to do; None if that is not known.
        what: what is counted, in the plural.
        title: word before the count.
        verbose: 0 is silent, 1 prints; `"auto"` prints what takes longer than a second.

    Example:

    >>> from keras_kd._progress import Progress
    >>> with Progress(3, verbose=0) as progress:
    ...     for _ in range(3):
    ...         progress.advance()
    >>> progress.done
    3
    """

    def __init__(self, total: int | None = None, *, what: str = "samples", title: str = "", verbose: Verbose = "auto") -> None:
        self.total = total
        self.what = what
        self.title = title
        self.done = 0
        self._stream: Any = check_verbose(verbose) and sys.stdout
        self._quiet_for = _SHORT_SECONDS if verbose == "auto" else 0.0
        self._in_place = bool(self._stream) and _is_watched(self._stream)
        self._began = self._printed = time.monotonic()
        self._width = 0

    def __enter__(self) -> "Progress":
        self._began = self._printed = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """Adds `count` to what is done."""
        self.done += count
        now = time.monotonic()
        pause = _IN_PLACE_SECONDS if self._in_place else _LOG_SECONDS
        if self._stream and now - self._printed >= pause and now - self._began >= self._quiet_for:
            self._printed = now
            self._print(self._line(now), last=False)

    def over(self, items: Iterable[Item], size: Any = None) -> Iterator[Item]:
        """Yields `items`, and counts each (as `size(item)`, or 1) when the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.advance(1 if size is None else size(item))

    def close(self) -> None:
        """Prints the last line. Nothing is printed for a job that did nothing."""
        now = time.monotonic()
        if self._stream and self.done and now - self._began >= self._quiet_for:
            self._print(self._line(now, last=True), last=True)
        self._stream = None

    def _line(self, now: float, *, last: bool = False) -> str:
        seconds = max(now - self._began, 1e-9)
        rate = self.done / seconds
        share = f"/{self.total:,}" if self.total and not (last and self.done <= self.total) else ""
        rates = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        text = f"{self.title + ': ' if self.title else ''}{self.done:,}{share} {self.what}, {rates}/s"
        if last:
            return f"{text}, {_duration(seconds)}"
        if self.total and self.done:
            text += f", {_duration(max(self.total - self.done, 0) / rate)} left"
        return text

    def _print(self, line: str, *, last: bool) -> None:
        if not self._in_place:
            print(line, file=self._stream, flush=True)
            return
        padding = " " * (self._width - len(line))  # over the rest of a longer line before
        self._width = len(line)
        print(f"\r{line}{padding}", end="\n" if last else "", file=self._stream, flush=True)


def check_verbose(verbose: Any) -> bool:
    """Returns whether to print.

    Raises:
        ValueError: if `verbose` is none of `"auto"`, 0, 1 and 2, which Keras knows.
    """
    if not (verbose == "auto" or (isinstance(verbose, int) and verbose in (0, 1, 2))):
        raise ValueError(f'`verbose` must be 0 (silent), 1 or "auto". Received: verbose={verbose!r}.')
    return verbose != 0


def _is_watched(stream: Any) -> bool:
    """Whether a line can be rewritten: a terminal, or a notebook, whose stream is ipykernel's."""
    return type(stream).__module__.startswith("ipykernel") or bool(getattr(stream, "isatty", lambda: False)())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
