// One column of the playground: a task or a version, its answer, its tokens, its timings.

import { call, events } from "./api.js";
import { Ballots } from "./ballots.js";
import { bars, labelMass } from "./bars.js";
import { CodeBox } from "./code_box.js";
import { taskVars } from "./colours.js";
import { counted, field, h, milliseconds, options, problem, setText, setVars } from "./dom.js";
import { TaskPicker } from "./picker.js";
import { bodyOf, snippets } from "./snippets.js";
import { emptyInWords, ENDS, Steps } from "./steps.js";
import { Tokens } from "./tokens.js";

export class Column {
  // `reference`: as the picker takes it. `ask` tells inputs and parameters.
  constructor(tasks, reference, ask, { changed, removed }) {
    this.ask = ask;
    this.changed = changed;
    this.picker = new TaskPicker(tasks, reference, () => this.drawHead());
    this.remove = h("button", { type: "button", class: "small quiet", "aria-label": "Remove this column", onclick: removed }, "✕");
    this.effort = h("select", { onchange: () => this.code.draw() });
    this.wording = h("select", { onchange: () => this.code.draw() });
    this.ways = [field("Thinking", this.effort), field("Wording", this.wording)];
    this.answer = h("div", { class: "answer" }, h("p", { class: "muted" }, "Nothing yet."));
    this.tokenFacts = h("p", { class: "token-facts", "aria-live": "polite" });
    this.timing = h("p", { class: "timing muted" });
    this.code = new CodeBox((origin, hasKey) => snippets(origin, this.body, hasKey, this.ask.baseName(), this.program));
    this.element = h("section", { class: "panel column" },
      h("div", { class: "column-head" }, h("i", { class: "dot", "aria-hidden": "true" }), this.picker.taskChoice, this.picker.versionChoice, this.remove),
      h("div", { class: "ways" }, this.ways), this.answer, this.tokenFacts, this.timing, this.code.element);
    this.ready = this.picker.ready;
  }

  get task() {
    return this.picker.task;
  }

  get version() {
    return this.picker.version;
  }

  get fields() {
    return this.picker.fields;
  }

  get examples() {
    return this.version?.examples ?? [];
  }

  get parameters() {
    const parameters = { ...this.ask.parameters() };
    if (this.effort.value && !parameters.choices) parameters.reasoning_effort = this.effort.value;
    if (this.wording.value) parameters.paraphrase = Number(this.wording.value);
    return parameters;
  }

  get body() {
    return bodyOf(this.picker.reference, this.ask.inputs(this.fields), this.parameters);
  }

  // What an answer has beside its text.
  get program() {
    const { reasoning, chain, vote } = this.version ?? {};
    const { vote: asked = vote, do_sample: samples } = this.parameters;
    return { steps: Boolean(reasoning || chain), ballots: this.picker.isEnsemble || (asked?.n > 1 && samples !== false) };
  }

  mayBeRemoved(may) {
    this.remove.hidden = !may;
  }

  // What can be chosen of this task or version, and nothing else.
  drawHead() {
    setVars(this.element, taskVars(this.task));
    this.element.setAttribute("aria-label", this.task || "base model");
    const { reasoning, paraphrases = [] } = this.version ?? {};
    const efforts = Object.entries(reasoning?.effort ?? {}).map(([name, tokens]) => [name, `${name}: ${counted(tokens, "token")}`]);
    const wordings = paraphrases.map((each, index) => [index, `${index}: ${each.trim()}`]);
    this.effort.replaceChildren(...options([["", "to its end"], ["none", "none"], ...efforts.filter(([name]) => name !== "none")], this.effort.value));
    this.wording.replaceChildren(...options([["", "the task's"], ...wordings], this.wording.value));
    [this.ways[0].hidden, this.ways[1].hidden] = [!reasoning, !paraphrases.length];
    this.changed();
  }

