"""Small tokenizers of the kinds that real models have."""

from collections.abc import Callable
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the film was great and the food was cold",
    "Review: what a film! Sentiment: positive",
    "name: Blue Door | food: Thai | area: riverside",
    "1 2 3 4 55 617 don't stop 漢字 é 🙂",
] * 4


def _fast(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _bos_processor(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's and Qwen's kind: no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, eos_token="<eos>", pad_token="<pad>")


def byte_level_bos() -> PreTrainedTokenizerFast:
    """Llama 3's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<turn>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), _bos_processor(tokenizer)])
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>")


def _metaspace_bpe(tokenizer: Tokenizer) -> Tokenizer:
    specials = ["<unk>", "<s>", "</s>", "<turn>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:3], trainer)
    # Byte tokens are ordinary pieces; a trainer knows only specials to put them in.
    state = tokenizer.to_str()
    rebuilt = _without_added_bytes(state)
    rebuilt.post_processor = _bos_processor(rebuilt)
    return rebuilt


def _without_added_bytes(state: str) -> Tokenizer:
    import json

    description = json.loads(state)
    description["added_tokens"] = [
        token for token in description["added_tokens"] if not token["content"].startswith("<0x")
    ]
    description["model"]["byte_fallback"] = True
    description["model"]["unk_token"] = "<unk>"
    return Tokenizer.from_str(json.dumps(description))


def metaspace() -> PreTrainedTokenizerFast:
    """Llama 2's and Mistral's kind in its newer form."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = _metaspace_bpe(tokenizer)
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def legacy_llama() -> PreTrainedTokenizerFast:
    """The same in its older form: the space is put before every stretch of text by the normalizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = _metaspace_bpe(tokenizer)
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: the model itself has the special tokens among its pieces, at the best score of all."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>", "<turn>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, unk_token="<unk>", eos_token="</s>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: white space before a word is the decoder's business."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    specials = ["[UNK]", "[CLS]", "[SEP]", AddedToken("[MASK]", lstrip=True, special=True)]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return _fast(tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


_MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "byte_level_bos": byte_level_bos,
    "metaspace": metaspace,
    "legacy_llama": legacy_llama,
    "unigram": unigram,
    "word_piece": word_piece,
}
ALL = tuple(_MAKERS)


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return _MAKERS[kind]()
