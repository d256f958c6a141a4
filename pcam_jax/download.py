"""`python -m pcam_jax.download pcam|kaggle|idc|isic FOLDER`: fetch a data set, resumable and checked."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from pcam_jax.data.raw.container import explain_unreadable_file
from pcam_jax.data.remote import RemoteFile, fetch_all
from pcam_jax.runtime.command import python_command, run_command
from pcam_jax.runtime.errors import UserError, require
from pcam_jax.runtime.signals import StopSignals

_DESCRIPTION = """Fetch a data set into FOLDER.

pcam     PatchCamelyon's own h5 files and tables of slides, 8 GB, from Zenodo; no account needed
kaggle   Kaggle's competition histopathologic-cancer-detection, 7 GB
idc      Kaggle's data set breast-histopathology-images, 3 GB
isic     Kaggle's competition siim-isic-melanoma-classification, over 100 GB: JPEGs, DICOMs and TFRecords in one

A stopped download goes on where it was when the same command is given again (Kaggle's client begins again). The last
three come through Kaggle's client (pip install 'pcam-jax[kaggle]') with a token of your own."""

PCAM_ADDRESS = "https://zenodo.org/records/2546921/files"
_STEM = "camelyonpatch_level_2_split_"
# The authors' page and the mirror give the checksums of valid and test the other way round: either is intact.
_TWO_X = ("d5b63470df7cfa627aeec8b9dc0c066e", "d8c2d60d490dbd479f8199bdfa0cf6ec")
_TWO_Y = ("2b85f58b927af9964a4c15b8f7e8f179", "60a7035772fbdb7f34eb86d4420cf66a")
_TWO_META = ("67589e00a4a37ec317f2d1932c7502ca", "3455fd69135b66734e1008f3af684566")
PCAM_FILES = (
    RemoteFile(f"{_STEM}train_meta.csv", md5=("5a3dd671e465cfd74b5b822125e65b0a",)),
    RemoteFile(f"{_STEM}valid_meta.csv", md5=_TWO_META),
    RemoteFile(f"{_STEM}test_meta.csv", md5=_TWO_META),
    RemoteFile(f"{_STEM}train_y.h5.gz", md5=("35c2d7259d906cfc8143347bb8e05be7",)),
    RemoteFile(f"{_STEM}valid_y.h5.gz", md5=_TWO_Y),
    RemoteFile(f"{_STEM}test_y.h5.gz", md5=_TWO_Y),
    RemoteFile(f"{_STEM}valid_x.h5.gz", md5=_TWO_X),
    RemoteFile(f"{_STEM}test_x.h5.gz", md5=_TWO_X),
    RemoteFile(f"{_STEM}train_x.h5.gz", md5=("1571f514728f59376b705fc836ff4b63",)),
)
KAGGLE_SETS = {
    "kaggle": ("competitions", "histopathologic-cancer-detection", 7e9),
    "idc": ("datasets", "paultimothymooney/breast-histopathology-images", 3.3e9),
    "isic": ("competitions", "siim-isic-melanoma-classification", 116e9),
}


def main(argv: list[str]) -> None:
    """Fetch a data set.

    Raises:
        UserError: no room, no token, or a server that does not give the right file.
        Interrupted: SIGINT or SIGTERM came; the same command goes on.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pcam_jax.download",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", choices=("pcam", *KAGGLE_SETS), help="what to fetch")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to put it")
    parser.add_argument(
        "--mirror", default=PCAM_ADDRESS, metavar="URL", help="pcam: address of a folder with the same files"
    )
    options = parser.parse_args(argv)
    folder: Path = options.folder
    if options.set == "pcam":
        with StopSignals() as signals:
            fetch_all(options.mirror.rstrip("/"), PCAM_FILES, folder, signals.check, _tell)
        source = folder
    else:
        source = fetch_from_kaggle(options.set, folder)
    print(f"Next: {python_command()} -m pcam_jax.prepare {source} STORE")


def fetch_from_kaggle(name: str, folder: Path) -> Path:
    """Fetch a set through Kaggle's client; returns the zip.

    Raises:
        UserError: no client, no token, no room, or the client failed.
    """
    kind, slug, size = KAGGLE_SETS[name]
    target = folder / f"{slug.rpartition('/')[2]}.zip"
    if zipfile.is_zipfile(target):
        _tell(f"{target} is there already.")
        return target
    if not _has_token():
        raise UserError(
            "Kaggle wants to know who downloads: sign in at kaggle.com, open Settings, then API, create a "
            "token, put the kaggle.json it gives you into ~/.kaggle (or set KAGGLE_USERNAME and KAGGLE_KEY), "
            f"accept the rules on the page of {slug}, and give this command again."
        )
    _require_client()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{slug} needs about {size / 1e9:.0f} GB but {folder} has {free / 1e9:.1f} GB free: "
            f"choose a folder on another disk."
        )
    # a process of its own: the client ends the process it runs in where the token is refused
    done = subprocess.run([sys.executable, "-m", "kaggle.cli", kind, "download", slug, "-p", str(folder)])
    if done.returncode:
        raise UserError(
            f"Kaggle's client could not fetch {slug}: see its message above; a 403 means that the rules on the "
            f"set's page are not accepted yet, a 401 that the token is wrong."
        )
    if not zipfile.is_zipfile(target):
        try:
            explain_unreadable_file(target)
            raise UserError(f"Kaggle's client left no zip at {target}: give this command again.")
        finally:
            target.unlink(missing_ok=True)  # the client would go on from its end
    return target


def _require_client() -> None:
    import importlib.util

    # looked for and not imported: importing the client signs in
    if importlib.util.find_spec("kaggle") is None:
        require("kaggle", extra="kaggle")


def _has_token() -> bool:
    if os.environ.get("KAGGLE_API_TOKEN") or (
        os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY")
    ):
        return True
    homes = [os.environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle", "~/.config/kaggle"]
    places = [Path(home).expanduser() for home in homes if home]
    # the last one is what `kaggle auth login` leaves
    names = ("kaggle.json", "access_token", "credentials.json")
    return any((place / name).is_file() for place in places for name in names)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
