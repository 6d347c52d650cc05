"""From logits to tokens: processors, filters, draws, and the masks of grammars."""
