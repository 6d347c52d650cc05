"""From parameters in text to the engine's rules about tokens, in ids of this base's vocabulary."""

import math
from collections.abc import Iterator
from dataclasses import replace

from app.request import TokenRules
from app.serving.base_defaults import BaseRules
from app.serving.parameters import GenerationParameters
from app.text.tokenization import PromptTokenizer


def token_rules(
    parameters: GenerationParameters,
    base: BaseRules,
    tokenizer: PromptTokenizer,
    *,
    forced_bos_id: int | None,
    eos_ids: frozenset[int],
    stop_ids: frozenset[int],
    num_prompt: int,
    max_new_tokens: int,
) -> TokenRules | None:
    """Return the rules of one request, if it has any.

    `num_prompt` counts the ids that the answer goes on after; `forced_bos_id` is the first, where it is one.
    """
    least = parameters.min_new_tokens
    rules = TokenRules(
        sequence_bias=base.sequence_bias + tuple(_bans(base, eos_ids)),
        bad_words=tuple(ids for word in parameters.bad_words for ids in _spellings(word, tokenizer)),
        encoder_repetition_penalty=base.encoder_repetition_penalty,
        no_repeat_ngram_size=parameters.no_repeat_ngram_size,
        encoder_no_repeat_ngram_size=base.encoder_no_repeat_ngram_size,
        min_new_tokens=max(base.min_length - num_prompt, 0) if least is None else least,
        forced_first=forced_bos_id,
        forced_last=base.forced_eos_token_id,
        length_decay=base.exponential_decay_length_penalty if eos_ids else None,
        suppressed=parameters.suppress_tokens,
        suppressed_first=parameters.begin_suppress_tokens,
    )
    if rules == TokenRules():
        return None
    return replace(rules, stop_ids=tuple(stop_ids), eos_ids=tuple(eos_ids), max_new_tokens=max_new_tokens)


def _bans(base: BaseRules, eos_ids: frozenset[int]) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield bad words that a base names by ids; EOS alone can't be one."""
    for ids in base.bad_words_ids:
        if len(ids) > 1 or ids[0] not in eos_ids:
            yield ids, -math.inf


def _spellings(word: str, tokenizer: PromptTokenizer) -> Iterator[tuple[int, ...]]:
    """Yield the ids of a word at the beginning of a text and after a space, as in vLLM."""
    plain = tokenizer.plain_ids(word.lstrip())
    spaced = tokenizer.plain_ids(" " + word.lstrip())
    if plain:
        yield plain
    if spaced and (not plain or (spaced[0] != plain[0] and len(spaced) == len(plain))):
        yield spaced
