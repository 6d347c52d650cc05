"""Fields that clients send by default though they aren't supported, and the values that change nothing.

They are the fields of requests to TGI, LoRAX, vLLM, SGLang and the OpenAI API that no body has here. null is
always neutral. Labels are about the request and not about its answer, so any value is accepted.
"""

from collections.abc import Mapping
from typing import Any

from app.errors import InvalidRequest
from app.strict_json import is_one_of

_Values = Mapping[str, tuple[Any, ...]]

_TGI: _Values = {
    "adapter_id": (),
    "best_of": (1,),
    "decoder_input_details": (False,),
    "details": (False,),
    "do_sample": (),
    "grammar": (),
    "max_new_tokens": (),
    "return_full_text": (False,),
    "top_n_tokens": (0,),
    "truncate": (),
    "watermark": (False,),
}
_LORAX: _Values = {
    "adapter_source": (),
    "api_token": (),
    "apply_chat_template": (False,),
    "merged_adapters": (),
    "return_k_alternatives": (0,),
}
_VLLM: _Values = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "ec_transfer_params": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_mm_kwargs": (True,),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),  # of nothing that is truncated
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
_SGLANG: _Values = {
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
}
_OPENAI: _Values = {
    "audio": (),
    "echo": (False,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "web_search_options": (),
}
_TOOLS: _Values = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
_LABELS = {
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "session_id",
    "verbosity",
}

_INSTEAD = {  # supported fields for the same purpose, by preference
    "best_of": ("n",),
    "max_tokens": ("max_new_tokens", "max_output_tokens"),
    "max_completion_tokens": ("max_new_tokens", "max_output_tokens"),
    "max_new_tokens": ("max_output_tokens", "max_completion_tokens", "max_tokens"),
    "return_k_alternatives": ("top_n_tokens",),
    "top_n_tokens": ("top_logprobs", "logprobs"),
    "guided_choice": ("structured_outputs", "choices"),
    "guided_json": ("structured_outputs", "grammar"),
    "guided_regex": ("structured_outputs", "grammar"),
    "structured_outputs": ("grammar",),
    "response_format": ("grammar", "text"),
    "grammar": ("response_format", "text"),
    "truncate_prompt_tokens": ("truncate",),
}

# By route; fields of its own body come first.
_ALL = {**_TGI, **_LORAX, **_VLLM, **_SGLANG, **_OPENAI, **_TOOLS}
OF_GENERATE: _Values = _ALL | {"add_special_tokens": (True,)}
OF_COMPLETIONS: _Values = OF_GENERATE
OF_CHATS: _Values = _ALL | {"add_special_tokens": (False,)}
OF_RESPONSES: _Values = {
    **OF_CHATS,
    "access_programs": (),
    "background_options": (),
    "context_management": (),
    "image": (),
    "max_tool_calls": (),
    "n": (1,),
    "prompt": (),
}


def without_client_defaults(data: Any, defaults: _Values, fields: Mapping[str, Any], where: str = "") -> Any:
    """Return the body without unsupported fields at neutral values; `where` is a prefix for names.

    Raises InvalidRequest that names an unsupported field at another value.
    """
    if not isinstance(data, dict):
        return data
    unsupported = {name for name in data if name not in fields and (name in defaults or name in _LABELS)}
    for name in unsupported - _LABELS:
        if not is_one_of(data[name], (None, *defaults[name])):
            instead = next((other for other in _INSTEAD.get(name, ()) if other in fields), None)
            hint = "" if instead is None else f", or send {instead}"
            raise InvalidRequest(
                f"{where}{name} is not supported; leave it out{hint}.", param=f"{where}{name}"
            )
    return {name: value for name, value in data.items() if name not in unsupported}
