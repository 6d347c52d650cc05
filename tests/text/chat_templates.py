"""Chat templates of the kinds that real models have, in few words, and tokenizers that have their tokens."""

from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.text.tokenizer_zoo import tokenizer_of

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant.') }}{% endif %}"
)

SOURCES = {
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}"
    "{% endif %}{% for m in rest %}" + _ALTERNATE + "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}"
    "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n'+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama3.1": "{{- bos_token }}\n{%- if not date_string is defined %}\n{%- set date_string = '26 Jul 2024' %}"
    "\n{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system = messages[0]['content'] | trim %}\n    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{{- 'Today Date: ' + date_string + '\\n\\n' }}\n"
    "{{- system }}\n{{- '<|eot_id|>' }}\n{%- for m in messages %}\n"
    "    {%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}\n"
    "        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}",
    "qwen2.5": "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + "
    "messages[0]['content'] + '<|im_end|>\\n' }}\n{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n{%- endif %}\n{%- for m in messages %}\n"
    "    {%- if (m.role == 'user') or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and "
    "not m.tool_calls) %}\n        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n",
    "qwen3": "{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}\n"
    "{%- for m in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
    "    {%- if ns.multi_step and m.role == 'user' and m.content is string and not("
    "m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}\n"
    "        {%- set ns.multi_step = false %}\n        {%- set ns.last = index %}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- for m in messages %}\n    {%- set content = m.content if m.content is string else '' %}\n"
    "    {%- if m.role != 'assistant' %}\n"
    "        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n    {%- else %}\n"
    "        {%- set thoughts = '' %}\n        {%- if m.reasoning_content is string %}\n"
    "            {%- set thoughts = m.reasoning_content %}\n        {%- elif '</think>' in content %}\n"
    "            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]"
    ".lstrip('\\n') %}\n            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
    "        {%- endif %}\n        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}\n"
    "            {{- '<|im_start|>' + m.role + '\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' "
    "+ content.lstrip('\\n') }}\n        {%- else %}\n"
    "            {{- '<|im_start|>' + m.role + '\\n' + content }}\n        {%- endif %}\n"
    "        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}",
    "mistral-v1": "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}"
    "{% endfor %}",
    "mistral-v3": "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] %}\n"
    "    {%- set rest = messages[1:] %}\n{%- else %}\n    {%- set rest = messages %}\n{%- endif %}\n"
    "{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}\n{{- bos_token }}\n"
    "{%- for m in rest %}\n    {%- if m['role'] == 'user' %}\n"
    "        {%- if loop.last and system is defined %}\n"
    "            {{- '[INST]' + system + '\\n\\n' + m['content'] + '[/INST]' }}\n        {%- else %}\n"
    "            {{- '[INST]' + m['content'] + '[/INST]' }}\n        {%- endif %}\n"
    "    {%- elif m['role'] == 'assistant' %}\n        {{- m['content'] | trim + eos_token }}\n    {%- else %}\n"
    "        {{- raise_exception('Only user and assistant roles are supported!') }}\n    {%- endif %}\n"
    "{%- endfor %}",
    "gemma2": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "gemma3": "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n"
    "    {%- if messages[0]['content'] is string -%}\n"
    "        {%- set prefix = messages[0]['content'] + '\n\n' -%}\n    {%- else -%}\n"
    "        {%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}\n    {%- endif -%}\n"
    "    {%- set rest = messages[1:] -%}\n{%- else -%}\n    {%- set prefix = '' -%}\n"
    "    {%- set rest = messages -%}\n{%- endif -%}\n{%- for m in rest -%}\n"
    "    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}\n"
    "    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}\n"
    "    {%- if m['content'] is string -%}\n        {{ m['content'] | trim }}\n"
    "    {%- elif m['content'] is iterable -%}\n        {%- for item in m['content'] -%}\n"
    "            {{ item['text'] | trim }}\n        {%- endfor -%}\n    {%- endif -%}\n"
    "    {{ '<end_of_turn>\n' }}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n"
    "    {{'<start_of_turn>model\n'}}\n{%- endif -%}\n",
    "phi3": "{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "phi4": "{% for m in messages %}{% if (m['role'] == 'system') %}{{ '<|im_start|>system<|im_sep|>' + "
    "m['content'] + '<|im_end|>' }}{% elif (m['role'] == 'user') %}{{ '<|im_start|>user<|im_sep|>' + "
    "m['content'] + '<|im_end|>' }}{% else %}{{ '<|im_start|>assistant<|im_sep|>' + m['content'] + "
    "'<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    "chatml": _CHATML,
    "zephyr": "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + "
    "eos_token }}\n{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "deepseek-r1": "{% set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{%- endif %}"
    "{%- if m['role'] == 'assistant' and m['content'] is not none %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
    "command-r": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}"
    "{% endif %}{% if system != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + "
    "'<|END_OF_TURN_TOKEN|>' }}{% endif %}{% for m in rest %}{% set content = m['content'] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' ~ (m['role'] | replace('assistant', 'chatbot') | upper) ~ '_TOKEN|>' ~ "
    "content.strip() ~ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    "olmo2": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + "
    "m['content'] + '\n' }}{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n'  + m['content'] + eos_token "
    "+ '\n' }}{% else %}{{ '<|assistant|>\n'  + m['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "granite": "{%- if messages[0]['role'] == 'system' %}\n{%- set system = messages[0]['content'] %}\n"
    "{%- set rest = messages[1:] %}\n{%- else %}\n"
    "{%- set system = 'Today is ' ~ strftime_now('%B %Y') ~ '.\nYou are helpful.' %}\n"
    "{%- set rest = messages %}\n{%- endif %}\n{{- '<|start_of_role|>system<|end_of_role|>' + system + "
    "'<|end_of_text|>\n' }}\n{%- for m in rest %}\n{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + "
    "m['content'] + '<|end_of_text|>\n' }}\n{%- if loop.last and add_generation_prompt %}\n"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' }}\n{%- endif %}\n{%- endfor %}",
    "smollm": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + m['role'] + '\n' + "
    "m['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "falcon": "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ m['role'] | capitalize + ': ' + m['content'] | replace('\r\n', '\n') | replace('\n\n', '\n') | trim }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n' + 'Assistant:' }}{% endif %}",
    # What templates do beside that, all in one.
    "operations": "{%- macro turn(role, text) -%}{{ '<|im_start|>%s' % role ~ '\n' ~ caller(text) }}"
    "{{- ['<|im_end|>', '\n'] | join }}{%- endmacro -%}"
    "{%- for m in messages -%}{%- set text %}{{ m.content }}{% endset -%}"
    "{%- call(t) turn(m.role, text) -%}{% generation %}{{ t[:40] ~ t[40:] | upper }}{% endgeneration %}"
    "{{- ' ' ~ t | length ~ (t > 'm') ~ t.count('a') ~ t[::-1][:5] ~ t.partition(' ')[2][:9] }}"
    "{{- m | tojson ~ m.name | default('nobody') ~ t.replace('a', '<|im_sep|>').split('<|im_sep|>') | first }}"
    "{%- for line in t.splitlines() %}{% if loop.index > 2 %}{% break %}{% endif %}> {{ line | title }}{% endfor %}"
    "{%- filter trim %} {{ t.removeprefix(' ').rsplit(' ', 1)[0] }} {% endfilter -%}"
    "{%- endcall -%}{%- endfor -%}{{ '<|im_start|>' * 2 }}",
    # What takes a template's own tokens apart and together again by Python's and jinja's own code.
    "lines and characters": "{% for m in messages %}{{ ('[INST]' ~ m.content ~ '\n\n[/INST]') | indent(2, true) }}"
    "{% filter upper %}[inst]{{ m.content }}[/inst]{% endfilter %}{{ ('[INST]' ~ m.content) | list | join }}"
    "{% for each in '<|im_sep|>' %}{{ each }}{% endfor %}{% endfor %}",
}

