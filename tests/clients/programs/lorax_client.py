import asyncio

from asked import MODEL, NUM_TOKENS, PROMPT, TURNS, URL, caught, tell
from lorax import AsyncClient, Client

client = Client(URL)
SCHEMA = {"type": "object", "properties": {"liked": {"type": "boolean"}}, "required": ["liked"]}


def ask(text, **more):
    return client.generate(text, adapter_id=MODEL, max_new_tokens=NUM_TOKENS, **more).generated_text


async def ask_async():
    answer = await AsyncClient(URL).generate(PROMPT, adapter_id=MODEL, max_new_tokens=NUM_TOKENS)
    return answer.generated_text


text, said = "", []
for turn in TURNS:
    said.append(ask(text + turn))
    text += turn + said[-1]
pieces = client.generate_stream(PROMPT, adapter_id=MODEL, max_new_tokens=NUM_TOKENS)
tell(
    generate=ask(PROMPT),
    stream="".join(piece.token.text for piece in pieces if not piece.token.special),
    error=caught(lambda: client.generate(PROMPT, adapter_id="nothing"), Exception),
    turns=said,
    asynchronous=asyncio.run(ask_async()),
    schema=client.generate(
        PROMPT, adapter_id=MODEL, max_new_tokens=40, response_format={"type": "json_object", "schema": SCHEMA}
    ).generated_text,
    invalid=caught(lambda: client.generate("a " * 5000, adapter_id=MODEL), Exception),
)
