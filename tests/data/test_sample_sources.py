import csv

import numpy as np
import pytest
from PIL import Image

from pcam_jax.data.sample_sources import skin_photograph, write_idc_tree, write_isic_folder
from pcam_jax.data.tissue import Dice
from pcam_jax.runtime.errors import UserError


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


@pytest.mark.parametrize("write", [write_idc_tree, write_isic_folder])
def test_a_seed_gives_the_same_files(write, tmp_path):
    first = contents(write(tmp_path / "a"))
    assert first == contents(write(tmp_path / "b"))
    assert first != contents(write(tmp_path / "c", seed=1))
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "a")


def test_imbalance_and_patients_are_as_asked(tmp_path):
    folder = write_isic_folder(tmp_path / "isic", count=60, patients=20, malignant_share=0.1, width=60)
    rows = list(csv.DictReader((folder / "train.csv").read_text().splitlines()))
    malignant = [row for row in rows if row["target"] == "1"]
    assert len(rows) == 60
    assert len(malignant) == 6
    assert len({row["patient_id"] for row in rows}) == 20
    assert len({row["patient_id"] for row in malignant}) > 1


def test_tiles_have_the_size_asked_for(tmp_path):
    folder = write_idc_tree(tmp_path / "idc", patients=2, tiles=3, size=32, edge_share=0)
    assert {np.asarray(Image.open(path)).shape for path in folder.rglob("*.png")} == {(32, 32, 3)}


def test_malignant_lesions_are_darker_on_average():
    def darkness(label: bool) -> float:
        photos = [skin_photograph(Dice(0, n, 11), label, (40, 50)) for n in range(12)]
        return float(np.mean([np.percentile(photo, 5) for photo in photos]))

    assert darkness(True) < darkness(False) - 10
