"""A paper's comparison: its networks, recipe, data, and published numbers.

Scores are those of the papers' tables, by the names of an evaluation and a metric: PSNR in dB, errors in percent of images,
MAE and (root) MSE of counts, mIoU and pixel accuracy in percent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgeon.records.recipe import Rule

Scores = Mapping[str, float]  # "Set5 psnr" -> 36.22


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One network of a comparison.

    `of` is the arm whose difference from this one is asked for (None: this is what the others are measured against).
    `rules` make the network of `network` by surgery. `small_network` takes its place at small scale. `judged_by` are options
    for the judgment; an arm `trained_as` another is that one judged otherwise.
    """

    name: str
    network: str
    of: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    small_network: str | None = None
    small_model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    presets: tuple[str, ...] = ()
    judged_by: Mapping[str, Any] = field(default_factory=dict)
    trained_as: str | None = None
    published: Scores = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms trained alike and judged on the same images: one table, or one setting of a table (a scale, a level of noise).

    `small` are options at small scale that are laid over the recipe's; `small_task` takes the place of the recipe's task there.
    `differences` are gains that the paper prints without the scores.
    """

    table: str
    setting: str
    title: str
    recipe: str
    data: str
    arms: tuple[Arm, ...]
    metrics: Mapping[str, float] = field(default_factory=lambda: {"psnr": 1.0})  # name -> factor on what the task gives
    lower: bool = False
    presets: tuple[str, ...] = ()
    task_options: Mapping[str, Any] = field(default_factory=dict)
    small_task: str | None = None
    small_options: Mapping[str, Any] = field(default_factory=dict)
    small_train: Mapping[str, Any] = field(default_factory=dict)
    differences: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> str:
        """Name of the comparison in rows."""
        return f"{self.table}/{self.setting}"


def two(first: tuple[str, str], second: tuple[str, str], **more: Any) -> tuple[Arm, Arm]:
    """The plain network and ours, (name, network) each; `more` holds (plain, ours) pairs of further fields."""
    plain = {key: pair[0] for key, pair in more.items()}
    ours = {key: pair[1] for key, pair in more.items()}
    return (Arm(name=first[0], network=first[1], **plain), Arm(name=second[0], network=second[1], of=first[0], **ours))
