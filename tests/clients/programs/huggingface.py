from asked import MODEL, NUM_TOKENS, PROMPT, TURNS, URL, caught, tell
from huggingface_hub import InferenceClient

client = InferenceClient(model=URL)
chats = InferenceClient(base_url=f"{URL}/v1")
SCHEMA = {"type": "object", "properties": {"liked": {"type": "boolean"}}, "required": ["liked"]}


def ask(**more):
    return client.text_generation(PROMPT, adapter_id=MODEL, max_new_tokens=NUM_TOKENS, **more)


messages, said = [], []
for turn in TURNS:
    messages.append({"role": "user", "content": turn})
    reply = chats.chat_completion(messages, model=MODEL, max_tokens=NUM_TOKENS, temperature=0)
    messages.append(dict(reply.choices[0].message))
    said.append(reply.choices[0].message.content)


def formatted(given):
    asked = [{"role": "user", "content": PROMPT}]
    answer = chats.chat_completion(asked, model=MODEL, max_tokens=40, temperature=0, response_format=given)
    return answer.choices[0].message.content


tell(
    generate=ask(),
    stream="".join(ask(stream=True)),
    error=caught(lambda: client.text_generation(PROMPT, adapter_id="nothing"), Exception),
    turns=said,
    schemas=[
        formatted({"type": "json_object", "value": SCHEMA}),
        formatted({"type": "json", "value": SCHEMA}),
        formatted({"type": "json_schema", "json_schema": {"name": "liked", "schema": SCHEMA}}),
    ],
    regex=formatted({"type": "regex", "value": "[0-9]{3}"}),
)
