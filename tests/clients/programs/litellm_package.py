import litellm
from asked import MODEL, NUM_TOKENS, PROMPT, TURNS, URL, caught, tell

asked = {
    "api_base": f"{URL}/v1",
    "api_key": "none",
    "max_tokens": NUM_TOKENS,
    "temperature": 0,
    "num_retries": 0,
}
ours = {"model": f"openai/{MODEL}", **asked}
text = {"model": f"text-completion-openai/{MODEL}", "prompt": PROMPT, **asked}

messages, said = [], []
for turn in TURNS:
    messages.append({"role": "user", "content": turn})
    reply = litellm.completion(messages=messages, **ours)
    messages.append(reply.choices[0].message)
    said.append(reply.choices[0].message.content)
long = [{"role": "user", "content": "a " * 5000}]
tell(
    generate=litellm.text_completion(**text).choices[0].text,
    stream="".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(stream=True, **text)),
    error=caught(lambda: litellm.completion(messages=long, **ours), litellm.ContextWindowExceededError),
    turns=said,
)
