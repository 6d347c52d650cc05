"""Put several questions about one review in one call, and print how probable each answer is.

    python -m examples.decisions

Run it beside `make serve`. The task `ask` has a field for the question; `label_mass` is the probability that
the model says any of the answers at all.
"""

import os

import httpx2

SERVER = os.environ.get("PROMPTPLEX_SERVER", "http://localhost:8000")
REVIEW = "The waiter was rude."
QUESTIONS = {
    "Is this review positive or negative?": ("positive", "negative"),
    "Which aspect does the review talk about?": ("food", "service", "price"),
}


def main() -> None:
    """Print a line for each question."""
    questions = [
        {"type": "choice", "instructions": text, "choices": [{"value": value} for value in values]}
        for text, values in QUESTIONS.items()
    ]
    body = {"model": "ask", "input": REVIEW, "questions": questions}
    answer = httpx2.post(f"{SERVER}/v1/decisions", json=body, timeout=60).raise_for_status().json()
    for text, decision in zip(QUESTIONS, answer["answers"], strict=True):
        print(f"{text} {decision['choice']} ({decision['confidence']:.2f}, of {decision['label_mass']:.2f})")


if __name__ == "__main__":
    main()
