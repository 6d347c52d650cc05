import pytest
import torch
from torch.nn import Parameter
from transformers import get_scheduler

from app.training.optimizers import learning_rate, make_optimizer
from app.training.settings import TrainingSettings


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedules_are_those_of_transformers(schedule: str, warmup: int) -> None:
    settings = TrainingSettings.model_validate(
        {"steps": 30, "learning_rate": 0.3, "warmup_steps": warmup, "schedule": schedule}
    )
    optimizer = torch.optim.SGD([Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=30)
    for step in range(1, 31):
        assert learning_rate(settings, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_a_warm_up_longer_than_the_run_ends_with_it() -> None:
    settings = TrainingSettings(steps=5, learning_rate=1.0, warmup_steps=10, schedule="linear")
    assert [learning_rate(settings, step) for step in range(1, 6)] == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_fused_adamw_does_what_plain_adamw_does() -> None:
    settings = TrainingSettings(weight_decay=0.1)
    ours, theirs = (Parameter(torch.linspace(-1, 1, 60).view(3, 20)) for _ in range(2))
    fused = make_optimizer(settings, [ours])
    plain = torch.optim.AdamW([theirs], lr=0.03, weight_decay=0.1, foreach=False)
    for step in range(20):
        for parameter in (ours, theirs):
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
        fused.param_groups[0]["lr"] = 0.03
        fused.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adafactor_takes_steps_of_the_learning_rate_whatever_the_parameters_are() -> None:
    """Without parameter scaling, large and tiny numbers move alike; the first step has beta2 0."""
    settings = TrainingSettings(optimizer="adafactor", weight_decay=0.0)
    large, tiny = Parameter(torch.full((4, 4), 1000.0)), Parameter(torch.full((4, 4), 1e-3))
    optimizer = make_optimizer(settings, [large, tiny])
    for parameter in (large, tiny):
        parameter.grad = torch.ones(4, 4)
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.step()
    torch.testing.assert_close(large.detach(), torch.full((4, 4), 999.7))
    torch.testing.assert_close(tiny.detach(), torch.full((4, 4), 1e-3 - 0.3))


def test_adafactor_decays_weights_as_the_recipe_says() -> None:
    settings = TrainingSettings(optimizer="adafactor", weight_decay=1e-5)
    parameter = Parameter(torch.full((4, 4), 100.0))
    optimizer = make_optimizer(settings, [parameter])
    parameter.grad = torch.zeros(4, 4)
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 100.0 * (1 - 1e-5 * 0.3)))


def test_adafactor_s_defaults_are_the_recipe_of_prompt_tuning_on_t5() -> None:
    settings = TrainingSettings(optimizer="adafactor").resolved(is_encoder_decoder=True)
    assert (settings.learning_rate, settings.schedule, settings.weight_decay) == (0.3, "constant", 1e-5)
    assert [learning_rate(settings, step) for step in (1, settings.steps or 0)] == [0.3, 0.3]
