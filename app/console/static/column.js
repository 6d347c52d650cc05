// One column of the playground: a task or a version, its answer, its tokens, its timings.

import { call, events, key, taskPath } from "./api.js";
import { taskVars } from "./colours.js";
import { copyButton, h, milliseconds, options, percent, problem, setText, setVars } from "./dom.js";
import { bodyOf, fieldsOf, snippets } from "./snippets.js";

export class Column {
  // `reference`: "" is the base model, else "task" or "task@version". `ask` tells inputs and parameters.
  constructor(tasks, reference, ask, { changed, removed }) {
    this.ask = ask;
    this.changed = changed;
    this.detail = null;
    const [task, version] = reference.split("@");
    this.taskChoice = h("select", { "aria-label": "Task" }, options([["", "base model"], ...tasks.map((each) => [each.id, each.id])], task));
    this.versionChoice = h("select", { "aria-label": "Version" });
    this.remove = h("button", { type: "button", class: "small quiet", "aria-label": "Remove this column", onclick: removed }, "✕");
    this.answer = h("div", { class: "answer" }, h("p", { class: "muted" }, "Nothing yet."));
    this.tokenFacts = h("p", { class: "token-facts", "aria-live": "polite" });
    this.timing = h("p", { class: "timing muted" });
    this.snippetBox = h("div", {});
    this.snippetDetails = h("details", { class: "snippets" }, h("summary", {}, "Use it from code"), this.snippetBox);
    this.element = h("section", { class: "panel column" },
      h("div", { class: "column-head" }, h("i", { class: "dot", "aria-hidden": "true" }), this.taskChoice, this.versionChoice, this.remove),
      this.answer, this.tokenFacts, this.timing, this.snippetDetails);
    this.taskChoice.addEventListener("change", () => this.choose(this.taskChoice.value));
    this.versionChoice.addEventListener("change", () => this.changed());
    this.snippetDetails.addEventListener("toggle", () => this.drawSnippets());
    this.ready = this.choose(this.taskChoice.value, version);
  }

  get task() {
    return this.taskChoice.value;
  }

  get reference() {
    return this.task && this.versionChoice.value ? `${this.task}@${this.versionChoice.value}` : this.task;
  }

  // The version that answers, as far as one can know: `live` may have weights.
  get version() {
    const live = this.detail?.aliases.live;
    const wanted = Number(this.versionChoice.value) || (typeof live === "number" ? live : live?.version ?? Number(Object.keys(live?.weights ?? live ?? {})[0]));
    return this.detail?.versions.find((each) => each.version === wanted) ?? this.detail?.versions.at(-1);
  }

  get fields() {
    return fieldsOf(this.version?.template);
  }

  get examples() {
    return this.version?.examples ?? [];
  }

  mayBeRemoved(may) {
    this.remove.hidden = !may;
  }

  async choose(task, version = "") {
    setVars(this.element, taskVars(task));
    this.element.setAttribute("aria-label", task || "base model");
    this.detail = null;
    this.versionChoice.hidden = !task;
    this.versionChoice.replaceChildren(...options([["", "live"]], ""));
    if (task) {
      this.detail = await call(taskPath(task)).catch(() => null);
      const numbers = (this.detail?.versions ?? []).map((each) => [each.version, `v${each.version}`]).reverse();
      const others = Object.keys(this.detail?.aliases ?? {}).filter((alias) => alias !== "live").map((alias) => [alias, alias]);
      this.versionChoice.replaceChildren(...options([["", "live"], ...others, ...numbers], version));
    }
    this.changed();
  }

  get body() {
    return bodyOf(this.reference, this.ask.inputs(this.fields), this.ask.parameters());
  }

  async run(signal) {
    this.answer.replaceChildren(h("p", { class: "muted" }, "…"));
    setText(this.tokenFacts, "");
    setText(this.timing, "");
    this.drawSnippets();
    try {
      await (this.ask.choosing() ? this.score(signal) : this.stream(signal));
    } catch (error) {
      if (error.name === "AbortError") setText(this.timing, "stopped");
      else if (error.status !== 401) this.answer.replaceChildren(problem(error, "No answer"));
    }
  }

