// Train a prompt: drop a file of examples, see what was read, choose how, start.

import { allTasks, call, taskPath } from "./api.js";
import { field, h, number, options, problem } from "./dom.js";
import { dropped, inWords, removeButton } from "./upload.js";

const TASK = "[a-z0-9]+([._\\-][a-z0-9]+)*";
const PARTS = { train: "train", dev: "dev", validation: "dev", valid: "dev", val: "dev", test: "test" };
const METHODS = [["prefix", "prefix: keys and values of each layer"], ["prompt", "prompt: embeddings before the input"], ["p-tuning", "p-tuning: embeddings that a small network writes"]];
const DATA = /\.(jsonl|ndjson|csv|tsv)$/i;
export const STATES = {
  queued: "waits for its turn", running: "running", done: "done", failed: "failed", cancelled: "cancelled", interrupted: "interrupted: the server ended before it did",
};

export function train(main, query) {
  const [report, list] = [h("div", { class: "report", "aria-live": "polite" }), h("section", { class: "panel", "aria-label": "Training runs", hidden: true })];
  const files = filePicker(() => { suggestName(); check(); });
  const names = h("datalist", { id: "task-names" });
  const name = h("input", { required: true, value: query.get("task") ?? "", pattern: TASK, maxlength: 128, list: names.id, placeholder: "my-task", autocomplete: "off", spellcheck: "false" });
  const controls = settingsFields();
  const [start, outcome] = [h("button", { class: "primary" }, "Start training"), h("div", { class: "report", "aria-live": "polite" })];
  let asked = 0;  // checks; only the last one's answer counts

  function suggestName() {
    const [file] = files.chosen();
    if (file && !name.value) name.value = file.name.replace(/\.[^.]*$/, "").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "");
  }

  async function check() {
    const number_ = ++asked;
    if (!files.chosen().length || !name.value || !name.checkValidity()) { report.replaceChildren(); return; }
    report.replaceChildren(h("p", { class: "muted" }, "Reading the examples…"));
    const answer = await call(taskPath(name.value, "/training-runs/check"), { method: "POST", body: body(files, {}) }).then(summary, (error) => error.status === 401 ? "" : problem(error, "The examples can't be used yet"));
    if (number_ === asked) report.replaceChildren(answer);
  }

  async function loadRuns() {
    list.hidden = true;
    if (!name.value || !name.checkValidity()) return;
    try {
      const { runs } = await call(taskPath(name.value, "/training-runs"));
      list.hidden = !runs.length;
      list.replaceChildren(h("div", { class: "panel-head" }, h("h2", {}, `Runs of ${name.value}`)), h("ul", { class: "runs" }, runs.map(runLine)));
    } catch (error) {
      if (error.status !== 401) outcome.replaceChildren(problem(error, "Training isn't possible here"));
    }
  }

  const form = h("form", { class: "panel ask", "aria-label": "A new run" }, files.element, report,
    h("div", { class: "fields" }, field("Task", name, "an existing one, or a new name"), controls.main), names, controls.more,
    h("div", { class: "actions" }, start), outcome);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!files.chosen().length) { outcome.replaceChildren(h("p", { class: "notice bad", role: "alert" }, "Choose a file of examples first.")); return; }
    start.disabled = true;
    outcome.replaceChildren(h("p", { class: "muted" }, "Sending the examples…"));
    try {
      const run = await call(taskPath(name.value, "/training-runs"), { method: "POST", body: body(files, controls.value()) });
      location.hash = runHash(run);
    } catch (error) {
      outcome.replaceChildren(problem(error, "The run wasn't started"));
    } finally {
      start.disabled = false;
    }
  });
  name.addEventListener("change", () => { if (!report.childElementCount) check(); loadRuns(); });
  main.append(h("div", { class: "lead" }, h("h1", {}, "Train a prompt"), h("p", {}, "From a file of examples to a prompt for the base model that is served here. Some hundred examples are a good start. A part of them is held out, to choose the best step and to measure the result. What answers now doesn't change until you say so.")), form, list);
  allTasks().then((tasks) => names.append(...tasks.map((task) => h("option", { value: task.id }))), () => {});
  loadRuns();
}

export function runHash(run) {
  return `#/train/${encodeURIComponent(run.task_id)}/${run.id}`;
}

function runLine(run) {
  return h("li", {}, h("a", { href: runHash(run) }, new Date(run.created_at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })), " ", stateBadge(run),
    h("small", {}, [run.settings.method, run.published ? `version ${run.published.version}` : null, run.error].filter(Boolean).join(" · ")));
}

export function stateBadge(run) {
  const kind = { done: "good", failed: "bad", interrupted: "bad" }[run.state] ?? "";
  return h("span", { class: `badge ${kind}` }, run.is_cancelling ? "being cancelled" : run.state);
}

