"""Train prompts with Promptplex's own trainer; write what ``promptplex push`` and ``promptplex eval`` take.

    python -m demo.recipes.prompts demo-causal sentiment

The texts come from a split that pretraining never saw, in the template that serves them. A prompt is kept as
an adapter of PEFT's, which then answers the task's examples as the oracle (``oracle.py``), or as the
canonical file (docs/formats.md) where PEFT has no format for it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig, get_peft_model
from tqdm import tqdm

from app.models.packed_model import tensor_of
from app.prompt import Prompt, PromptKind
from app.sites import SIDES, Site
from app.training.base import TrainingBase, load_training_base
from app.training.dev_set import DevSet
from app.training.encoding import encode_examples
from app.training.examples import EncodedExample, Example
from app.training.loop import Trainer
from app.training.prompts import new_prompt
from app.training.run import DevRecord, History, StepRecord
from app.training.settings import Method, TrainingSettings
from demo.recipes import heldout
from demo.recipes.demos import DEMOS, Demo
from demo.recipes.oracle import PROMPT_FILE, answers, load_task
from demo.recipes.splits import Split, distinct
from demo.recipes.tasks import TEMPLATE, THREE_SITES, Kind, Task, TaskRecipe, manifest

NUM_DEV = 64  # whose loss says which of a run's prompts is the best
METHODS: dict[Kind, dict[str, Any]] = {
    "prompt-tuning": {"method": Method.PROMPT},
    "p-tuning": {"method": Method.P_TUNING},
    "prefix-tuning": {"method": Method.PREFIX, "network": "mlp", "sites": (Site.DECODER_SELF,)},
    THREE_SITES: {"method": Method.PREFIX, "network": "mlp"},
}


class Bar:
    """Shows the steps and losses of a run."""

    def __init__(self, recipe: TaskRecipe) -> None:
        self._bar = tqdm(total=recipe.steps, desc=recipe.name, mininterval=5)

    def on_start(self, history: History) -> None:
        """Nothing is taken up."""

    def on_step(self, record: StepRecord) -> None:
        """Move on."""
        self._bar.update()

    def on_dev(self, record: DevRecord) -> None:
        """Show the loss of the dev examples."""
        self._bar.set_postfix(dev_loss=f"{record.loss:.4f}")

    def on_advice(self, line: str) -> None:
        """Print it above the bar."""
        self._bar.write(f"{self._bar.desc}: {line}")


def settings(recipe: TaskRecipe) -> TrainingSettings:
    """The settings of a recipe's run."""
    return TrainingSettings(
        **METHODS[recipe.kind],
        num_virtual_tokens=recipe.num_virtual_tokens,
        init_text=recipe.start or None,
        learning_rate=recipe.learning_rate,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    )


def examples(recipe: TaskRecipe, base: TrainingBase) -> list[EncodedExample]:
    """The training examples, then those of the dev set."""
    number = recipe.num_examples + NUM_DEV
    drawn = distinct(recipe.make, Split.PROMPT, number, recipe.seed)
    pairs = [pair for each in drawn for pair in recipe.trained_on(each)][:number]
    made = [Example(inputs={"text": text}, output=output) for text, output in pairs]
    return encode_examples(made, base, TEMPLATE)


def train(recipe: TaskRecipe, base: TrainingBase) -> Prompt:
    """Train one prompt: that of the lowest dev loss. The base's own weights take no gradient."""
    encoded = examples(recipe, base)
    return (
        Trainer(
            base=base,
            learned=new_prompt(settings(recipe), base),
            settings=settings(recipe),
            train=encoded[:-NUM_DEV],
            dev=DevSet(encoded=encoded[-NUM_DEV:]),
            listener=Bar(recipe),
        )
        .run()
        .prompt
    )


def save(recipe: TaskRecipe, prompt: Prompt, base: TrainingBase, target: Path) -> None:
    """Write an adapter of PEFT's, without a model card; the canonical file of a three-site prefix."""
    if recipe.kind == THREE_SITES:
        (target / PROMPT_FILE).write_bytes(prompt.data)
        return
    model = as_peft(prompt, base)
    # By its name: PEFT would write where it was loaded from on this machine.
    model.peft_config["default"].base_model_name_or_path = recipe.base
    model.save_pretrained(str(target))
    (target / "README.md").unlink(missing_ok=True)


def as_peft(prompt: Prompt, base: TrainingBase) -> PeftModel:
    """The base under the prompt, in PEFT's hands; what PEFT has beyond it and never reads is zero."""
    common: dict[str, Any] = {
        "task_type": prompt.task_type.value,
        "num_virtual_tokens": prompt.num_virtual_tokens,
    }
    is_soft = prompt.kind is PromptKind.SOFT
    config: PromptLearningConfig = PromptTuningConfig(**common) if is_soft else PrefixTuningConfig(**common)
    model = get_peft_model(base.model, config)
    assert isinstance(model, PeftModel)
    weight = cast(torch.nn.Embedding, model.prompt_encoder["default"].embedding).weight
    with torch.no_grad():
        weight.zero_()
        fill_soft(weight, prompt) if is_soft else fill_prefix(weight, prompt, config)
    return model


def fill_soft(weight: torch.Tensor, prompt: Prompt) -> None:
    """PEFT's rows of an encoder-decoder are twice as many; it reads the first half."""
    (name,) = prompt.tensors
    weight[: prompt.num_virtual_tokens] = tensor_of(prompt, name)


def fill_prefix(weight: torch.Tensor, prompt: Prompt, config: PromptLearningConfig) -> None:
    """PEFT has keys and values of each layer; of an encoder-decoder's it reads every other pair (mod 2L)."""
    assert config.num_layers
    assert config.num_transformer_submodules
    sides = weight.view(len(weight), config.num_layers * len(SIDES), -1)
    step = config.num_transformer_submodules * len(SIDES)
    for layer in range(len(prompt.tensors) // len(SIDES)):
        for number, side in enumerate(SIDES, step * layer):
            kept = tensor_of(prompt, Site.DECODER_SELF.tensor(layer, side))
            sides[:, number % sides.shape[1]] = kept.transpose(0, 1).flatten(1)


def build(task: Task, demo: Demo) -> None:
    """Train and write one task. ValueError where an example of its ``task.json`` is not met."""
    target = demo.prompts / task.name
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(task, TaskRecipe):
        base = load_training_base(task.base, dtype="float32")
        save(task, train(task, base), base, target)
    (target / "task.json").write_text(json.dumps(manifest(task), indent=2, ensure_ascii=False) + "\n")
    model, tokenizer = load_task(task, demo.path, demo.prompts)
    given = answers(task, model, tokenizer, [text for text, _ in task.examples])
    for (text, expected), output in zip(task.examples, given, strict=True):
        if output != expected:
            raise ValueError(f"{task.name}: {text!r} gave {output!r}, expected {expected!r}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", choices=DEMOS)
    parser.add_argument("tasks", nargs="*", help="default: all of them")
    arguments = parser.parse_args()
    demo = DEMOS[arguments.demo]
    for task in demo.tasks:
        if not arguments.tasks or task.name in arguments.tasks:
            build(task, demo)
    heldout.write_all(demo.tasks)


if __name__ == "__main__":
    main()
