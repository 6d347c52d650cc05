// One question of the decisions: its type, what is asked, and the options.

import { field, h, options, setText } from "./dom.js";

const TYPES = [["predicate", "true or false"], ["choice", "one of several"], ["score", "a place on a scale"]];
const OPTIONS = { choice: "Options", score: "Levels, the lowest first" };

export class Question {
  // `given`: type, instructions and options, as far as there are any.
  constructor(given, removed) {
    this.type = h("select", {}, options(TYPES, given.type));
    this.instructions = h("textarea", { rows: 1, spellcheck: "false", value: given.instructions ?? "" });
    this.options = h("textarea", { rows: 3, spellcheck: "false", value: (given.options ?? []).join("\n") });
    this.name = h("legend", {});
    this.remove = h("button", { type: "button", class: "small quiet", onclick: removed }, "Remove");
    this.instructionsBox = field("Question, or a statement", this.instructions);
    this.optionsBox = field("Options", this.options, "one on each line; “food: what was eaten” describes an option");
    this.element = h("li", {}, h("fieldset", {}, this.name, h("div", { class: "question" }, field("Answer", this.type), this.instructionsBox, this.optionsBox), this.remove));
    this.type.addEventListener("change", () => this.draw());
    this.draw();
  }

  draw() {
    const name = OPTIONS[this.type.value];
    this.optionsBox.hidden = !name;
    setText(this.optionsBox.querySelector("label"), name ?? "");
  }

  // Its number; `asksItself`: the task has its own question, `isOnly`: it can't be removed.
  settle(number, { asksItself, isOnly }) {
    setText(this.name, `Question ${number}`);
    this.remove.setAttribute("aria-label", `Remove question ${number}`);
    this.remove.hidden = isOnly;
    this.instructionsBox.hidden = asksItself;
  }

  focus() {
    this.type.focus();
  }

  // As the route takes it.
  value() {
    const question = { type: this.type.value, instructions: this.instructionsBox.hidden ? "" : this.instructions.value };
    if (question.type === "predicate") return question;
    const [list, name] = question.type === "choice" ? ["choices", "value"] : ["levels", "label"];
    return { ...question, [list]: this.lines().map(([text, description]) => ({ [name]: text, ...(description && { description }) })) };
  }

  // Each option, and what stands behind its first colon and space.
  lines() {
    return this.options.value.split("\n").map((line) => line.trim()).filter(Boolean).map((line) => {
      const end = line.indexOf(": ");
      return end < 1 ? [line] : [line.slice(0, end), line.slice(end + 2).trim()];
    });
  }
}
