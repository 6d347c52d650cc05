"""From a GenerationRequest to the engine's Request: find the version, check, render, tokenize, bound.

All of it is synchronous and may wait for the store, so it runs on a thread.
"""

import itertools
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from app.caching import SingleFlightCache
from app.engine.client import EngineClient
from app.errors import DeadlineExceeded, InvalidRequest, NotServable, RequestTooLong
from app.prompt import PromptKind, TaskVersion
from app.request import BAN, Request
from app.serving.admitted import Admitted
from app.serving.base_defaults import BaseDefaults
from app.serving.compatibility import Compatibility
from app.serving.decoding import resolve
from app.serving.generation_request import GenerationRequest
from app.serving.model_input import (
    Input,
    ModelInput,
    causal_input,
    check_source,
    encoder_decoder_input,
)
from app.serving.parameters import (
    DEFAULT_MAX_NEW_TOKENS,
    SEED_BITS,
    GenerationParameters,
    Layer,
    parse_parameters,
)
from app.serving.program_rules import check_program
from app.serving.program_settings import PLAIN_PROGRAM, ProgramSettings
from app.serving.renderings import rendering_of
from app.serving.structured_output.grammars import Grammars
from app.serving.token_rules import token_rules
from app.serving.voting import settle_vote
from app.store.prompt_store import PromptStore
from app.store.releases import Meaning
from app.text.chat import last_of_user
from app.text.instructions import Rendering
from app.text.prompt_encoder import PromptEncoder
from app.text.template import PLAIN
from app.text.tokenization import Tokenized, check_no_padding, check_not_empty

_MAX_REMEMBERED = 4096  # versions with template and leading ids at hand


@dataclass(frozen=True, slots=True)
class PreparedVersion:
    """What every request of a version needs, worked out once."""

    rendering: Rendering
    leading_ids: tuple[int, ...]
    defaults: Layer
    program: ProgramSettings = PLAIN_PROGRAM


