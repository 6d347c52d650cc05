"""Text in and out of token ids: templates, chat templates, tokenizing, detokenizing, stop strings."""
