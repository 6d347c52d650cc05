import openai
from asked import MODEL, NUM_TOKENS, PROMPT, TURNS, URL, caught, tell

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
asked = {"model": MODEL, "max_tokens": NUM_TOKENS, "temperature": 0}

messages, said = [], []
for turn in TURNS:
    messages.append({"role": "user", "content": turn})
    reply = client.chat.completions.create(messages=messages, **asked)
    messages.append(reply.choices[0].message)  # as the client made it
    said.append(reply.choices[0].message.content)

tell(
    generate=client.completions.create(prompt=PROMPT, **asked).choices[0].text,
    stream="".join(
        chunk.choices[0].text for chunk in client.completions.create(prompt=PROMPT, stream=True, **asked)
    ),
    error=caught(lambda: client.completions.create(model="nothing", prompt=PROMPT), openai.OpenAIError),
    turns=said,
)
