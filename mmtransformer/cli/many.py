"""Many pictures in one call: taken in their order, told or written down as they come, and gone on with when stopped."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, TypeVar

from mmtransformer.cli.options import progress_bar
from mmtransformer.serialization.printable import counted, printable, program, say
from mmtransformer.serialization.processes import ended_as_by_exit

if TYPE_CHECKING:
    from mmtransformer.data.image_files import ImageFiles
    from mmtransformer.images import ImageError
    from mmtransformer.pipelines.caption_files import ResultFile

T = TypeVar("T")


class ManyImages:
    """The pictures of one call.

    Args:
        name: The command.
        words: The words behind it, for the command that tries bad pictures again.
        named: Those of them that name pictures.
        open_file: Opens what results are written to, of the pictures; None prints them.

    Attributes:
        images: All pictures.
        out: Where results go, if not onto the screen.
        todo: The numbers of those that have none yet.
        bad: Name -> what is wrong, of those that could not be used.

    Raises:
        ValueError: If no picture is named.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        named: Sequence[str],
        open_file: "Callable[[ImageFiles], ResultFile] | None" = None,
    ) -> None:
        from mmtransformer.data.image_files import ImageFiles

        self.images: ImageFiles = ImageFiles(places(named))
        if not len(self.images):
            raise ValueError("the list names no picture")
        self.out = None if open_file is None else open_file(self.images)
        self.todo = [i for i in range(len(self.images)) if self.out is None or not self.out.has(i)]
        self.bad: dict[str, str] = {}
        self._name, self._options = name, [word for word in words if word not in ("--", *named)]
        self._alone = len(self.images) == 1 and [*named] == [self.images.name(0)]

    def each(
        self, results: "Iterable[tuple[int, T | ImageError]]", take: Callable[[int, T], Iterable[str]], batch_size: int
    ) -> None:
        """Takes the results as they come.

        Args:
            results: The number of each picture with what came of it, or with what is wrong with it.
            take: Takes one, and gives the lines to print of it.
            batch_size: Pictures that are computed at once.
        """
        from mmtransformer.images import ImageError

        done = 0

        def so_far() -> str:
            where = f": what is done is in {self.out.where}, and {self.out.way_on}" if self.out else ""
            return f"after {done:,} of {counted(len(self.todo), 'picture')}{where}"

        with progress_bar(len(self.todo), shown=len(self.todo) > batch_size) as bar, told_when_stopped(so_far):
            for i, said in results:
                if isinstance(said, ImageError):
                    kept = "; its earlier caption stays" if self.out and self.out.keep(i) else ""
                    self.bad[self.images.name(i)] = f"{said}{kept}"
                    if not self._alone:  # a lone one is told in `finish`
                        bar.write(printable(f"mmt {self._name}: {said}{kept}"), file=sys.stderr)
                elif lines := [*take(i, said)]:
                    bar.write(printable("\n".join(lines)), file=sys.stdout)
                bar.update()
                done += 1
                if done % batch_size == 0:
                    sys.stdout.flush()

    def finish(self, done: str, what: str) -> int:
        """Lists the bad pictures beside the results, and says in a line what was done, and what does the rest.

        Args:
            done: What was done with a picture: "captioned".
            what: What it has now: "captions".

        Returns:
            The exit code: 1 if some could not be used.

        Raises:
            ValueError: If the one picture that was named could not.
        """
        from mmtransformer.pipelines.caption_files import write_bad

        out, images, bad = self.out, self.images, self.bad
        there = {name: error for name, error in bad.items() if not (out and images.is_gone(name))}
        if out:
            write_bad(out.bad_list, map(images.name, range(len(images))), there)
        if self._alone and bad:
            raise ValueError(*bad.values())
        parts = [f"{counted(len(self.todo) - len(bad), 'picture')} {done}" + (f" in {out.where}" if out else "")]
        if len(images) > len(self.todo):
            already = {*range(len(images))} - {*self.todo}
            codes = {out.kind(i) for i in already} if out and what == "captions" else set[str]()
            said = "".join(f"in {code}, " for code in sorted(codes - {""}))
            how = f"{said}by the options of an earlier call; --overwrite writes them anew"
            if out and out.by_people:
                were, it = ("was", "it") if len(already) == 1 else ("were", "them")
                kept = "is kept as it is" if len(already) == 1 else "are kept as they are"
                given = [word for word in ("prefix", "suffix") if any(x.startswith(f"--{word}") for x in self._options)]
                added = f" (no {' or '.join(given)} was added)" if given else ""
                has = f"{counted(len(already), 'text file')} {were} there already and {kept}{added}"
                parts.append(f"{has}; --overwrite replaces {it}")
            else:
                parts.append(f"{len(already):,} had {what} there already ({how})")
        if out and out.left_out:
            parts.append(f"{out.left_out:,} of them another call had written meanwhile: its {what} stay")
        if out and out.cut:
            parts.append(f"the last line there, without an end, was taken for cut off: {out.cut:.200}")
        own = {os.path.abspath(path) for path in out.files()} if out else set[str]()  # noqa: PTH100 (links stay)
        if others := sum(os.path.abspath(path) not in own for path in images.others):  # noqa: PTH100
            parts.append(f"{counted(others, 'other file')} left alone")
        if images.hidden:
            parts.append(f"{counted(len(images.hidden), 'hidden picture')} left out, such as {images.hidden[0]}")
        if there:
            listed = f": {out.bad_list} names them (`{self._again(out)}` tries them again)" if out else ""
            parts.append(f"{len(there):,} could not be used{listed}")
        if gone := len(bad) - len(there):
            parts.append(f"{counted(gone, 'path')} without a file, in no list")
        if len(images) > 1 or out or bad:
            say("; ".join(parts), file=sys.stderr)
        return 1 if bad else 0

    def _again(self, out: "ResultFile") -> str:
        """The command that tries the bad pictures again, with the options of this call."""
        return f"{program()} {' '.join(map(quote, (self._name, f'@{out.bad_list}', *self._options)))}"


@contextmanager
def told_when_stopped(so_far: Callable[[], str]) -> Iterator[None]:
    """Where Ctrl+C or SIGTERM stops work that can be gone on with, and that is said.

    Args:
        so_far: What is done, in words behind "interrupted".

    Raises:
        KeyboardInterrupt: With these words; SIGTERM ends the process with 143.
    """
    try:
        with ended_as_by_exit():
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(so_far()) from None
    except SystemExit:
        say(f"mmt: terminated {so_far()}", file=sys.stderr)
        raise


def places(words: Sequence[str]) -> Iterator[str]:
    """The pictures and folders that words of a command line name, lists (@list.txt, - for the standard input) read."""
    from mmtransformer.data.image_files import listed

    for word in words:
        if word == "-":
            yield from listed(sys.stdin.buffer.read(), "the standard input")
        elif word.startswith("@") and not Path(word).exists():
            yield from listed(Path(word[1:]).read_bytes(), word[1:])
        elif Path(word).suffix.lower() == ".txt" and Path(word).is_file():
            raise ValueError(f"{word}: not a picture but a text; if it lists pictures, write @{word}")
        else:
            yield word
