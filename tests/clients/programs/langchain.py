from asked import MODEL, NUM_TOKENS, PROMPT, TURNS, URL, caught, tell
from langchain_huggingface import HuggingFaceEndpoint

asked = {"endpoint_url": URL, "task": "text-generation", "max_new_tokens": NUM_TOKENS}
usual = {"do_sample": False, "model_kwargs": {"adapter_id": MODEL}}
client = HuggingFaceEndpoint(**asked, **usual)  # which sends top_k, top_p, typical_p and more of its own
lost = HuggingFaceEndpoint(**asked, model_kwargs={"adapter_id": "nothing"})

text, said = "", []
for turn in TURNS:
    said.append(client.invoke(text + turn))
    text += turn + said[-1]
tell(
    generate=client.invoke(PROMPT),
    stream="".join(client.stream(PROMPT)),
    error=caught(lambda: lost.invoke(PROMPT), Exception),
    turns=said,
    sampled=HuggingFaceEndpoint(**asked, do_sample=True, seed=3, temperature=0.8, typical_p=0.95).invoke(
        PROMPT
    ),
)