  async stream(signal) {
    const began = performance.now();
    const tokens = new Tokens(this.tokenFacts);
    let [first, last, count] = [null, null, 0];
    for await (const event of events("generate_stream", { method: "POST", body: this.body, signal })) {
      if (first === null) { first = performance.now() - began; this.answer.replaceChildren(tokens.element); }
      tokens.add(event.token);
      count += 1;
      last = event;
    }
    const total = performance.now() - began;
    if (!last?.generated_text) tokens.element.append(h("span", { class: "muted" }, last ? " (an empty answer)" : "The stream ended early."));
    const rate = count > 1 ? ` · ${Math.round((count - 1) / ((total - first) / 1000))} tokens/s` : "";
    const version = last?.details?.task_version ? ` · v${last.details.task_version}` : "";
    setText(this.timing, `first token ${milliseconds(first)} · total ${milliseconds(total)} · ${count} ${count === 1 ? "token" : "tokens"}${rate} · ${ENDS[last?.details?.finish_reason] ?? "?"}${version}`);
  }

  async score(signal) {
    if (this.ask.parameters().choices === true && !this.version?.choices.length) {
      this.answer.replaceChildren(h("p", { class: "muted" }, `${this.task || "The base model"} has no labels of its own; enter some above.`));
      return;
    }
    const began = performance.now();
    const { choice, task_version: version } = await call("generate", { method: "POST", body: this.body, signal });
    const ordered = [...choice.probabilities].sort((one, other) => other.probability - one.probability);
    this.answer.replaceChildren(h("ul", { class: "bars", "aria-label": "Labels and their probabilities" }, ordered.map(({ value, probability }) =>
      h("li", { class: value === choice.value ? "best" : null, vars: { share: probability } }, h("span", { class: "label" }, value), h("span", { class: "bar", "aria-hidden": "true" }, h("i")), h("span", { class: "share" }, percent(probability))))));
    setText(this.timing, `total ${milliseconds(performance.now() - began)} · ${ordered.length} labels scored in one batch${version ? ` · v${version}` : ""}`);
  }

  drawSnippets() {
    if (!this.snippetDetails.open) return;
    const texts = snippets(new URL(".", location.href.split("#")[0]).href, this.body, Boolean(key()), this.ask.baseName());
    const shown = h("pre", { tabindex: "0", role: "region", "aria-label": "Code" });
    let chosen = Object.keys(texts).includes(this.kind) ? this.kind : "curl";
    const buttons = Object.keys(texts).map((kind) => h("button", { type: "button", class: "small", onclick: () => pick(kind) }, kind));
    const pick = (kind) => {
      this.kind = chosen = kind;
      setText(shown, texts[kind]);
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === kind)));
    };
    pick(chosen);
    this.snippetBox.replaceChildren(h("div", { class: "segments", role: "group", "aria-label": "Language" }, buttons, copyButton(() => texts[chosen])), shown);
  }
}

const ENDS = { eos_token: "ended by itself", length: "length reached", stop_sequence: "stopped at a stop string" };

// Tokens as they come. One tab stop for all; arrow keys go from token to token.
class Tokens {
  constructor(facts) {
    this.facts = facts;
    this.tokens = [];
    this.at = -1;
    this.element = h("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Answer; use the arrow keys to see each token's probability" });
    this.element.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !this.tokens.length) return;
      event.preventDefault();
      this.point(Math.min(Math.max(this.at + step, 0), this.tokens.length - 1));
    });
  }

  add(token) {
    if (token.special && !token.text) return;
    const probability = Math.exp(token.logprob);
    const element = h("span", { class: "token", vars: { doubt: (1 - probability).toFixed(3) } }, token.text);
    const at = this.tokens.push({ element, token, probability }) - 1;
    element.addEventListener("pointerenter", () => this.point(at));
    this.element.append(element);
  }

  point(at) {
    this.tokens[this.at]?.element.classList.remove("pointed");
    this.at = at;
    const { element, token, probability } = this.tokens[at];
    element.classList.add("pointed");
    setText(this.facts, `“${token.text}”: ${percent(probability)} (log-probability ${token.logprob.toFixed(3)}), token ${token.id}`);
  }
}
