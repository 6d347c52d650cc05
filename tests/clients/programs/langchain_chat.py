"""LangChain's ChatOpenAI, which has steps from responses only: by either API, whole, streamed, sent back."""

import sys

from asked import MODEL, PROMPT, URL, caught, tell
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

LENGTH = int(sys.argv[5])
usual = {"base_url": f"{URL}/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
chats = ChatOpenAI(model=MODEL, max_completion_tokens=LENGTH, **usual)
thinking = {"reasoning": {"effort": "low", "summary": "auto"}, "output_version": "responses/v1"}
responses = ChatOpenAI(model=MODEL, max_completion_tokens=LENGTH, use_responses_api=True, **thinking, **usual)
longer = ChatOpenAI(model=MODEL, max_completion_tokens=3 * LENGTH, use_responses_api=True, **usual)
lost = ChatOpenAI(model="nothing", use_responses_api=True, **usual)
SCHEMA = {
    "title": "review",
    "type": "object",
    "properties": {"liked": {"type": "boolean"}},
    "required": ["liked"],
    "additionalProperties": False,
}


def said(message):
    """The text, the steps, and the tokens that they took."""
    blocks = message.content_blocks
    return [
        "".join(block["text"] for block in blocks if block["type"] == "text"),
        [block["reasoning"] for block in blocks if block["type"] == "reasoning" and "reasoning" in block],
        message.usage_metadata["output_token_details"]["reasoning"],
    ]


def joined(chunks):
    first, *others = chunks
    for chunk in others:
        first += chunk
    return first


chat, whole = chats.invoke(PROMPT), responses.invoke(PROMPT)
human = HumanMessage(PROMPT)
tell(
    chat=[chat.content, chat.usage_metadata["output_token_details"]["reasoning"]],
    chat_stream="".join(chunk.content for chunk in chats.stream(PROMPT)),
    response=said(whole),
    stream=said(joined(responses.stream(PROMPT))),
    sent_back=said(responses.invoke([SystemMessage("Be brief."), human, whole, human])),
    schemas=[
        each.with_structured_output(SCHEMA, method="json_schema").invoke(PROMPT)
        for each in (longer, ChatOpenAI(model=MODEL, max_completion_tokens=3 * LENGTH, **usual))
    ],
    error=caught(lambda: lost.invoke(PROMPT), Exception),
)
