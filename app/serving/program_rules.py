"""What a request may ask for of its task's program: nothing that would have no effect."""

from collections.abc import Iterator

from app.errors import InvalidRequest
from app.serving.generation_request import GenerationRequest
from app.serving.program_settings import ProgramSettings


def check_program(program: ProgramSettings, request: GenerationRequest) -> None:
    """Raise InvalidRequest for what a request says itself and its program has no use for, unless neutral.

    Raise Forbidden where a step of a chain is for a task that the caller may not use.
    """
    for param, problem in (*_of_reasoning(program, request), *_of_chain(program, request)):
        raise InvalidRequest(problem, param=param)
    if has_chain(program, request) and request.require is not None:
        for task in program.step_tasks:
            request.require(task)


def _of_reasoning(program: ProgramSettings, request: GenerationRequest) -> Iterator[tuple[str, str]]:
    """Yield fields at fault, with what is wrong and what to do."""
    given, reasoning = request.parameters, None if request.only_scores else program.reasoning
    effort, budget = given.get("reasoning_effort", "none"), given.get("thinking_token_budget", -1)
    without = _without(program, request)
    if reasoning is None and effort != "none":
        yield (
            "parameters.reasoning_effort",
            f"reasoning_effort: {without}, so that it has no effect; leave it out, or send none.",
        )
    if reasoning is None and budget >= 0:
        yield (
            "parameters.thinking_token_budget",
            f"thinking_token_budget: {without}, so that it has no effect; leave it out, or send -1.",
        )
    if reasoning is not None and effort != "none" and not reasoning.has_budgets:
        yield (
            "parameters.reasoning_effort",
            "reasoning_effort: the task has no budgets by effort; send thinking_token_budget, or none.",
        )
    if reasoning is None and not has_chain(program, request) and given.get("include_reasoning") is False:
        yield (
            "parameters.include_reasoning",
            f"include_reasoning: {without}, so that it has no effect; leave it out, or send true.",
        )


def _without(program: ProgramSettings, request: GenerationRequest) -> str:
    """Return why nothing is thought before the answer."""
    if request.only_scores:
        return "nothing is generated"
    if program.chain is not None:
        return "the task is a chain, which max_new_tokens bounds"
    return "the task has no reasoning"


def _of_chain(program: ProgramSettings, request: GenerationRequest) -> Iterator[tuple[str, str]]:
    if has_chain(program, request) and request.constraint is not None:
        yield (
            request.constraint.param,
            f"{request.constraint.param}: steps of a chain follow no grammar; leave it out.",
        )


def has_chain(program: ProgramSettings, request: GenerationRequest) -> bool:
    """Return whether the answer comes of a chain."""
    return program.chain is not None and not request.only_scores
