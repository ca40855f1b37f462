"""What a user would do instead of Lens, on the same data, budget and evaluation.

`fine_tune` (supervised, with full or low-rank updates) and `pretrain` (plain text) train the layers
that Lens trains and leave a `CrownDelta`, which everything that takes one of Lens's takes too;
`few_shot_template` leaves a prompt template. Each tells what it cost.
"""

from polylens.baselines.few_shot import few_shot_template
from polylens.baselines.pretraining import pretrain
from polylens.baselines.settings import (
    BaselineSettings,
    FewShotSettings,
    LowRankSettings,
    PretrainingSettings,
    SupervisedSettings,
)
from polylens.baselines.supervised import fine_tune, read_examples

__all__ = [
    "BaselineSettings",
    "FewShotSettings",
    "LowRankSettings",
    "PretrainingSettings",
    "SupervisedSettings",
    "few_shot_template",
    "fine_tune",
    "pretrain",
    "read_examples",
]
