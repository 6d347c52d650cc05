"""The works of encoder-decoders need what they need."""

from benchmarks.encoder_decoder.work import SHAPES, SourceWork


def test_beams_need_rows_and_slots_of_their_own() -> None:
    greedy, beams = (SourceWork(shape=SHAPES["tiny-t5"], num_beams=number) for number in (1, 4))
    assert (greedy.rows, beams.rows) == (32, 128)
    assert beams.slots - greedy.slots == 3 * 32 * greedy.new_tokens
    assert greedy.description != beams.description
