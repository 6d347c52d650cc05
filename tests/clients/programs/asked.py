"""What every program is asked: where the server is, a model, a prompt, and what a user says turn by turn."""

import json
import sys

URL, MODEL, PROMPT = sys.argv[1:4]
TURNS = json.loads(sys.argv[4])
NUM_TOKENS = 8


def tell(**found: object) -> None:
    """The program's findings, for the test."""
    sys.stdout.write(json.dumps(found) + "\n")


def caught(work, *kinds):
    """The name and the text of the error that the client makes of a failure."""
    try:
        work()
    except kinds as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]
