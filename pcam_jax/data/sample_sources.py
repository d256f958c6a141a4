"""Raw sources made up for trying the readers, for tests and for measurements: what a download would hold.

Breast tiles (IDC) and PatchCamelyon h5 files are filled with the scenes of the embedded sample; the skin photographs
are blots on skin. They look like their kind from afar, and say nothing about medicine.
"""

from __future__ import annotations

import csv
import gzip
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pcam_jax.data.sample import sample_patches
from pcam_jax.data.tissue import Dice
from pcam_jax.runtime.errors import UserError, require

_PHOTO_STREAM = 11  # of random numbers
_SKIN = np.array([[225, 172, 150], [236, 196, 170], [198, 140, 110], [150, 100, 78]], np.float32)
_LESION = np.array([[120, 78, 60], [60, 40, 38]], np.float32)  # benign, malignant


def write_idc_tree(
    path: Path, *, patients: int = 6, tiles: int = 20, size: int = 50, edge_share: float = 0.05, seed: int = 0
) -> Path:
    """PNG tiles as in *breast-histopathology-images*: ``<patient>/<class>/<patient>_idx5_x1_y1_class0.png``.

    Args:
        path: the folder to make.
        patients: slides, one a patient.
        tiles: of each patient.
        size: side of a tile, at least 24.
        edge_share: of tiles that are cut by the slide's border.
        seed: of the generator.

    Returns:
        ``path``.

    Raises:
        UserError: ``path`` exists.
    """
    _make(path)
    sample = sample_patches(patients * tiles, seed=seed, image_size=size, slides=patients)
    dice = np.random.default_rng(seed)
    for number, (image, label, group) in enumerate(
        zip(sample.images, sample.labels, sample.groups, strict=True)
    ):
        patient, place = f"{10253 + 7 * group}", number // patients
        folder = path / patient / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        if dice.random() < edge_share:
            image = image[:, : dice.integers(size // 8, size)]
        corner = f"x{size * (place % 10) + 1}_y{size * (place // 10) + 1}"
        Image.fromarray(image).save(folder / f"{patient}_idx5_{corner}_class{label}.png")
    return path


def write_isic_folder(
    path: Path,
    *,
    count: int = 40,
    patients: int = 12,
    malignant_share: float = 0.1,
    width: int = 640,
    test_count: int = 6,
    seed: int = 0,
) -> Path:
    """JPEGs and tables as in *siim-isic-melanoma-classification*: ``jpeg/train/ISIC_0000001.jpg``, ``train.csv``.

    Args:
        path: the folder to make.
        count: labelled photographs.
        patients: they come from.
        malignant_share: of the labelled photographs (at least two are malignant, of different patients).
        width: of the larger photographs in pixels; they vary in size and shape.
        test_count: photographs of further patients, without target.
        seed: of the generator.

    Returns:
        ``path``.

    Raises:
        UserError: ``path`` exists.
    """
    _make(path)
    malignant = max(2, round(malignant_share * count))
    tables: dict[str, list[list[object]]] = {"train": [], "test": []}
    for number in range(count + test_count):
        split = "train" if number < count else "test"
        folder = path / "jpeg" / split
        folder.mkdir(parents=True, exist_ok=True)
        dice = Dice(seed, number, _PHOTO_STREAM, 64)
        # spread over the patients, so that no patient holds all of a class
        label = (
            int(number * malignant // count != (number + 1) * malignant // count) if split == "train" else 0
        )
        if split == "test":
            label = int(dice.chance(0.5))
        person = number % patients if split == "train" else patients + number
        patient = f"IP_{person:07d}"
        across = int(width * (0.6 + 0.4 * dice.one()))
        photo = skin_photograph(dice, bool(label), (int(across * dice.between(0.66, 1.0)), across))
        name = f"ISIC_{1000 + 13 * number:07d}"
        Image.fromarray(photo).save(folder / f"{name}.jpg", quality=90)
        row: list[object] = [
            name,
            patient,
            ("female", "male")[dice.whole(2)],
            25 + 5 * dice.whole(12),
            "torso",
        ]
        if split == "train":
            row += ["melanoma" if label else "nevus", "malignant" if label else "benign", label]
        tables[split].append(row)
    header = ["image_name", "patient_id", "sex", "age_approx", "anatom_site_general_challenge"]
    for split, rows in tables.items():
        extra = ["diagnosis", "benign_malignant", "target"] if split == "train" else []
        with open(path / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header + extra, *rows])
    return path


def skin_photograph(dice: Dice, malignant: bool, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A blot on skin, uint8 [H, W, 3]: malignant ones are darker, larger, ragged and of two colours."""
    height, width = shape
    down, across = np.mgrid[:height, :width].astype(np.float32)
    middle = np.array([dice.between(0.4, 0.6) * height, dice.between(0.4, 0.6) * width], np.float32)
    y, x = (down - middle[0]) / min(shape), (across - middle[1]) / min(shape)
    angle = np.arctan2(y, x)
    ragged = (0.10 if malignant else 0.02) * dice.between(0.8, 1.2)
    outline = dice.between(0.24, 0.32) if malignant else dice.between(0.12, 0.22)
    for waves in (3, 5, 8, 13):
        outline = outline + ragged / waves * 2 * np.sin(waves * angle + dice.between(0, 2 * np.pi))
    inside = np.clip((outline - np.hypot(x, y)) * (12 if malignant else 25) + 0.5, 0, 1)[..., None]
    skin = _SKIN[dice.whole(len(_SKIN))]
    lesion = _LESION[int(malignant)] + dice.between(-15, 25)
    if malignant:
        half = (np.sin(angle + dice.between(0, 2 * np.pi)) > 0.2)[..., None]
        lesion = lesion + half * np.array([50, 30, 40], np.float32)
    light = 1 - 0.25 * (x**2 + y**2)[..., None]
    noise = np.random.default_rng(dice.whole(2**31)).normal(0, 4, (height, width, 1)).astype(np.float32)
    return np.clip((skin * (1 - inside) + lesion * inside) * light + noise, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class PcamH5Counts:
    """Patches of each split, and the slides that each split has of its own."""

    train: int = 60
    valid: int = 20
    test: int = 20
    slides: int = 5


def write_pcam_h5(
    path: Path,
    counts: PcamH5Counts | None = None,
    *,
    size: int = 96,
    compress: bool = False,
    duplicates: int = 0,
    seed: int = 0,
) -> Path:
    """`camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5` and `*_meta.csv`, as PCam's authors publish them.

    Args:
        path: the folder to make.
        counts: patches and slides.
        size: side of a patch, at least 24.
        compress: write .h5.gz, as they are downloaded.
        duplicates: patches of train that repeat its first ones, as the original does.
        seed: of the generator.

    Returns:
        ``path``.

    Raises:
        UserError: ``path`` exists, or h5py is not installed.
    """
    h5py = require("h5py", extra="h5")
    counts = counts or PcamH5Counts()
    _make(path)
    start = first_slide = 0
    for split in ("train", "valid", "test"):
        count = getattr(counts, split)
        patches = sample_patches(
            count, seed=seed, image_size=size, start=start, slides=counts.slides, first_slide=first_slide
        )
        start, first_slide = start + count, first_slide + counts.slides
        order = np.arange(count)
        if split == "train" and duplicates:
            order[-duplicates:] = order[:duplicates]
        stem = path / f"camelyonpatch_level_2_split_{split}"
        for key, values in (("x", patches.images[order]), ("y", patches.labels[order].reshape(-1, 1, 1, 1))):
            target = Path(f"{stem}_{key}.h5")
            with h5py.File(target, "w") as file:
                file.create_dataset(key, data=values.astype(np.uint8))
            if compress:
                with open(target, "rb") as plain, gzip.open(f"{target}.gz", "wb", compresslevel=1) as packed:
                    shutil.copyfileobj(plain, packed)
                target.unlink()
        with open(f"{stem}_meta.csv", "w", newline="", encoding="utf-8") as table:
            rows = csv.writer(table, lineterminator="\n")
            rows.writerow(["", "coord_x", "coord_y", "tumor_patch", "center_tumor_patch", "wsi"])
            for row, place in enumerate(order):
                label = bool(patches.labels[place])
                slide = f"camelyon16_{split}_{patches.groups[place]:03d}"
                rows.writerow([row, 96 * row, 32 * row, label, label, slide])
    return path


def _make(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: choose another folder, or delete it first.")
    path.mkdir(parents=True)
