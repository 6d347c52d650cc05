"""The canonical file of an encoder-decoder's prompt: every place, each with a p of its own."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import PromptRejected
from app.prompt import Prompt, PromptKind, TaskType, TaskVersion, VersionDraft
from app.sites import Embedding, Site
from app.store.manifests import decode_version, encode_version, version_of
from app.store.prompt_file import canonical_prompt, make_prompt, prompt_geometry, read_prompt
from app.store.safetensors_file import RawTensor, parse_safetensors
from tests.store.builders import file_bytes, prefix, raw, seq2seq_prefix, seq2seq_soft, soft

SEQ2SEQ = TaskType.SEQ_2_SEQ_LM
PLACES = (*Embedding, *Site)


@settings(max_examples=40, deadline=None)
@given(lengths=st.dictionaries(st.sampled_from(Site), st.integers(1, 4), min_size=1), shifted=st.booleans())
def test_any_subset_of_sites_each_with_its_own_p(lengths: dict[Site, int], shifted: bool) -> None:
    offset = lengths.get(Site.DECODER_SELF, 0) if shifted else 0
    prompt = seq2seq_prefix(lengths, offset=offset)
    assert prompt == read_prompt(prompt.data) == canonical_prompt(parse_safetensors(prompt.data))
    assert {place: prompt.length(place) for place in PLACES} == {
        place: lengths.get(place, 0) if isinstance(place, Site) else 0 for place in PLACES
    }
    assert (prompt.task_type, prompt.position_offset) == (SEQ2SEQ, offset)
    assert prompt.num_virtual_tokens == max(lengths.values())


def test_embeddings_of_encoder_and_decoder() -> None:
    both = seq2seq_soft(encoder=4, decoder=2)
    assert both == read_prompt(both.data)
    assert (both.length(Embedding.ENCODER), both.length(Embedding.DECODER)) == (4, 2)
    assert (both.position_offset, both.num_virtual_tokens) == (2, 4)
    encoder = seq2seq_soft(encoder=4)
    assert (encoder.length(Embedding.DECODER), encoder.position_offset) == (0, 0)
    # The decoder's rows for an encoder-decoder are another prompt than the same rows for a decoder alone.
    assert seq2seq_soft(decoder=3).digest != soft(p=3).digest


def test_metadata_says_the_offset_of_each_stack() -> None:
    file = parse_safetensors(seq2seq_soft(encoder=4, decoder=2).data)
    assert file.metadata == {
        "format": "promptplex.prompt",
        "format_version": "1",
        "kind": "soft",
        "task_type": "SEQ_2_SEQ_LM",
        "placement": "before_tokens",
        "position_offset.dec": "2",
        "position_offset.enc": "4",
        "rotary_applied": "false",
        "embedding_scale_applied": "false",
        "geometry": '{"hidden_size":16,"num_virtual_tokens":{"dec.embeds":2,"enc.embeds":4}}',
    }
    three = parse_safetensors(seq2seq_prefix(dict.fromkeys(Site, 3), offset=0).data).metadata
    assert (three["position_offset.dec"], three["position_offset.enc"]) == ("0", "0")
    assert json.loads(three["geometry"]) == {
        "layers": {site: {"0": [2, 4, 4], "1": [2, 4, 4]} for site in Site},
        "num_virtual_tokens": dict.fromkeys(Site, 3),
    }


def test_bytes_are_pinned() -> None:
    one = RawTensor("F32", (1, 2), bytes(8))
    prompt = make_prompt(PromptKind.SOFT, {"enc.embeds": one}, task_type=SEQ2SEQ)
    assert prompt.digest == "31bf877f8e80877cbbc67b4cf5fcf86ff83b5093f7b284f2c3b13f66504ae151"


K, V = raw((2, 3, 4)), raw((2, 3, 4), 1)
REFUSED: dict[str, tuple[dict[str, RawTensor], int | None, str]] = {
    "no tensors": ({}, None, "no tensors"),
    "both kinds": ({"enc.embeds": raw((3, 16)), "dec.self.0.k": K, "dec.self.0.v": V}, None, "other tensors"),
    "widths": ({"enc.embeds": raw((3, 16)), "dec.embeds": raw((3, 8))}, None, "[8, 16]"),
    "soft offset": ({"enc.embeds": raw((3, 16))}, 3, "expected: 0; found: 3"),
    "cross offset": ({"dec.cross.0.k": K, "dec.cross.0.v": V}, 3, "expected: 0; found: 3"),
    "self offset": ({"dec.self.0.k": K, "dec.self.0.v": V}, 2, "expected: 0 or 3; found: 2"),
    "half a layer": ({"dec.self.0.k": K, "dec.self.0.v": V, "enc.self.1.k": K}, None, "enc.self.1.v"),
    "p within a site": (
        {"dec.cross.0.k": K, "dec.cross.0.v": V, "dec.cross.1.k": raw((2, 4, 4)), "dec.cross.1.v": V},
        None,
        "[3, 4] at dec.cross",
    ),
    "heads": ({"dec.cross.0.k": K, "dec.cross.0.v": raw((1, 3, 4))}, None, "dec.cross.0.v"),
    "names": ({"enc.cross.0.k": K, "enc.cross.0.v": V}, None, "enc.self.{layer}.k"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_write_refuses(name: str) -> None:
    tensors, offset, reason = REFUSED[name]
    kind = PromptKind.SOFT if "enc.embeds" in tensors else PromptKind.PREFIX
    with pytest.raises(PromptRejected) as caught:
        make_prompt(kind, tensors, task_type=SEQ2SEQ, position_offset=offset)
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("task_type", "CAUSAL_LM", "enc.embeds"),
        ("position_offset.enc", "0", "position_offset.enc"),
        ("position_offset.enc", None, "position_offset.enc"),
        ("position_offset.dec", "4", "position offset is impossible"),
        ("placement", "before_bos", "placement"),
        ("geometry", '{"hidden_size":16,"num_virtual_tokens":4}', "geometry"),
    ],
)
def test_read_verifies_the_metadata(key: str, value: str | None, reason: str) -> None:
    prompt = seq2seq_soft(encoder=4)
    header: dict[str, Any] = json.loads(prompt.data[8 : prompt.data_start])
    header["__metadata__"][key] = value
    if value is None:
        del header["__metadata__"][key]
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(PromptRejected) as caught:
        canonical_prompt(parse_safetensors(file_bytes(text, prompt.data[prompt.data_start :])))
    assert reason in caught.value.message


def stored_version(prompt: Prompt | None) -> TaskVersion:
    """What comes back from the store."""
    version = version_of("t", 1, VersionDraft(prompt=prompt, template="{text}"))
    return decode_version("t", 1, encode_version(version))


@pytest.mark.parametrize(
    "prompt",
    [
        soft(p=5),
        prefix(p=3),
        seq2seq_soft(encoder=4, decoder=2),
        seq2seq_soft(encoder=4),
        seq2seq_prefix({Site.ENCODER_SELF: 1, Site.DECODER_CROSS: 3}),
        seq2seq_prefix(dict.fromkeys(Site, 2), offset=0),
    ],
)
def test_a_version_knows_p_at_each_place(prompt: Prompt) -> None:
    version = stored_version(prompt)
    assert [version.length(place) for place in PLACES] == [prompt.length(place) for place in PLACES]
    assert version.num_virtual_tokens == prompt.num_virtual_tokens
    assert version.geometry == prompt_geometry(prompt)
    if prompt.task_type is TaskType.CAUSAL_LM:
        bare = replace(version, geometry=None)
        assert [bare.length(place) for place in PLACES] == [prompt.length(place) for place in PLACES]


def test_a_text_only_version_has_no_virtual_tokens() -> None:
    assert not any(stored_version(None).length(place) for place in PLACES)