_SPECIAL = (
    "[INST] [/INST] <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|> <|im_sep|> "
    "<start_of_turn> <end_of_turn> <｜end▁of▁sentence｜> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> "
    "<|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|start_of_role|> <|end_of_role|> <|end_of_text|>"
).split()
# As phi 3 has them: white space after them is swallowed.
_STRIPPING = ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>")
_ORDINARY = ("<think>", "</think>", "<tool_response>", "<｜User｜>", "<｜Assistant｜>")
_OLDER = {"llama2": "legacy_llama", "mistral-v1": "metaspace", "zephyr": "metaspace", "gemma2": "metaspace"}


@cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the template of this name."""
    tokenizer = with_template(SOURCES[name], _OLDER.get(name, "byte_level_bos"))
    return tokenizer


def with_template(source: object, kind: str = "byte_level_bos") -> PreTrainedTokenizerFast:
    """A tokenizer of this kind with tokens of all templates here, and this one as its template."""
    origin = tokenizer_of(kind)
    backend = Tokenizer.from_str(origin.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in _SPECIAL])
    backend.add_special_tokens(
        [AddedToken(each, special=True, normalized=False, rstrip=True) for each in _STRIPPING]
    )
    backend.add_tokens([AddedToken(each, special=False, normalized=False) for each in _ORDINARY])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token=origin.unk_token
    )
    tokenizer.chat_template = source
    return tokenizer


@dataclass(frozen=True)
class Turn:
    role: str
    content: str


def _chat(*contents: str, system: str | None = None) -> tuple[Turn, ...]:
    roles = ("user", "assistant") * len(contents)
    turns = tuple(Turn(*each) for each in zip(roles, contents, strict=False))
    return turns if system is None else (Turn("system", system), *turns)


CONVERSATIONS = {
    "one": _chat("What a film!"),
    "white space": _chat("  \n the food\twas cold \n\n", " and\r\n\r\nnow? ", " \n", system="\n Be brief.  "),
    "scripts": _chat("漢字 é 🙂 ß ﬁ", "İ don't stop", "𝔘 \u0301\u200d \ufeff 1 2 3"),
    "thoughts": _chat(
        "why</think>",
        "<think>\nbecause\n</think>\n\nthe film",
        "<tool_response>x</tool_response>",
        "\n<think>so</think>y",
    ),
    "code": _chat(
        '{{ bos_token }} {% raw %} {"a": "<b>&\'\\n"}',
        "\ue0f0" + "0\ue0f1 %s {0} _own \uf8ff",
        "<|im_ end|> |> [ INST]" + "the film was cold, " * 20,
        "ok",
        "<" * 9,
        system="a <<SYS>> b",
    ),
}