  async run(signal) {
    this.answer.replaceChildren(h("p", { class: "muted" }, "…"));
    setText(this.tokenFacts, "");
    setText(this.timing, "");
    this.code.draw();
    try {
      await (this.ask.choosing() ? this.score(signal) : this.stream(signal));
    } catch (error) {
      if (error.name === "AbortError") setText(this.timing, "stopped");
      else if (error.status !== 401) this.answer.replaceChildren(problem(error, "No answer"));
    }
  }

  async stream(signal) {
    const began = performance.now();
    const answer = new StreamedAnswer(this.tokenFacts, this.picker.isEnsemble);
    let first = null;
    for await (const event of events("generate_stream", { method: "POST", body: this.body, signal })) {
      if (first === null) { first = performance.now() - began; this.answer.replaceChildren(answer.element); }
      answer.add(event);
    }
    if (first === null) this.answer.replaceChildren(answer.element);
    answer.end();
    setText(this.timing, answer.timing(first, performance.now() - began));
  }

  async score(signal) {
    if (this.ask.parameters().choices === true && !this.version?.choices.length) {
      this.answer.replaceChildren(h("p", { class: "muted" }, `${this.task || "The base model"} has no labels of its own; enter some above.`));
      return;
    }
    const began = performance.now();
    const { choice, vote, task_version: version } = await call("generate", { method: "POST", body: this.body, signal });
    const ordered = [...choice.probabilities].sort((one, other) => other.probability - one.probability);
    const rows = ordered.map(({ value, probability }) => ({ label: value, share: probability, kind: value === choice.value && "best" }));
    this.answer.replaceChildren(bars(rows, "Labels and their probabilities"), labelMass(choice.label_mass), vote ? voteOf(vote) : "");
    const by = vote ? ` · mean of ${counted(vote.ballots.length, "version")}` : version ? ` · v${version}` : "";
    setText(this.timing, `total ${milliseconds(performance.now() - began)} · ${ordered.length} labels scored in one batch${by}`);
  }
}

function voteOf(vote) {
  const ballots = new Ballots(true, true);
  ballots.finish(vote);
  return ballots.element;
}

// The events of a stream as they come: steps, tokens of the answer, ballots.
class StreamedAnswer {
  constructor(facts, ofVersions) {
    this.tokens = new Tokens(facts);
    this.steps = new Steps(this.tokens);
    this.ballots = new Ballots(ofVersions);
    this.last = null;
    this.element = h("div", {}, this.tokens.element);
  }

  get hasVote() {
    return this.ballots.ballots.length > 0;
  }

  add(event) {
    this.last = event;
    if (event.ballot) {
      if (!this.hasVote) this.element.append(this.ballots.element);
      this.ballots.add(event.ballot);
    } else if (event.vote) {  // the winner's text, whole
      this.tokens.said.append(event.token.text);
    } else if (!event.reasoning) {
      this.tokens.add(event.token);
    } else if (!this.hasVote) {  // the winner's steps stand with its ballot
      this.steps.add(event);
    }
  }

  end() {
    const { last } = this;
    if (last?.vote) this.ballots.finish(last.vote);
    if (last?.generated_text) return;
    const hasSteps = this.steps.count > 0;
    const words = !last?.details ? "The stream ended early." : this.hasVote ? "No answer: all abstained." : emptyInWords(last.details.finish_reason, hasSteps);
    this.tokens.said.append(h("span", { class: "muted" }, words));
  }

  timing(first, total) {
    const { last, hasVote } = this;
    const count = hasVote ? this.ballots.tokens : last?.index ?? 0;
    const facts = [
      `first ${hasVote ? "ballot" : "token"} ${milliseconds(first)}`,
      `total ${milliseconds(total)}`,
      counted(count, "token"),
      !hasVote && count > 1 && `${Math.round((count - 1) / ((total - first) / 1000))} tokens/s`,
      ENDS[last?.details?.finish_reason] ?? "?",
      last?.details?.task_version && !this.ballots.ofVersions && `v${last.details.task_version}`,
    ];
    return facts.filter(Boolean).join(" · ");
  }
}
