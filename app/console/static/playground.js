// The playground: one input, up to four tasks or versions side by side.

import { allTasks, call, taskPath } from "./api.js";
import { Column } from "./column.js";
import { field, h, problem } from "./dom.js";

const MOST = 4;
const EXAMPLES_SHOWN = 3;
const LOOKED_AT = 12;

export function playground(main, query) {
  const state = { columns: [], tasks: [], baseName: "" };
  const inputs = new Map();  // field of a template ("" for the plain text) -> its control
  const fieldsBox = h("div", { class: "inputs" });
  const examples = h("div", { class: "examples-row" });
  const grid = h("div", { class: "grid" });
  const controls = parameters();
  const [runButton, stopButton, addButton] = [h("button", { class: "primary" }, "Run"), h("button", { type: "button", hidden: true }, "Stop"), h("button", { type: "button" }, "Add a column")];
  const form = h("form", { class: "panel ask" }, fieldsBox, examples, controls.element, h("div", { class: "actions" }, runButton, stopButton, addButton));
  let running = null;

  const ask = {
    inputs: (fields) => fields.length > 1 ? Object.fromEntries(fields.map((name) => [name, inputs.get(name)?.value ?? ""])) : inputs.get("")?.value ?? "",
    parameters: () => controls.value(),
    choosing: () => controls.choosing(),
    baseName: () => state.baseName,
  };

  // One box for plain text where any column takes one, and one for each named field of the others.
  function drawFields() {
    const wanted = new Set(state.columns.flatMap((column) => column.fields.length > 1 ? column.fields : [""]));
    const kept = new Map(inputs);
    inputs.clear();
    for (const name of wanted) inputs.set(name, kept.get(name) ?? h("textarea", { rows: name ? 1 : 3, spellcheck: "false" }));
    fieldsBox.replaceChildren(...[...inputs].map(([name, control]) => field(name || "Input", control)));
    drawExamples();
  }

  function drawExamples() {
    const known = new Map(state.columns.flatMap((column) => column.examples).map(({ inputs: given }) => [typeof given === "string" ? given : Object.values(given).join(", "), given]));
    examples.replaceChildren(...(known.size ? [h("span", { class: "muted" }, "For example:")] : []), ...[...known].slice(0, EXAMPLES_SHOWN).map(([words, given]) =>
      h("button", { type: "button", class: "small quiet", onclick: () => fillIn(given) }, words)));
  }

  function fillIn(given) {
    if (typeof given === "string") { if (inputs.has("")) inputs.get("").value = given; return; }
    for (const [name, value] of Object.entries(given)) (inputs.get(name) ?? inputs.get("") ?? {}).value = value;
  }

  function addColumn(reference) {
    const column = new Column(state.tasks, reference, ask, {
      changed: drawFields,
      removed: () => { state.columns = state.columns.filter((each) => each !== column); column.element.remove(); drawFields(); settle(); addButton.focus(); },
    });
    state.columns.push(column);
    grid.append(column.element);
    settle();
    return column.ready;
  }

  function settle() {
    addButton.disabled = state.columns.length >= MOST;
    state.columns.forEach((each) => each.mayBeRemoved(state.columns.length > 1));
    grid.dataset.columns = state.columns.length;
  }

  async function run() {
    running?.abort();
    const mine = running = new AbortController();
    [runButton.textContent, stopButton.hidden] = ["Run again", false];
    await ready;
    await Promise.all(state.columns.map((column) => column.run(mine.signal)));
    if (running === mine) stopButton.hidden = true;
  }

  form.addEventListener("submit", (event) => { event.preventDefault(); run(); });
  form.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); } });
  stopButton.addEventListener("click", () => running?.abort());
  addButton.addEventListener("click", () => addColumn(nextTask(state)));
  main.append(h("div", { class: "lead" }, h("h1", {}, "Playground"), h("p", {}, "The same text, several tasks at once: they share the model, each with its own prompt. Tokens are shaded by their probability; steps before an answer, and the ballots of a vote, stand apart.")), form, grid);

  const ready = start().catch((error) => { if (error.status !== 401) grid.replaceChildren(problem(error, "The tasks couldn't be loaded")); });

  async function start() {
    state.baseName = (await call("health")).model;
    state.tasks = (await allTasks()).filter((task) => task.servable);
    const asked = query.getAll("task");
    const first = asked.length ? asked.slice(0, MOST) : [...await alike(state.tasks), ""];
    await Promise.all(first.map((reference) => addColumn(reference)));
    const example = state.columns.flatMap((column) => column.examples)[0];
    if (example && [...inputs.values()].every((control) => !control.value)) fillIn(example.inputs);
  }

  return () => running?.abort();
}

// Three tasks to begin with, such as understand the same text: those with labels, where there are any.
async function alike(tasks) {
  const details = await Promise.all(tasks.slice(0, LOOKED_AT).map((task) => call(taskPath(task.id))));
  const labels = (detail) => detail.versions.at(-1)?.choices.length || Infinity;
  return details.sort((one, other) => labels(one) - labels(other) || 0).slice(0, MOST - 1).map((detail) => detail.id);
}

function nextTask(state) {
  const shown = new Set(state.columns.map((column) => column.task));
  return state.tasks.find((task) => !shown.has(task.id))?.id ?? "";
}

function parameters() {
  const mode = h("select", {}, h("option", { value: "text" }, "Generate text"), h("option", { value: "choose" }, "Choose a label"));
  const most = h("input", { type: "number", min: 1, inputmode: "numeric", placeholder: "the task's" });
  const how = h("select", {}, h("option", { value: "" }, "the task's"), h("option", { value: "greedy" }, "greedy"), h("option", { value: "sample" }, "sampled"));
  const temperature = h("input", { type: "number", min: 0.01, max: 100, step: "any", value: "1", inputmode: "decimal" });
  const seed = h("input", { type: "number", min: 0, inputmode: "numeric", placeholder: "drawn" });
  const ballots = h("input", { type: "number", min: 1, max: 64, inputmode: "numeric", placeholder: "the task's" });
  const labels = h("input", { placeholder: "the task's own, or: positive, negative", autocomplete: "off" });
  const generating = [field("Maximum new tokens", most), field("Ballots of a vote", ballots), field("Next token", how), field("Temperature", temperature), field("Seed", seed)];
  const choosing = field("Labels", labels, "with commas between");
  const show = () => {
    const chooses = mode.value === "choose";
    generating.forEach((each) => { each.hidden = chooses; });
    if (!chooses) for (const each of generating.slice(3)) each.hidden = how.value !== "sample";
    choosing.hidden = !chooses;
  };
  for (const each of [mode, how]) each.addEventListener("change", show);
  show();
  return {
    element: h("div", { class: "fields parameters" }, field("Mode", mode), generating, choosing),
    choosing: () => mode.value === "choose",
    value() {
      if (mode.value === "choose") {
        const given = labels.value.split(",").map((each) => each.trim()).filter(Boolean);
        return { choices: given.length ? given : true };
      }
      const chosen = {};
      if (most.value) chosen.max_new_tokens = Number(most.value);
      if (ballots.value) chosen.vote = { n: Number(ballots.value) };
      if (how.value) chosen.do_sample = how.value === "sample";
      if (how.value === "sample") {
        chosen.temperature = Number(temperature.value);
        if (seed.value) chosen.seed = Number(seed.value);
      }
      return chosen;
    },
  };
}
