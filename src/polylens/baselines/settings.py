"""Settings of the baselines; those that Lens has too start from the same values."""

from __future__ import annotations

from pydantic import Field

from polylens.config import CrownSettings, PositiveInt, Settings


class BaselineSettings(CrownSettings):
    """What every baseline that trains can be told."""

    rows: PositiveInt | None = Field(
        200, description="Use at most so many rows of each target language."
    )
    replay_ratio: float = Field(
        0.0,
        ge=0,
        description="Rows of the central language to train on too, as a share of the target rows.",
    )
    tokens: PositiveInt | None = Field(
        None,
        description="Budget: leave rows out so that about so many tokens are seen over all epochs.",
    )


class SupervisedSettings(BaselineSettings):
    """Supervised fine-tuning."""

    max_tokens: PositiveInt = Field(128, description="Longest prompt; longer texts lose their end.")
    max_answer_tokens: PositiveInt = Field(
        128, description="Longest answer; longer ones lose their end."
    )


class LowRankSettings(SupervisedSettings):
    """Supervised fine-tuning with low-rank updates (LoRA)."""

    learning_rate: float = Field(1e-3, gt=0, description="AdamW's peak learning rate.")
    rank: PositiveInt = Field(16, description="Rank of the update of each weight matrix.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / rank.")


class PretrainingSettings(BaselineSettings):
    """Continual pre-training."""

    max_tokens: int = Field(
        512, ge=2, description="Longest piece of a text; a longer text is cut into several."
    )


class FewShotSettings(Settings):
    """Solved examples before each question."""

    shots: PositiveInt = Field(3, description="Solved examples before each question.")
    max_tokens: PositiveInt = Field(
        384, description="Longest prompt of the examples alone, so that questions keep their room."
    )
