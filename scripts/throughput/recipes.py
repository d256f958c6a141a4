"""What the recipes of the networks ask for."""

from __future__ import annotations

from pathlib import Path

from pcam_jax import load_config

RECIPES = Path(__file__).parents[2] / "configs/seeds"


def cpu_devices(model: str) -> int:
    """How many devices the network's own recipe lets one CPU count as."""
    recipe = RECIPES / f"{model}.toml"
    return load_config(recipe).train.cpu_devices if recipe.is_file() else 1
