import json
import sys

from asked import MODEL, PROMPT, TURNS, URL, caught, tell
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

TOKENIZER = sys.argv[5]
PAIRS = json.loads(sys.argv[6])  # contexts and continuations
LIMITS = {"until": ["\n"], "max_gen_toks": 8}


def harness(model):
    return LocalCompletionsAPI(
        base_url=f"{URL}/v1/completions",
        model=model,
        tokenizer=TOKENIZER,
        tokenizer_backend="huggingface",
        max_length=256,
        max_retries=1,
        batch_size=2,
        num_concurrent=2,
    )


def asked(kind, *arguments):
    return [Instance(kind, {}, tuple(each), index) for index, each in enumerate(arguments)]


chats = LocalChatCompletion(
    base_url=f"{URL}/v1/chat/completions",
    model=MODEL,
    max_length=256,
    tokenizer_backend=None,
    eos_string="</s>",
    max_retries=1,
)
messages, said = [], []
for turn in TURNS:
    messages.append({"role": "user", "content": turn})
    answer = chats.model_call([messages], generate=True, gen_kwargs={"max_gen_toks": 8})
    messages.append(answer["choices"][0]["message"])
    said.append(answer["choices"][0]["message"]["content"])

tell(
    generate=harness(MODEL).generate_until(asked("generate_until", (PROMPT, LIMITS))),
    loglikelihoods=harness(MODEL).loglikelihood(asked("loglikelihood", *PAIRS)),
    error=caught(lambda: harness("nothing").loglikelihood(asked("loglikelihood", *PAIRS)), Exception),
    turns=said,
)
