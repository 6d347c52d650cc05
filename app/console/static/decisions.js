// Decisions: questions about one text, answered with the probabilities of their options.

import { allTasks, call, taskPath } from "./api.js";
import { bars, labelMass, likely } from "./bars.js";
import { CodeBox } from "./code_box.js";
import { taskVars } from "./colours.js";
import { counted, field, h, milliseconds, problem, setText, setVars } from "./dom.js";
import { TaskPicker } from "./picker.js";
import { Question } from "./question.js";
import { decisionSnippets, fieldsOf } from "./snippets.js";

const LOOKED_AT = 12;  // tasks, for one that answers questions
const EXAMPLE = "The waiter was rude.";
const ASKED = [
  { type: "choice", instructions: "Which aspect does the review talk about?", options: ["food", "service", "price"] },
  { type: "predicate", instructions: "The review is positive." },
];

export function decisions(main, query) {
  const state = { questions: [], baseName: "", picker: null, isEdited: false, suggested: "" };  // edited: questions, by the reader
  const input = h("textarea", { rows: 3, spellcheck: "false" });
  const list = h("ol", { class: "questions" });
  const model = h("div", { class: "model" });
  const [askButton, addButton] = [h("button", { class: "primary" }, "Decide"), h("button", { type: "button", disabled: true }, "Add a question")];
  const note = h("p", { class: "muted", hidden: true });
  const code = new CodeBox((origin, hasKey) => decisionSnippets(origin, body(), hasKey));
  const form = h("form", { class: "panel ask" }, model, field("Input", input), note, list, h("div", { class: "actions" }, askButton, addButton), code.element);
  const answers = h("div", { class: "grid decided", tabindex: "-1" });
  const usage = h("p", { class: "muted", role: "status" });
  let running = null;

  function body() {
    return { model: state.picker?.reference || state.baseName, input: input.value, questions: state.questions.map((each) => each.value()) };
  }

  function add(given) {
    const question = new Question(given, () => remove(question));
    state.questions.push(question);
    list.append(question.element);
    settle();
    return question;
  }

  function remove(question) {
    state.questions = state.questions.filter((each) => each !== question);
    question.element.remove();
    settle();
    addButton.focus();
  }

  function settle() {
    const asksItself = isMadeForOne(state.picker);
    note.hidden = !asksItself;
    setText(note, `${state.picker.task} was made for one question and answers it with its own labels, so it takes no other instructions.`);
    state.questions.forEach((each, index) => each.settle(index + 1, { asksItself, isOnly: state.questions.length === 1 }));
    code.draw();
  }

  // An input and questions that fit what was picked, unless they were written here.
  function suggest() {
    const { version, task } = state.picker;
    for (const element of [form, answers]) setVars(element, taskVars(task));
    const example = version?.examples[0]?.inputs;
    if (input.value === state.suggested) input.value = state.suggested = typeof example === "string" ? example : EXAMPLE;
    if (!state.isEdited) {
      state.questions = [];
      list.replaceChildren();
      const own = version?.choices.map((choice) => choice.value ?? choice);
      (own?.length ? [{ type: "choice", instructions: isMadeForOne(state.picker) ? "" : ASKED[0].instructions, options: own }] : ASKED).forEach(add);
    }
    settle();
  }

  async function decide() {
    running?.abort();
    const mine = running = new AbortController();
    await ready;
    setText(usage, "…");
    const asked = body();
    code.draw();
    try {
      const began = performance.now();
      const found = await call("v1/decisions", { method: "POST", body: asked, signal: mine.signal });
      answers.replaceChildren(...found.answers.map((answer, index) => answerCard(asked.questions[index], answer, index + 1)));
      setText(usage, `total ${milliseconds(performance.now() - began)} · ${counted(found.answers.length, "question")} in one batch · ${inTokens(found.usage)}`);
    } catch (error) {
      if (error.name === "AbortError" || error.status === 401) return;
      setText(usage, "");
      answers.replaceChildren(problem(error, "No decision"));
    }
  }

  form.addEventListener("input", (event) => { state.isEdited ||= list.contains(event.target); code.draw(); });
  form.addEventListener("submit", (event) => { event.preventDefault(); decide(); });
  form.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); decide(); } });
  addButton.addEventListener("click", () => { state.isEdited = true; add({ type: "choice", options: [] }).focus(); });
  main.append(h("div", { class: "lead" }, h("h1", {}, "Decisions"), h("p", {}, "Ask questions about one text: whether a statement is true, which value fits, where it is on a scale. The model writes nothing; every option gets a probability, all in one batch.")), form, usage, answers);

  const ready = start().catch((error) => { if (error.status !== 401) answers.replaceChildren(problem(error, "The tasks couldn't be loaded")); });

  async function start() {
    state.baseName = (await call("health")).model;
    const tasks = (await allTasks()).filter((task) => task.servable);
    state.picker = new TaskPicker(tasks, query.get("model") ?? await answering(tasks), suggest);
    state.picker.taskChoice.setAttribute("aria-label", "Model or task");
    model.replaceChildren(h("i", { class: "dot", "aria-hidden": "true" }), state.picker.taskChoice, state.picker.versionChoice);
    await state.picker.ready;
    addButton.disabled = false;
  }

  return () => running?.abort();
}

