// What a model writes before an answer, step by step, and why it ended.

import { h } from "./dom.js";

export const ENDS = {
  eos_token: "ended by itself",
  length: "length reached",
  stop_sequence: "stopped at a stop string",
  no_answer: "ended without an answer",
  loop: "stopped: a step repeated an earlier one",
  max_steps: "stopped: no answer after the last step allowed",
};

const WITHOUT_ANSWER = {
  length: "No answer: the tokens ran out before it.",
  no_answer: "No answer: the model ended before it gave one.",
  loop: "No answer: a step repeated an earlier one, so the chain was stopped.",
  max_steps: "No answer: the chain took as many steps as its task allows.",
};

// What to say of an answer that is empty; `steps` came before it.
export function emptyInWords(finish, steps) {
  return (steps || finish !== "length") && WITHOUT_ANSWER[finish] || "An empty answer.";
}

export function stepList(...items) {
  return h("ol", { class: "steps", "aria-label": "Steps" }, items.map((text) => h("li", {}, text)));
}

// Steps as they come, each of the tokens of which it is made.
export class Steps {
  constructor(tokens) {
    this.tokens = tokens;
    this.list = stepList();
    this.element = h("div", { class: "before" }, h("small", {}, "Steps"), this.list, h("small", {}, "Answer"));
    this.current = null;  // what the next token belongs to
  }

  get count() {
    return this.list.children.length;
  }

  add({ token, step }) {
    const text = this.current ? token.text : token.text.trimStart();  // white space between steps
    if (text || (step && !this.current)) this.tokens.add(token, text || step, this.open());
    if (step !== undefined) this.current = null;
  }

  open() {
    if (!this.current) {
      if (!this.count) this.tokens.element.prepend(this.element);
      this.list.append(this.current = h("li"));
    }
    return this.current;
  }
}
