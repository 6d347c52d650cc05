"""Generation parameters that bodies of several routes have; bounds are `app/serving/parameters.py`'s."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from app.api.schemas.bodies import Body
from app.serving import parameters as bounds

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=bounds.MAX_IDS)]
Stop = Annotated[str, Field(min_length=1, max_length=bounds.MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=bounds.MAX_STOPS)]
Penalty = Annotated[float, Field(ge=-bounds.MAX_PENALTY, le=bounds.MAX_PENALTY)]
Share = Annotated[float, Field(ge=0, le=1)]
OTHER_NAMES = {"min_tokens": "min_new_tokens", "ignore_eos_token": "ignore_eos"}


class SharedParameters(Body):
    """What is not given, or null, comes from the task, then from the base's generation config."""

    top_k: int | None = Field(None, ge=0, le=bounds.MAX_TOP_K, description="0 or -1: off")
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: Share | None = None
    typical_p: float | None = Field(None, gt=0, le=1)
    top_h: Share | None = Field(None, description="0: off")
    epsilon_cutoff: Share | None = None
    eta_cutoff: Share | None = None
    repetition_penalty: float | None = Field(
        None, ge=bounds.MIN_REPETITION_PENALTY, le=bounds.MAX_REPETITION_PENALTY
    )
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    no_repeat_ngram_size: int | None = Field(
        None, ge=0, le=bounds.MAX_NGRAM, description="No sequence of this many ids occurs twice; 0: off"
    )
    bad_words: Stops | None = Field(None, description="Texts that never come")
    suppress_tokens: Ids | None = Field(None, description="Ids that never come")
    begin_suppress_tokens: Ids | None = Field(None, description="Ids that never come first")
    min_new_tokens: int | None = Field(
        None,
        ge=0,
        le=bounds.MAX_NEW_TOKENS,
        description="Neither EOS nor a stop ends the answer before; also called min_tokens",
    )
    ignore_eos: bool | None = Field(None, description="EOS is a token like any other")
    stop_token_ids: Ids | None = Field(None, description="Ids that end the answer, as EOS does")
    include_stop_str_in_output: bool | None = Field(
        None, description="The stop string or id that ends the answer is a part of it"
    )
    skip_special_tokens: bool | None = Field(None, description="Default: true; false writes them out")

    @model_validator(mode="before")
    @classmethod
    def _by_one_name(cls, data: Any) -> Any:
        """Each parameter by our name; a top_k of -1 is vLLM's for 0."""
        if not isinstance(data, dict):
            return data
        for other, name in OTHER_NAMES.items():
            if data.get(other) is not None and data.get(name) is not None:
                raise ValueError(f"{other} and {name} mean the same; send one of them")
        renamed = {name: value for name, value in data.items() if name not in OTHER_NAMES}
        renamed |= {OTHER_NAMES[name]: data[name] for name in OTHER_NAMES if data.get(name) is not None}
        return renamed | {"top_k": 0} if renamed.get("top_k") == -1 else renamed

    def shared(self) -> dict[str, Any]:
        """What was given, by name."""
        return {name: getattr(self, name) for name in SharedParameters.model_fields}
