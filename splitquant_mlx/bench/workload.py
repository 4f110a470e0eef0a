"""Settings of a trial of the speed benchmark."""

from splitquant_mlx.settings import PositiveInt, settings


@settings
class Workload:
    """Settings of one trial.

    Attributes:
        prompt_tokens: length of each random prompt.
        generation_tokens: length of each answer.
        batch_size: number of prompts per batch.

    Raises:
        RecipeError: when a setting is below 1.
    """

    prompt_tokens: PositiveInt = 512
    generation_tokens: PositiveInt = 128
    batch_size: PositiveInt = 1
