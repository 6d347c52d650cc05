"""What is learned: modules with the tensors of a canonical prompt, and where they start."""

from app.training.prompts.learned import LearnedPrompt, as_prompt
from app.training.prompts.making import new_prompt

__all__ = ["LearnedPrompt", "as_prompt", "new_prompt"]