// Whether a task answers with its labels and reads no instructions.
export function isMadeForOne({ version, fields }) {
  return Boolean(version?.choices.length) && !fields.includes("instructions");
}

// A task that answers questions; "": the base model does.
async function answering(tasks) {
  const details = await Promise.all(tasks.slice(0, LOOKED_AT).map((task) => call(taskPath(task.id))));
  const plain = details.filter(({ versions }) => versions.length && !versions.at(-1).reasoning && !versions.at(-1).chain);
  const reading = plain.find(({ versions }) => fieldsOf(versions.at(-1).template).includes("instructions"));
  return (reading ?? plain.find(({ versions }) => versions.at(-1).choices.length))?.id ?? "";
}

function inTokens({ input_tokens: read, input_tokens_details: { cached_tokens: shared }, output_tokens: scored }) {
  return `${counted(read, "input token")}${shared ? `, ${shared} of them computed once for several questions` : ""} · ${counted(scored, "label token")}`;
}

function answerCard(question, answer, number) {
  const { rows, words } = READ[answer.type](answer);
  return h("section", { class: "panel decision", "aria-label": `Question ${number}` },
    h("h2", {}, question.instructions || `Question ${number}`),
    h("p", { class: "verdict" }, words),
    rows.length ? bars(rows, "Options and their probabilities") : null,
    rows.length ? labelMass(answer.label_mass) : null);
}

// Of each type of answer: its bars, and what it comes to.
const READ = {
  predicate({ probability }) {
    const rows = [{ label: "true", share: probability, kind: probability >= 0.5 && "best" }, { label: "false", share: 1 - probability, kind: probability < 0.5 && "best" }];
    return { rows, words: `True with a probability of ${likely(probability)}` };
  },
  choice({ choice, confidence, probabilities }) {
    const ordered = [...probabilities].sort((one, other) => other.probability - one.probability);
    const rows = ordered.map(({ value, probability }) => ({ label: String(value), share: probability, kind: value === choice && "best" }));
    return { rows, words: [h("strong", {}, String(choice)), ` · confidence ${likely(confidence)}`] };
  },
  score({ score, confidence, probabilities }) {
    const most = Math.max(...probabilities.map(({ probability }) => probability));
    const rows = probabilities.map(({ value, label, probability }) => ({ label: `${value}: ${label}`, share: probability, kind: probability === most && "best" }));
    return { rows, words: [h("strong", {}, score.toFixed(2)), ` on a scale from 0 to ${rows.length - 1} · confidence ${likely(confidence)}`] };
  },
  refusal: () => ({ rows: [], words: "No answer: the model gives none of the options a chance." }),
};
