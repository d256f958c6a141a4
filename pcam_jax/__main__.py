"""Lists the verbs and runs one: ``pcam-jax <verb>`` is ``python -m pcam_jax.<verb>``."""

from __future__ import annotations

import difflib
import importlib
import sys

from pcam_jax.runtime.command import run_command
from pcam_jax.runtime.errors import UserError

VERBS = {
    "download": "fetch PatchCamelyon, or a Kaggle set with your token, resumable and checked",
    "prepare": "read a zip, folder or archive of images into a store",
    "audit": "what a store holds, and what is wrong with it: duplicates, leaks, blank images",
    "find_lr": "try rising learning rates and suggest one",
    "train": "train a network on a store and write a run",
    "tune": "search over settings of a recipe",
    "evaluate": "figures of runs with intervals, and a report of each",
    "explain": "heat maps of what a network looked at, worst mistakes first",
    "compare": "several runs side by side, tested in pairs",
    "predict": "probabilities for a split, a folder or an image, as a submission file",
    "export": "one folder that answers without the run: StableHLO, ONNX or safetensors",
    "serve": "answer over HTTP, with a page for people",
}


def dispatch(argv: list[str]) -> None:
    """Run the verb named first.

    Raises:
        UserError: there is no such verb.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print("Usage: pcam-jax VERB ...    (the same as python -m pcam_jax.VERB ...)\n")
        print("\n".join(f"  {verb:{width}}  {purpose}" for verb, purpose in VERBS.items()))
        print("\npcam-jax VERB --help tells more about each.")
        return
    verb = argv[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(VERBS)}."
        raise UserError(f"There is no verb {verb!r}: {hint}")
    importlib.import_module(f"pcam_jax.{verb}").main(argv[1:])


def main() -> None:
    """Entry point of the console script."""
    run_command(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
