"""What the service says, for OpenAPI and for those who read its answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

RESEARCH_USE = "Research use only. Not a medical device."


class Answer(BaseModel):
    """A part of an answer; it has these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class Uncertainty(Answer):
    """How far the probability moves between views of one patch: its symmetries, and the runs of a mean."""

    views: int
    standard_deviation: float
    lowest: float
    highest: float
    agrees: bool | None = Field(
        description="All views lie on one side of the threshold; null beyond two classes."
    )


class HeatMap(Answer):
    """Where the evidence for a class lies (Grad-CAM)."""

    of_class: str = Field(alias="class")
    png: str = Field(
        description="data: address of a grey PNG as large as a patch; 255 where most evidence lies."
    )


class TileMap(Answer):
    """Probabilities of the tiles of a picture larger than a patch."""

    tops: list[int] = Field(description="First pixel row of each row of tiles.")
    lefts: list[int] = Field(description="First pixel column of each column of tiles.")
    tile_height: int
    tile_width: int
    tiles: int
    at_or_above_threshold: int
    mean: float
    probabilities: list[list[float]] = Field(description="By row and column of tiles.")


class Result(Answer):
    """The answer for one picture: either `error` or the rest."""

    name: str
    error: str | None = Field(default=None, description="Why there is no prediction, in a sentence.")
    kind: Literal["patch", "tiled"] | None = None
    width: int | None = None
    height: int | None = None
    probability: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Calibrated probability of class 1; with more classes of the decided one. Of a picture in tiles, "
        "that of its highest tile.",
    )
    probabilities: dict[str, float] | None = Field(default=None, description="Of each class, likewise.")
    class_number: int | None = Field(default=None, alias="class")
    decision: str | None = Field(default=None, description="Name of the class that was decided for.")
    uncertainty: Uncertainty | None = None
    heat_map: HeatMap | None = None
    map: TileMap | None = None
    preview: str | None = Field(default=None, description="data: address of a PNG, where it was asked for.")


class Predictions(Answer):
    """The answer to a request."""

    model: str
    threshold: float
    seconds: float = Field(description="From the last byte of the request to the answer.")
    failed: int = Field(description="Number of results with an error.")
    results: list[Result]
    notice: str = RESEARCH_USE


class Problem(Answer):
    """The answer where there is none: what is wrong and what to do, in a sentence."""

    error: str


class State(Answer):
    """Whether the service lives, or takes requests."""

    status: Literal["ok", "ready", "warming up", "closing"]


class Example(Answer):
    """A synthetic picture to try."""

    name: str
    address: str = Field(description="Relative to the page.")
    label: str = Field(description="Name of its class.")
    width: int
    height: int


class ModelFacts(Answer):
    """What is served."""

    name: str
    version: str
    class_names: list[str]
    image_shape: list[int]
    resizes: bool = Field(
        description="Other sizes are resized as in training; otherwise larger ones are tiled."
    )
    central_side: int | None = Field(description="Side of the square that decides the label, in pixels.")
    threshold: float
    criterion: str
    meaning: str
    temperature: list[float]
    tta: str
    views: int = Field(description="Views of a patch when uncertainty is asked for.")
    heat_maps: bool
    runs: list[dict[str, Any]]
    remarks: list[str]
    cards: list[str] = Field(description="Model cards, Markdown.")
    limits: dict[str, int | float]
    examples: list[Example]
    token_needed: bool
    notice: str = RESEARCH_USE
