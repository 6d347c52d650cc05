"""Training of prompts on a frozen base: from a file of examples to a canonical prompt, with its curves."""