// The files by the part that each is sent as: one alone is split by the server.
function body(files, settings) {
  const form = new FormData();
  const chosen = files.chosen();
  for (const file of chosen) form.append(chosen.length === 1 ? "data" : partOf(file), file);
  form.append("settings", JSON.stringify(settings));
  return form;
}

function partOf(file) {
  return PARTS[file.name.replace(/\.[^.]*$/, "").toLowerCase()] ?? file.name;
}

function filePicker(changed) {
  const files = new Map();
  const [list, picker] = [h("ul", { class: "files" }), h("input", { type: "file", id: "pick-data", class: "off-screen", multiple: true, accept: ".jsonl,.ndjson,.csv,.tsv" })];
  const zone = h("div", { class: "drop" }, h("p", {}, h("strong", {}, "Drop your examples here"), h("br"), h("span", { class: "muted" }, "a .jsonl or .csv file with text and label, inputs and output, or prompt and completion; or files called train, dev and test")),
    h("div", { class: "pick" }, picker, h("label", { class: "button", for: picker.id }, "Choose files")), list);
  const add = (given) => {
    const fitting = given.filter((file) => DATA.test(file.name));
    for (const file of fitting) files.set(file.name, file);
    const lines = [...files.values()].map((file) => h("li", {}, h("code", {}, file.name), removeButton(file.name, () => { files.delete(file.name); add([]); })));
    const others = given.filter((file) => !DATA.test(file.name)).map((file) => h("li", {}, h("code", {}, file.name), h("small", {}, "is no .jsonl, .csv or .tsv file, and is left out")));
    list.replaceChildren(...lines, ...others);
    changed();
  };
  picker.addEventListener("change", () => { add([...picker.files]); picker.value = ""; });
  dropped(zone, add);
  return { element: zone, chosen: () => [...files.values()] };
}

function settingsFields() {
  const method = h("select", {}, options(METHODS, "prefix"));
  const inputs = {
    steps: h("input", { type: "number", min: 1, max: 20000, inputmode: "numeric", placeholder: "by the method" }),
    num_virtual_tokens: h("input", { type: "number", min: 1, max: 4096, inputmode: "numeric", placeholder: "by the method" }),
    learning_rate: h("input", { type: "number", min: 0, max: 10, step: "any", inputmode: "decimal", placeholder: "by the method" }),
    batch_size: h("input", { type: "number", min: 1, max: 4096, inputmode: "numeric", placeholder: "16" }),
    seed: h("input", { type: "number", min: 0, inputmode: "numeric", placeholder: "0" }),
  };
  const instruction = h("textarea", { rows: 2, maxlength: 65536 });
  const template = h("textarea", { rows: 2, spellcheck: "false", placeholder: "Review: {text}\nSentiment:" });
  const publish = h("input", { type: "checkbox", id: "publish", checked: true });
  return {
    main: [field("Method", method), field("Steps", inputs.steps)],
    more: h("details", {}, h("summary", {}, "More settings"), h("div", { class: "fields" },
      field("Virtual tokens", inputs.num_virtual_tokens), field("Learning rate", inputs.learning_rate), field("Batch size", inputs.batch_size), field("Seed", inputs.seed),
      field("Instruction", instruction, "in words; the prompt starts from it, and is compared with it"), field("Template", template, "by default that of the live version"),
      h("div", { class: "check" }, publish, h("label", { for: publish.id }, "Publish the result as the alias candidate")))),
    value() {
      const given = Object.fromEntries(Object.entries(inputs).filter(([, input]) => input.value !== "").map(([name, input]) => [name, Number(input.value)]));
      if (instruction.value.trim()) given.instruction = instruction.value.trim();
      if (template.value) given.task = { template: template.value };
      return { method: method.value, ...given, publish: publish.checked };
    },
  };
}

function summary(read) {
  const counts = Object.entries(read.num_examples).map(([name, count]) => `${number(count)} ${name}`).join(", ");
  return h("div", { class: "notice good" }, h("strong", {}, `Read as ${read.form}: ${counts}`),
    read.choices.length ? h("p", {}, `Labels: ${read.choices.join(", ")}`) : null,
    read.fields.length > 1 ? h("p", {}, `Fields for the template: ${read.fields.map((each) => `{${each}}`).join(", ")}`) : null,
    read.warnings.map((line) => h("p", {}, line)),
    h("div", { class: "wide" }, h("table", { class: "examples" }, h("caption", {}, "The first examples to train on"), h("thead", {}, h("tr", {}, ["Input", "Output", "Place"].map((each) => h("th", { scope: "col" }, each)))),
      h("tbody", {}, read.examples.map((each) => h("tr", {}, h("td", {}, inWords(each.inputs)), h("td", {}, each.output), h("td", {}, each.place)))))));
}
