"""Settings of a trial of speed."""

from splitquant_mlx.settings import PositiveInt, settings


@settings
class Workload:
    """How much is generated in one trial.

    Attributes:
        prompt_tokens: length of each random prompt.
        generation_tokens: length of each answer.
        batch_size: prompts answered together.

    Raises:
        RecipeError: when one is below 1.
    """

    prompt_tokens: PositiveInt = 512
    generation_tokens: PositiveInt = 128
    batch_size: PositiveInt = 1
