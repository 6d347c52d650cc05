"""litellm with a task that reasons: it reads `reasoning_content`, and has responses too."""

import sys

import litellm
from asked import MODEL, PROMPT, URL, tell

LENGTH = int(sys.argv[5])
usual = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0}
chats = usual | {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": LENGTH}
chat = litellm.completion(**chats)
chunks = list(litellm.completion(stream=True, **chats))
low = litellm.completion(reasoning_effort="low", allowed_openai_params=["reasoning_effort"], **chats)
response = litellm.responses(input=PROMPT, max_output_tokens=LENGTH, **usual)


def joined(name):
    return "".join(getattr(chunk.choices[0].delta, name, None) or "" for chunk in chunks)


tell(
    chat=[chat.choices[0].message.content, chat.choices[0].message.reasoning_content],
    stream=[joined("content"), joined("reasoning_content")],
    tokens=chat.usage.completion_tokens_details.reasoning_tokens,
    low=[low.choices[0].message.content, low.choices[0].message.reasoning_content],
    response=[response.output_text, "".join(part.text for part in response.output[0].content)],
)
