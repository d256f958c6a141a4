"""`python -m pcam_jax.prepare SOURCE STORE`: raw files to a store; `--verify STORE` checks one."""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import fields
from pathlib import Path

from pcam_jax.data.convert import prepare_part
from pcam_jax.data.integrity import verify_store
from pcam_jax.data.manifest import read_manifest
from pcam_jax.data.raw import READERS, ReaderOptions
from pcam_jax.data.raw.options import EDGES, FITS
from pcam_jax.data.store import Store, open_store
from pcam_jax.runtime.command import python_command, run_command
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.progress import progress
from pcam_jax.runtime.signals import StopSignals

_DESCRIPTION = """Turn raw images into a store, which everything else reads.

SOURCE is a downloaded zip or tar or an unpacked folder, read in place, or "sample" for the embedded synthetic set.
Every image is checked; what is wrong is listed by name in STORE.prepare_report.csv. A stopped or killed run
goes on where it was when the same command is given again. STORE appears complete or not at all."""
_DAMAGES_NAMED = 3


def main(argv: list[str]) -> None:
    """Prepare a store, or verify one.

    Raises:
        UserError: the source, the destination or an option is unusable, or a verified store is damaged.
        Interrupted: SIGINT or SIGTERM came.
    """
    options = _parse(argv)
    if options.verify:
        _verify(Path(options.verify), options.workers)
        return
    begin = time.perf_counter()
    if options.source == "sample":
        store: Store | None = _make_sample(Path(options.store), options.count, options.seed)
    else:
        store = prepare_part(
            options.source,
            options.store,
            part=options.shard[0],
            parts=options.shard[1],
            on_error=options.on_error,
            workers=options.workers,
            reader=options.reader,
            images_per_shard=options.images_per_shard,
            options=_reader_options(options),
            notify=_tell,
        )
    if store is not None:
        _say_what_is_there(store, time.perf_counter() - begin)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pcam_jax.prepare",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="zip, tar, folder, or sample")
    parser.add_argument("store", metavar="STORE", nargs="?", help="folder to make")
    parser.add_argument("--verify", metavar="STORE", help="hash every image of an existing store again")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="stop: look at everything, then fail if anything is wrong; skip: leave out what is wrong",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; by default one per core")
    parser.add_argument(
        "--reader", metavar="NAME", help=f"raw layout instead of looking at SOURCE ({', '.join(READERS)})"
    )
    parser.add_argument(
        "--shard",
        type=_share,
        default=(0, 1),
        metavar="I/N",
        help="make only part I (from 0) of N; the parts may run at once, the last one puts the store together",
    )
    parser.add_argument(
        "--images-per-shard", type=int, metavar="N", help="by default as many as make about 256 MiB"
    )
    parser.add_argument(
        "--count",
        type=int,
        default=4000,
        metavar="N",
        help="sample: labelled images, to which the test split adds an eighth",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="sample: seed of the generator")
    _add_reader_options(parser)
    options = parser.parse_args(argv)
    if options.verify and (options.source or options.store):
        parser.error("--verify takes one store and nothing else")
    if not options.verify and not (options.source and options.store):
        parser.error("give SOURCE and STORE, or --verify STORE")
    return options


def _add_reader_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `ReaderOptions`; a reader refuses those that it does not understand."""
    readers = parser.add_argument_group("what readers understand")
    readers.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="folders, table, isic (by default 500), idc: resize to NxN pixels",
    )
    readers.add_argument(
        "--fit", choices=FITS, default="stretch", help="how --size treats pictures that are not square"
    )
    readers.add_argument(
        "--edges",
        choices=EDGES,
        default="pad",
        help="idc: mirror tiles cut by the slide's border, or skip them",
    )
    readers.add_argument(
        "--classes",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="A,B,...",
        help="folders, table: the classes in the order of their labels, by default sorted",
    )
    readers.add_argument(
        "--group-pattern",
        default="",
        metavar="REGEX",
        help="folders, table: the parenthesis, found in an image's path, is its slide or patient",
    )
    readers.add_argument(
        "--csv", default="", metavar="PATH", help="table: which CSV, where there are several"
    )
    for role, usual in (("id", "id"), ("label", "label"), ("group", "none"), ("split", "none")):
        readers.add_argument(
            f"--{role}-column",
            default="",
            metavar="NAME",
            help=f"table: column of the {role} (by default {usual})",
        )


def _reader_options(options: argparse.Namespace) -> ReaderOptions:
    return ReaderOptions(**{field.name: getattr(options, field.name) for field in fields(ReaderOptions)})


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, for example 0/4")
    return int(match[1]), int(match[2])


def _make_sample(path: Path, count: int, seed: int) -> Store:
    from pcam_jax.data.sample import write_sample_store

    if (path / "manifest.json").exists():
        store = open_store(path)
        made_with = store.manifest.source
        same = made_with.get("reader") == "sample" and made_with.get("seed") == seed
        if same and (store.splits != "test").sum() == count:
            _tell(f"{path} is already this sample: {len(store):,} images.")
            return store
    return write_sample_store(path, count=count, seed=seed)


def _verify(path: Path, workers: int | None) -> None:
    count = read_manifest(path).count
    with StopSignals() as signals, progress(count, "verify", "img") as bar:

        def seen(images: int) -> None:
            signals.check()
            bar.update(images)

        damages = verify_store(path, workers, seen)
    for damage in damages:
        print(damage)
    if damages:
        named = "; ".join(str(damage) for damage in damages[:_DAMAGES_NAMED])
        more = "; ..." if len(damages) > _DAMAGES_NAMED else ""
        raise UserError(
            f"{path} is damaged, {len(damages):,} times ({named}{more}): delete it and prepare it again."
        )
    print(f"{path} is sound: all {count:,} images match their SHA-1.")


def _say_what_is_there(store: Store, seconds: float) -> None:
    for split, counts in store.manifest.counts.items():
        labels = ", ".join(
            f"{count:,} {'without label' if name == 'unknown' else name}" for name, count in counts.items()
        )
        print(f"{split or 'no split'}: {labels}")
    height, width, _ = store.image_shape
    print(f"{store.path}: {len(store):,} images of {width}x{height}, in {seconds:.1f} s.")
    print(f"Next: {python_command()} -m pcam_jax.train --data.store {store.path}")


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
