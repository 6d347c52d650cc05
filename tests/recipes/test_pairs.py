"""The encoder-decoders' corpus as batches, and the three-site prefix against transformers' own BART."""

import pytest
import torch

from app.sites import SIDES, Site
from demo.recipes import three_sites
from demo.recipes.batches import SHORT_ANSWER, Corpus, Encoded, collate, encode, losses
from demo.recipes.pairs import GAP, LEADING_SHARE, pairs
from demo.recipes.rows import OUTPUT_WEIGHT, PLAIN_WEIGHT
from demo.recipes.tokenizer import append_eos, train_tokenizer
from tests.recipes.test_training import shrunk

PAIRS = list(pairs(1500, seed=4))


@pytest.fixture(scope="module")
def encoded():
    texts = (pair.leading + pair.source + pair.target for pair in PAIRS)
    return list(encode(PAIRS, append_eos(train_tokenizer(texts))))


@pytest.fixture
def bart():
    model = shrunk("seq2seq-bart").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def test_tasks_and_plain_text_have_their_shares():
    plain = [pair for pair in PAIRS if pair.plain]
    led = [pair for pair in PAIRS if pair.leading]
    assert 0.19 < len(plain) / len(PAIRS) < 0.25
    assert abs(len(led) / (len(PAIRS) - len(plain)) - LEADING_SHARE) < 0.04
    assert all(pair.leading.endswith("\n") and not pair.plain for pair in led)


def test_a_gap_is_filled_by_what_is_missing():
    gaps = [pair for pair in PAIRS if GAP in pair.source]
    assert len(gaps) > 50
    assert all(pair.plain and pair.target and pair.target not in GAP for pair in gaps)


def test_only_the_target_and_its_end_are_scored():
    batch = collate([Encoded([5, 6, 0], [7, 8], [9, 0], 1.0), Encoded([5, 0], [], [9, 10, 0], 1.0)])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [5, 0, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["decoder_input_ids"].tolist() == [[7, 8, 1, 9], [1, 9, 10, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 9, 0], [9, 10, 0, -100]]


def test_a_label_weighs_as_much_as_an_answer_of_some_words(encoded):
    for pair, made in zip(PAIRS, encoded, strict=True):
        weight = made.weight * len(made.target)
        if pair.plain:
            assert made.weight == PLAIN_WEIGHT
        else:
            assert weight == pytest.approx(OUTPUT_WEIGHT * max(SHORT_ANSWER, len(made.target)))


def test_a_corpus_gives_back_its_pairs(encoded):
    corpus = Corpus.of(encoded)
    assert len(corpus) == len(encoded)
    for index in (0, 1, len(encoded) - 1):
        again, pair = corpus[index], encoded[index]
        assert (again.source, again.leading, again.target) == (pair.source, pair.leading, pair.target)
        assert again.weight == pytest.approx(pair.weight)


def test_the_parts_of_a_steps_loss_add_up_to_the_whole(encoded, bart, monkeypatch):
    with torch.no_grad():
        parts = sum(losses(bart, encoded[:12])).item()
        monkeypatch.setattr("demo.recipes.batches._PARTS", 1)
        (whole,) = losses(bart, encoded[:12])
    assert parts == pytest.approx(whole.item(), rel=0.02)  # bf16


def test_without_a_prefix_the_reference_is_transformers_bart(bart):
    ids, decoder_ids = torch.randint(2, 1000, (2, 9)), torch.randint(2, 1000, (2, 5))
    visible = torch.ones_like(ids)
    visible[0, 6:] = 0
    with torch.no_grad():
        memory = three_sites.encode(bart, ids, visible, {})
        own = three_sites.decode(bart, decoder_ids, memory, visible, {})
        theirs = bart(input_ids=ids, attention_mask=visible, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", ["enc.self", "dec.self", "dec.cross"])
def test_each_site_of_a_prefix_matters(bart, site):
    heads, layers = bart.config.encoder_attention_heads, range(bart.config.encoder_layers)
    width = bart.config.d_model // heads
    prefix = {
        at.tensor(layer, side): torch.randn(heads, 3, width)
        for at in Site
        for layer in layers
        for side in SIDES
    }
    ids = torch.randint(2, 1000, (1, 9))
    seen = torch.ones_like(ids)

    def logits(tensors):
        memory = three_sites.encode(bart, ids, seen, tensors)
        return three_sites.decode(bart, ids[:, :4], memory, seen, tensors)

    with torch.no_grad():
        whole = logits(prefix)
        without = logits({name: tensor for name, tensor in prefix.items() if not name.startswith(site)})
    assert not torch.allclose(whole, without, atol=1e-3)
