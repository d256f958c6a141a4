"""Audit: ``python -m pcam_jax.audit STORE``: what a store holds, and what is wrong with it, as text and as a page.

A run may stand in the place of a store: then its own split and data are audited.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from pcam_jax.config.files import load_config
from pcam_jax.config.schema import Config
from pcam_jax.data.audit import StoreAudit, audit_store
from pcam_jax.data.leaks import write_leaks
from pcam_jax.data.named import SAMPLE, open_named_store
from pcam_jax.data.slides import slides_by_hash, slides_of, write_store_with_slides
from pcam_jax.data.split import assign_splits
from pcam_jax.data.store import Store
from pcam_jax.runtime.command import run_command
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import atomic_write, write_text_atomic
from pcam_jax.runtime.signals import StopSignals

SHEET_ROWS = 8


@dataclasses.dataclass(frozen=True)
class AuditCommand:
    """Look at every image of a store once, and say what it holds and what is wrong with it."""

    store: tyro.conf.Positional[str]
    """Store, run folder, or "sample"."""
    config: Path | None = None
    """A training config: its split is audited, and its augmentation shown on a contact sheet."""
    against: tuple[str, ...] = ()
    """Sets whose held-out images must not be in this store: stores, raw data (Kaggle's zip, PatchCamelyon's h5
    files), or CSVs of pixel hashes (sample_submission.csv). What is found is listed in <page>.leaks.csv."""
    meta: str = ""
    """Where slides are named: a PatchCamelyon *_meta.csv beside its h5 file, their folder, or a store of them."""
    with_slides: Path | None = None
    """With --meta: write a store of the same images that names their slides, so that splits can keep them apart."""
    output: Path | None = None
    """The page; by default <store>.audit.html beside the store."""


def main(argv: list[str]) -> None:
    """Parse the command line, audit, print and write the page."""
    command = tyro.cli(AuditCommand, args=argv, prog="python -m pcam_jax.audit")
    if command.with_slides and not command.meta:
        raise UserError("--with-slides needs --meta, which says where slides are named.")
    if command.with_slides and command.with_slides.exists():
        raise UserError(f"{command.with_slides} exists already: choose another folder for --with-slides.")
    output = command.output or _default_output(command.store)
    if not output.absolute().parent.is_dir():
        raise UserError(f"There is no folder {output.parent} for the page: make it, or choose with --output.")
    store, splits, rule, config = _what_to_audit(command)
    with StopSignals() as stop:
        if command.meta:
            store = _named_slides(store, command)
            if command.with_slides:
                splits, rule = _splits(store, config)
        audit = audit_store(store, splits, rule, command.against, stop)

    from pcam_jax.report.audit_page import audit_page
    from pcam_jax.report.audit_text import audit_text

    print(audit_text(audit))
    sheet = _contact_sheet(audit, config) if command.config else None
    side = 32 if store.image_shape[:2] == (96, 96) else None
    write_text_atomic(output, audit_page(audit, side, sheet))
    if sheet is not None:
        picture = output.with_suffix(".augment.png")
        with atomic_write(picture, "wb") as file:
            file.write(sheet)
        print(f"\nWrote {picture}.")
    if any(leak.images for leak in audit.leaks):
        table = output.with_suffix(".leaks.csv")
        with atomic_write(table) as file:
            write_leaks(file, audit.leaks)
        print(f"\nWrote {table}.")
    print(f"\nWrote {output}.")


def _what_to_audit(command: AuditCommand) -> tuple[Store, np.ndarray, str, Config]:
    """The store, its splits, where they come from in words, and the configuration that made them."""
    path = Path(command.store)
    config = load_config(command.config) if command.config else Config()
    if command.store != SAMPLE and (path / "split.csv").is_file():
        from pcam_jax.run.folder import open_run

        run = open_run(path)
        store = open_named_store(run.environment["data"]["store"])
        table = run.split().set_index("id")["split"]
        splits = table.reindex(store.ids).fillna("").to_numpy(dtype=str)
        return store, splits, f"as the run {path} was trained", config if command.config else run.config
    store = open_named_store(command.store)
    splits, rule = _splits(store, config)
    return store, splits, rule, config


def _splits(store: Store, config: Config) -> tuple[np.ndarray, str]:
    """The splits that training would use, or those of the raw data where it could not train."""
    try:
        return assign_splits(store.index, config.data), "as training would make them"
    except UserError as error:
        return store.splits, f"as the raw data gives them (training could not: {error})"


def _named_slides(store: Store, command: AuditCommand) -> Store:
    """Say how many images get a slide; the store that names them, where one is asked for."""
    slides = slides_of(store, slides_by_hash(command.meta))
    known = slides != ""
    print(
        f"{command.meta} names the slide of {int(known.sum()):,} of {len(store):,} images, "
        f"{len(set(slides[known].tolist())):,} slides."
    )
    if command.with_slides is None:
        print("--with-slides FOLDER writes a store of the same images that names them.\n")
        return store
    named = write_store_with_slides(store, slides, command.with_slides)
    print(f"Wrote {command.with_slides}, the same images with their slides.\n")
    return named


def _contact_sheet(audit: StoreAudit, config: Config) -> bytes:
    """PNG of what the configured augmentation does to a few training images, both classes in turn."""
    import io

    import jax

    from pcam_jax.report.contact_sheet import augmentation_sheet

    store = audit.store
    rng = np.random.default_rng(config.train.seed)
    labels = np.where(audit.splits == "train", store.labels, -1)
    by_class = [rng.permutation(np.flatnonzero(labels == label)) for label in range(len(store.class_names))]
    in_turn = [members[row] for row in range(SHEET_ROWS) for members in by_class if row < len(members)]
    positions = np.array(in_turn[:SHEET_ROWS], np.int64)
    figure = augmentation_sheet(
        store.gather(positions), config.augment, jax.random.key(config.train.seed), store.labels[positions]
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _default_output(store: str) -> Path:
    path = Path(store)
    return Path("sample.audit.html") if store == SAMPLE else path.with_name(f"{path.name}.audit.html")


if __name__ == "__main__":
    run_command(main)
