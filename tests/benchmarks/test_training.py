from benchmarks.training import result, table
from benchmarks.training_sides import Ours, PeftLoop, TrainingWork


def test_the_sides_train_the_same_prompt() -> None:
    work = TrainingWork(base="demo", task="intent", method="prompt", precision="float32", batch_size=4)
    sides = [Ours(work), PeftLoop(work, our_batches=True), PeftLoop(work, our_batches=False)]
    warm = {side.name: side.train(3) for side in sides}
    turns = {side.name: [side.train(2)] for side in sides}
    found = result(work, warm, turns)
    assert found["losses_apart_at_most"] < 1e-4
    assert {len(each) for each in (warm["promptplex"].losses, warm["PEFT loop"].losses)} == {3}
    assert warm["promptplex"].tokens == warm["PEFT loop, our batches"].tokens
    shown = table([found])
    assert shown.count("\n") == 4
    assert "| demo, prompt, intent, float32 | PEFT loop |" in shown
