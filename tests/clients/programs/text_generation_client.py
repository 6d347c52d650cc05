from asked import NUM_TOKENS, PROMPT, TURNS, URL, caught, tell
from text_generation import Client
from text_generation.types import Grammar, GrammarType

client = Client(URL)  # it can't name a task: the base model answers


def ask(text, **more):
    return client.generate(text, max_new_tokens=NUM_TOKENS, **more)


text, said = "", []
for turn in TURNS:
    said.append(ask(text + turn).generated_text)
    text += turn + said[-1]
pieces = client.generate_stream(PROMPT, max_new_tokens=NUM_TOKENS)
tell(
    generate=ask(PROMPT, decoder_input_details=True, top_n_tokens=2).generated_text,
    stream="".join(piece.token.text for piece in pieces if not piece.token.special),
    error=caught(lambda: ask("a " * 5000), Exception),
    turns=said,
    regex=ask(PROMPT, grammar=Grammar(type=GrammarType.Regex, value="[0-9]{3}")).generated_text,
)
