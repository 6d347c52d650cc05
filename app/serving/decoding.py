"""How an answer is decoded: by beam search, where it is wanted and can give what is asked for.

Beams that a request asks for itself are refused where they can't be had. Those of a task's defaults, or of a
base's generation config, are defaults: they give way to what only single rows can do, such as a stream.
More beams than rows are refused by the engine, whether a request or its task asks for them.
"""

from collections.abc import Iterator
from dataclasses import replace

from app.errors import InvalidRequest
from app.serving.generation_request import GenerationRequest
from app.serving.parameters import GenerationParameters, Layer
from app.serving.program_settings import PLAIN_PROGRAM, ProgramSettings


def resolve(
    base: Layer, task: Layer, request: GenerationRequest, program: ProgramSettings = PLAIN_PROGRAM
) -> GenerationParameters:
    """Return the parameters of a request: its own come before the task's, then the route's, then the base's.

    Sampling and beams are one choice, and so are effort and budget of reasoning: what stands higher counts.
    Ballots are sampled, whatever defaults say.
    Raise InvalidRequest where the request's own beams can't be had.
    """
    layers = (base, request.fallbacks, task, request.parameters)
    parameters = GenerationParameters.of(*layers)
    if _level("reasoning_effort", layers) > _level("thinking_token_budget", layers):
        parameters = replace(parameters, thinking_token_budget=None)
    if request.vote is not None:
        return replace(parameters, do_sample=True, num_beams=1)
    if parameters.num_beams == 1:
        return parameters
    if request.only_scores:
        return replace(parameters, num_beams=1)
    if parameters.do_sample and _level("do_sample", layers) < _level("num_beams", layers):
        parameters = replace(parameters, do_sample=False)
    obstacle = next(_obstacles(parameters, request, program), None)
    if obstacle is None:
        return parameters
    if "num_beams" in request.parameters:
        raise InvalidRequest(
            f"num_beams: beam search {obstacle}, or send num_beams 1.", param="parameters.num_beams"
        )
    return replace(parameters, num_beams=1)


def _level(name: str, layers: tuple[Layer, ...]) -> int:
    """Return the number of the highest layer that sets a parameter."""
    return max((number for number, layer in enumerate(layers) if name in layer), default=-1)


def _obstacles(
    parameters: GenerationParameters, request: GenerationRequest, program: ProgramSettings
) -> Iterator[str]:
    """Yield why these beams can't be had, and what to do instead."""
    beams = parameters.num_beams
    if program.reasoning is not None or program.chain is not None:
        yield "finds whole answers, and this task's have steps before them; leave num_beams out"
    if request.is_stream:
        yield "has no answer before its end, so that nothing can be streamed; leave stream out"
    if parameters.do_sample:
        yield "doesn't draw tokens; leave do_sample or temperature out"
    if request.constraint is not None:
        yield "doesn't follow a grammar; leave the grammar or response_format out"
    if request.best_of is not None:
        yield "doesn't go with best_of, which is about samples; leave best_of out"
    if request.num_samples > beams:
        yield f"with {beams} beams has {beams} answers, not n = {request.num_samples}; send more beams"
