// Generated tokens, shaded by probability. One tab stop for all; arrow keys go from token to token.

import { h, percent, setText } from "./dom.js";

const KEYS = { ArrowRight: 1, ArrowLeft: -1 };

export class Tokens {
  // `facts`: where a token that is pointed at is described.
  constructor(facts) {
    this.facts = facts;
    this.tokens = [];
    this.at = -1;
    this.said = h("div", { class: "said" });
    this.element = h("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Answer; use the arrow keys to see each token's probability" }, this.said);
    this.element.addEventListener("keydown", (event) => {
      const step = KEYS[event.key];
      if (!step || !this.tokens.length) return;
      event.preventDefault();
      this.point(Math.min(Math.max(this.at + step, 0), this.tokens.length - 1));
    });
  }

  add(token, text = token.text, box = this.said) {
    if (!text) return;
    const probability = Math.exp(token.logprob);
    const element = h("span", { class: "token", vars: { doubt: (1 - probability).toFixed(3) } }, text);
    const at = this.tokens.push({ element, token, probability }) - 1;
    element.addEventListener("pointerenter", () => this.point(at));
    box.append(element);
  }

  point(at) {
    this.tokens[this.at]?.element.classList.remove("pointed");
    this.at = at;
    const { element, token, probability } = this.tokens[at];
    element.classList.add("pointed");
    setText(this.facts, `“${token.text}”: ${percent(probability)} (log-probability ${token.logprob.toFixed(3)}), token ${token.id}`);
  }
}
