"""OpenAI's package with a task that reasons: chats, and responses with steps, formats and streams."""

import sys

import openai
from asked import MODEL, PROMPT, URL, caught, tell
from pydantic import BaseModel

LENGTH = int(sys.argv[5])
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
user = {"role": "user", "content": PROMPT}
usual = {"model": MODEL, "temperature": 0}
chats, responses = usual | {"max_tokens": LENGTH}, usual | {"max_output_tokens": LENGTH}
thinking = {"effort": "low", "summary": "auto"}


class Review(BaseModel):
    liked: bool


def reasoning_of(response):
    (item,) = [item for item in response.output if item.type == "reasoning"]
    return {
        "text": "".join(part.text for part in item.content),
        "steps": [part.text for part in item.summary],
        "tokens": response.usage.output_tokens_details.reasoning_tokens,
    }


chat = client.chat.completions.create(messages=[user], **chats)
message = chat.choices[0].message
chunks = list(client.chat.completions.create(messages=[user], stream=True, **chats))
deltas = [chunk.choices[0].delta for chunk in chunks]
low = client.chat.completions.create(messages=[user, message, user], reasoning_effort="low", **chats)

whole = client.responses.create(input=PROMPT, reasoning=thinking, **responses)
with client.responses.stream(input=PROMPT, reasoning=thinking, **responses) as stream:
    events = list(stream)
sent_back = client.responses.create(
    input=[user, *whole.output, user], reasoning=thinking, instructions="Be brief.", store=False, **responses
)
more = usual | {"max_output_tokens": 3 * LENGTH, "input": PROMPT, "text_format": Review}
with client.responses.stream(**more) as stream:
    streamed = stream.get_final_response()
tell(
    chat=[message.content, message.reasoning, message.reasoning_content],
    deltas=["".join(getattr(each, name, None) or "" for each in deltas) for name in ("content", "reasoning")],
    counts=[chat.usage.completion_tokens, chat.usage.completion_tokens_details.reasoning_tokens],
    low=[low.choices[0].message.content, low.choices[0].message.reasoning],
    response=[whole.output_text, reasoning_of(whole), whole.status],
    events=[event.type for event in events],
    streamed=[events[-1].response.output_text, reasoning_of(events[-1].response)],
    sent_back=sent_back.output_text,
    parsed=[type(each.output_parsed).__name__ for each in (client.responses.parse(**more), streamed)],
    error=caught(lambda: client.responses.create(model="nothing", input=PROMPT), openai.OpenAIError),
)