class RequestBuilder:
    """Builds requests for the engine, and refuses what it could not run. Used from many threads."""

    def __init__(
        self,
        engine: EngineClient,
        store: PromptStore,
        prompts: PromptEncoder,
        *,
        eos_ids: frozenset[int],
        base_name: str,
        timeout: float,
        prefetch: Callable[[str], object],
        grammars: Grammars,
        defaults: BaseDefaults,
        decoder_start_id: int | None = None,
    ) -> None:
        """`decoder_start_id`: what an encoder-decoder's decoder begins with; None: the base is causal."""
        self.prompts = prompts
        self.base_name = base_name
        self.eos_ids = eos_ids
        self.compatibility = Compatibility(store, engine.geometry)
        self._engine = engine
        self._grammars = grammars
        self._defaults = defaults
        self._decoder_start_id = decoder_start_id
        self._store = store
        self._timeout = timeout
        self._prefetch = prefetch
        self._numbers = itertools.count()
        self._remembered: SingleFlightCache[str, PreparedVersion] = SingleFlightCache(_MAX_REMEMBERED)

    def find(self, request: GenerationRequest) -> Meaning | None:
        """Return what the task means now for the user; None: the base. Raise NotFound, InvalidRequest."""
        if request.task is None or request.task == self.base_name:
            return None
        return self._store.meaning(request.task, request.user or request.tenant or request.request_id)

    def admit(self, request: GenerationRequest, meaning: Meaning | None) -> Admitted:
        """Check that all of its versions can be served, and build; their prompts are fetched meanwhile.

        Raise NotServable, InvalidRequest (RequestTooLong), DeadlineExceeded.
        """
        if meaning is None:
            admitted = self.build(request, None)
        else:
            for version in meaning.versions:
                self._check_servable(version)
                self._fetch_ahead(version)
            admitted = self.build(_spread(request, meaning.paraphrase), meaning.version)
            if meaning.members:
                admitted = replace(admitted, members=meaning.members)
        if admitted.request.deadline is not None and admitted.request.deadline <= time.monotonic():
            raise DeadlineExceeded("The deadline passed before the request could start.")
        return admitted

    def _fetch_ahead(self, version: TaskVersion) -> None:
        """Begin to load a prompt that isn't on the device while the text is rendered and tokenized."""
        digest = version.prompt_digest
        if digest is not None and digest not in self._engine.stats().resident_digests:
            self._prefetch(digest)

    def _check_servable(self, version: TaskVersion) -> None:
        reason = self.compatibility.why_not(version)
        if reason is not None:
            raise NotServable(
                f"Task {version.task_id} version {version.version} can't be served by {self.base_name}: "
                f"{reason}"
            )

    def build(self, request: GenerationRequest, version: TaskVersion | None) -> Admitted:
        """Render, tokenize and bound a request of any version, released or not.

        Raise InvalidRequest (RequestTooLong).
        """
        begin = time.monotonic()
        prepared = self.prepared(version)
        if request.chain is None:
            request = settle_vote(request, prepared.program)
            check_program(prepared.program, request)
        parameters = resolve(self._defaults.parameters, prepared.defaults, request, prepared.program)
        prepared = self._read(version, request, prepared, parameters.paraphrase)
        tokenized = self._encode(request, prepared.rendering, parameters.truncate)
        check_not_empty(tokenized)
        built = self._request(version, prepared, request, parameters, tokenized)
        self._engine.check_admissible(built)
        if request.constraint is not None:  # last, since it costs most
            built = replace(built, grammar=self._grammar(request, parameters, prepared.program))
        return Admitted(
            request=built,
            version=version,
            prompt_text=tokenized.text,
            parameters=parameters,
            begin=begin,
            asked=request,
            program=prepared.program,
        )

    def deadline(self, request: GenerationRequest) -> float:
        """Return when a request that comes now ends at the latest, in time.monotonic() seconds."""
        latest = time.monotonic() + self._timeout
        return latest if request.deadline is None else min(request.deadline, latest)

    def label_ids(self, text: str, *, with_eos: bool) -> tuple[int, ...]:
        """Return the ids of a text alone, with one that ends an answer after them if the base has any."""
        return self.prompts.answer_ids(text, self.prompts.end_id(self.eos_ids) if with_eos else None)

    def _encode(self, request: GenerationRequest, rendering: Rendering, truncate: int | None) -> Tokenized:
        template = rendering.template
        if request.token_ids is not None:
            if rendering.fed:
                raise InvalidRequest(
                    "Token ids have no steps put into them; send text, which the task's chain renders.",
                    param="inputs",
                )
            return self.prompts.encode_ids(request.token_ids)
        if template is not rendering.asked:
            inputs = request.inputs if request.messages is None else last_of_user(request.messages)
            return self.prompts.encode(template, rendering.values(inputs, request.steps), truncate)
        if request.messages is None:
            return self.prompts.encode(template, request.inputs, truncate)
        if template is PLAIN and request.task in (None, self.base_name):
            return self.prompts.encode_chat(request.messages, truncate)
        return self.prompts.encode_task_chat(template, request.messages, truncate)

    def _request(
        self,
        version: TaskVersion | None,
        prepared: PreparedVersion,
        request: GenerationRequest,
        parameters: GenerationParameters,
        tokenized: Tokenized,
    ) -> Request:
        id_ = f"{request.request_id}#{next(self._numbers)}"  # ids that clients choose may repeat
        read = self._model_input(id_, version, prepared, request, parameters, tokenized)
        num_prompt = read.num_prompt
        # How many a step of a chain may have is no wish of the client's.
        wanted = request.parameters.get("max_new_tokens") if request.chain is None else None
        max_new_tokens = self._max_new_tokens(wanted, parameters, read.num_virtual_tokens, num_prompt)
        stop_ids = self._stop_ids(parameters)
        rules = token_rules(
            parameters,
            self._defaults.rules,
            self.prompts.tokenizer,
            forced_bos_id=self._forced_bos_id(parameters),
            eos_ids=self.eos_ids,
            stop_ids=stop_ids,
            num_prompt=num_prompt,
            max_new_tokens=max_new_tokens,
        )
        return Request(
            id=id_,
            **read._asdict(),
            sampling=parameters.sampling(
                secrets.randbits(SEED_BITS), logit_bias=self._bias(request), rules=rules
            ),
            num_top=parameters.top_n_tokens,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            tenant=request.tenant,
            task="" if version is None else version.task_id,
            task_version=0 if version is None else version.version,
            deadline=self.deadline(request),
        )

    def _model_input(
        self,
        id_: str,
        version: TaskVersion | None,
        prepared: PreparedVersion,
        request: GenerationRequest,
        parameters: GenerationParameters,
        tokenized: Tokenized,
    ) -> ModelInput:
        given = Input(
            version=version,
            token_ids=tokenized.ids,
            leading_ids=prepared.leading_ids,
            num_rows=max(request.num_drawn, parameters.num_beams),
            is_scored=parameters.decoder_input_details,
        )
        if self._decoder_start_id is None:
            return causal_input(given)
        forced = self._forced_bos_id(parameters)
        # Labels, and answers that a grammar holds, follow the token that the base forces to be the first.
        is_given = request.classification is not None or request.constraint is not None
        start = (self._decoder_start_id, *([forced] if is_given and forced is not None else []))
        read = encoder_decoder_input(id_, given, start)
        assert read.source is not None
        check_no_padding(read.source.token_ids, self.prompts.tokenizer.pad_id, self.eos_ids)
        truncate = parameters.truncate if request.token_ids is None else None
        check_source(read.source, self._engine.geometry, truncate)
        return read

    def _forced_bos_id(self, parameters: GenerationParameters) -> int | None:
        """Return the id that answers begin with, if any. Raise InvalidRequest: it can't be had."""
        token = parameters.forced_bos_token
        if token is None:
            return self._defaults.rules.forced_bos_token_id
        found = self.prompts.tokenizer.token_id(token)
        if found is None or self._decoder_start_id is None:
            why = (
                "the vocabulary has no token like this" if found is None else "only encoder-decoders have one"
            )
            raise InvalidRequest(
                f"forced_bos_token: {why}; leave it out.", param="parameters.forced_bos_token"
            )
        return found

    def _max_new_tokens(
        self, given: int | None, parameters: GenerationParameters, virtual: int, prompt: int
    ) -> int:
        """Return what is given or, where nothing is, as much of the default as fits."""
        limit = self._engine.geometry.max_positions
        left = limit - virtual - prompt
        wanted = 1 if given is None else given
        if wanted > left:
            total, is_causal = virtual + prompt + wanted, self._decoder_start_id is None
            remedy = "shorten inputs, lower max_new_tokens, or set truncate"
            raise RequestTooLong(
                f"{virtual} virtual + {prompt} prompt + {wanted} new tokens are {total}, "
                f"but the {'base' if is_causal else 'decoder'} has {limit} positions; "
                f"{remedy if is_causal else 'lower max_new_tokens'}.",
                param="inputs" if is_causal and left <= 0 else "parameters.max_new_tokens",
                asked=f"{total} tokens ({virtual} learned, {prompt} of the prompt, {wanted} of the answer)",
            )
        return wanted if given is not None else min(self._usual(parameters, prompt), left)

    def _usual(self, parameters: GenerationParameters, prompt: int) -> int:
        """Return the default number of new tokens; a base's `max_length` counts the prompt's too."""
        longest = self._defaults.rules.max_length
        if parameters.max_new_tokens is None and longest is not None and longest > prompt:
            return longest - prompt
        return parameters.max_new_tokens or DEFAULT_MAX_NEW_TOKENS

    def _bias(self, request: GenerationRequest) -> tuple[tuple[int, float], ...]:
        size = self._engine.geometry.vocab_size
        if any(id_ >= size for id_, _ in request.logit_bias):
            raise InvalidRequest(
                f"logit_bias: token ids must be from 0 to {size - 1}; POST /tokenize shows them.",
                param="logit_bias",
            )
        return request.logit_bias

    def _grammar(
        self, request: GenerationRequest, parameters: GenerationParameters, program: ProgramSettings
    ) -> str:
        """Compile the constraint, so that one that can't be followed is refused before the engine gets it."""
        if parameters.ignore_eos:
            raise InvalidRequest(
                "ignore_eos doesn't go with a grammar, which lets nothing follow its end; leave one of them.",
                param="ignore_eos",
            )
        banned = {id_ for id_, value in request.logit_bias if value <= BAN}
        if self.eos_ids and self.eos_ids <= banned:
            raise InvalidRequest(
                "logit_bias bans every token that ends an answer, so that a constrained one could never end; "
                "leave one of them.",
                param="logit_bias",
            )
        assert request.constraint is not None
        return self._grammars.compile(request.constraint, goes_on=program.reasoning is not None)

    def _stop_ids(self, parameters: GenerationParameters) -> frozenset[int]:
        """Return ids that end the answer. A stop string that is a special token has no text; its id stops."""
        spelled = (self.prompts.tokenizer.special_id(stop) for stop in parameters.stop)
        ids = {id_ for id_ in spelled if id_ is not None} | {*parameters.stop_token_ids}
        return frozenset(ids) if parameters.ignore_eos else self.eos_ids | ids

    def prepared(
        self, version: TaskVersion | None, paraphrase: int | None = None, *, is_fed: bool = True
    ) -> PreparedVersion:
        """Return what all requests of a version need; its chain renders them where they are fed with steps.

        Raise InvalidRequest: this base can't render it.
        """
        key = "" if version is None else version.digest
        if paraphrase is not None or not is_fed:
            key = f"{key} {paraphrase} {is_fed}"
        return self._remembered.get(key, lambda: self._prepare(version, paraphrase, is_fed=is_fed))

    def _paraphrased(
        self, version: TaskVersion | None, request: GenerationRequest, index: int
    ) -> PreparedVersion:
        """Return the version with another template. Raise InvalidRequest where that has no effect."""
        if version is None or request.token_ids is not None:
            what = "the base model has no paraphrases" if version is None else "ids are read as they are"
            raise InvalidRequest(f"paraphrase: {what}; leave it out.", param="parameters.paraphrase")
        return self.prepared(version, index)

    def _read(
        self,
        version: TaskVersion | None,
        request: GenerationRequest,
        prepared: PreparedVersion,
        paraphrase: int | None,
    ) -> PreparedVersion:
        """Return the version as the request has it rendered; labels follow the template of a chain's task."""
        if request.chain is not None:
            chain = self.prepared(request.chain)
            return replace(prepared, rendering=chain.rendering, leading_ids=chain.leading_ids)
        is_own = "paraphrase" in request.parameters
        if paraphrase is not None and (is_own or request.token_ids is None):
            return self._paraphrased(version, request, paraphrase)
        is_fed = prepared.rendering.fed is not None and request.classification is not None
        if is_fed and version is not None and version.template is not None:
            return self.prepared(version, is_fed=False)
        return prepared

    def _prepare(
        self, version: TaskVersion | None, paraphrase: int | None, *, is_fed: bool
    ) -> PreparedVersion:
        """Parse the template and find the leading ids."""
        if version is None:
            return PreparedVersion(Rendering(PLAIN, PLAIN), (), {})
        program = ProgramSettings.of(version.program)
        read = program if is_fed else program.model_copy(update={"chain": None})
        rendering = rendering_of(version, read, paraphrase)
        template = rendering.template
        # Without a learned prompt, a resident BOS would save nothing; an encoder's input is never resident.
        is_causal = self._decoder_start_id is None
        is_useful = is_causal and (version.kind is not PromptKind.TEXT or bool(template.leading))
        self.prompts.check_template(template)
        leading = self.prompts.tokenizer.leading_ids(template) if is_useful else ()
        return PreparedVersion(
            rendering, leading, parse_parameters(version.defaults, where="defaults"), program
        )


def _spread(request: GenerationRequest, paraphrase: int | None) -> GenerationRequest:
    """Return the request with the user's paraphrase, where its alias has one and it names none itself."""
    if paraphrase is None or request.token_ids is not None:
        return request
    return replace(request, parameters={"paraphrase": paraphrase, **request.parameters})
