// A new version: files by drag and drop or by choice, and the server's report.

import { call, taskPath } from "./api.js";
import { field, h, problem } from "./dom.js";

const PARTS = {
  prompt: [/\.safetensors$/, "the prompt: tensors"],
  config: [/^adapter_config.*\.json$/, "how PEFT trained it"],
  task: [/\.json$/, "template, defaults, choices, examples"],
};

export function uploadPanel({ task = null, onUploaded }) {
  const files = new Map();
  const list = h("ul", { class: "files" });
  const picker = h("input", { type: "file", class: "off-screen", multiple: true, accept: ".safetensors,.json" });
  const name = h("input", { required: true, value: task ?? "", readonly: task !== null, pattern: "[a-z0-9]+([._\\-][a-z0-9]+)*", maxlength: 128, placeholder: "my-task", autocomplete: "off", spellcheck: "false" });
  const alias = h("input", { value: "live", required: true, autocomplete: "off", spellcheck: "false" });
  const template = h("textarea", { rows: 2, placeholder: "Review: {text}", spellcheck: "false" });
  const [send, report] = [h("button", { class: "primary" }, "Upload"), h("div", { class: "report", "aria-live": "polite" })];
  picker.id = `pick-${task ?? "new"}`;
  const picking = h("div", { class: "pick" }, picker, h("label", { class: "button", for: picker.id }, "Choose files"));
  const zone = h("div", { class: "drop" }, h("p", {}, h("strong", {}, "Drop a PEFT directory or its files here"), h("br"), h("span", { class: "muted" }, "adapter_model.safetensors, adapter_config.json and, where there is one, task.json")), picking, list);

  const add = (given) => {
    for (const file of given) {
      const part = Object.keys(PARTS).find((each) => PARTS[each][0].test(file.name));
      if (part) files.set(part, file);
    }
    const ignored = given.filter((file) => !Object.values(PARTS).some(([pattern]) => pattern.test(file.name)));
    list.replaceChildren(
      ...[...files].map(([part, file]) => h("li", {}, h("code", {}, file.name), h("small", {}, PARTS[part][1]), removeButton(file.name, () => { files.delete(part); add([]); }))),
      ...ignored.map((file) => h("li", {}, h("code", {}, file.name), h("small", {}, "isn't needed, and is left out"))));
  };
  picker.addEventListener("change", () => { add([...picker.files]); picker.value = ""; });
  dropped(zone, add);

  const form = h("form", {}, zone,
    h("div", { class: "fields" }, field("Task", name, "lower-case letters, digits, and . _ - between them"), field("Alias to move", alias, "live answers by default; none moves no alias"), field("Template (if there is no task.json)", template, "without files it makes a text-only task")),
    h("div", { class: "actions" }, send), report);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    send.disabled = true;
    report.replaceChildren(h("p", { class: "muted" }, "Validating, storing and test-running the prompt…"));
    try {
      const answer = await upload(name.value, alias.value, files, template.value);
      report.replaceChildren(accepted(answer, alias.value));
      files.clear();
      add([]);
      onUploaded(answer);
    } catch (error) {
      report.replaceChildren(refused(error));
    } finally {
      send.disabled = false;
    }
  });
  return h("section", { class: "panel upload", "aria-labelledby": "upload-title" }, h("div", { class: "panel-head" }, h("h2", { id: "upload-title" }, task ? "Upload a new version" : "Upload a prompt")), form);
}

async function upload(task, alias, files, template) {
  const form = new FormData();
  for (const [part, file] of files) form.append(part, part === "task" ? await file.text() : file);
  if (template && !files.has("task")) form.append("task", JSON.stringify({ template }));
  // `live` is the default, and only moves where a version is new; another alias is asked for by name.
  const query = alias === "live" ? "" : `?alias=${encodeURIComponent(alias)}`;
  return call(`${taskPath(task, "/versions")}${query}`, { method: "POST", body: form });
}

function accepted(answer, alias) {
  const released = answer.release ? `Release ${answer.release}: ${alias} now points to it.` : "No alias moved.";
  const examples = answer.examples ?? [];
  return h("div", { class: "notice good" },
    h("strong", {}, `${answer.task_id} version ${answer.version} is stored and fits the base.`), h("p", {}, released), ...(answer.warnings ?? []).map((each) => h("p", {}, each)),
    examples.length ? h("table", { class: "examples" }, h("caption", {}, `${examples.filter((each) => each.matches).length} of ${examples.length} examples gave the expected output`),
      h("thead", {}, h("tr", {}, ["Input", "Expected", "Generated", ""].map((each) => each ? h("th", { scope: "col" }, each) : h("td")))),
      h("tbody", {}, examples.map((each) => h("tr", {}, h("td", {}, inWords(each.inputs)), h("td", {}, each.expected), h("td", {}, each.generated), h("td", {}, each.matches ? "as expected" : "differs"))))) : null,
    h("div", { class: "actions" }, h("a", { class: "button", href: `#/playground?task=${encodeURIComponent(`${answer.task_id}@${answer.version}`)}` }, "Try it"), h("a", { class: "button", href: `#/tasks/${encodeURIComponent(answer.task_id)}` }, "History")));
}

// The server's message is "what; tensor: ...; expected: ...; found: ...": shown as it is, a line each.
function refused(error) {
  const [what, ...facts] = (error.message ?? "").split(/; (?=(?:tensor|expected|found): )/);
  const shown = problem({ ...error, status: error.status, code: error.code, message: what }, "Rejected; nothing was stored");
  if (facts.length) shown.append(h("dl", { class: "facts" }, facts.map((fact) => {
    const at = fact.indexOf(": ");
    return [h("dt", {}, fact.slice(0, at)), h("dd", {}, fact.slice(at + 2))];
  })));
  return shown;
}

export function inWords(inputs) {
  return typeof inputs === "string" ? inputs : Object.entries(inputs).map(([name, value]) => `${name}: ${value}`).join(", ");
}

export function removeButton(name, remove) {
  return h("button", { type: "button", class: "small quiet", "aria-label": `Leave out ${name}`, onclick: remove }, "✕");
}

// Calls `add` with the files that are dropped on an element, those of directories too.
export function dropped(zone, add) {
  let depth = 0;  // dragenter and dragleave come for children too
  const mark = (change) => (event) => {
    event.preventDefault();
    depth = Math.max(0, depth + change);
    zone.classList.toggle("over", depth > 0);
  };
  zone.addEventListener("dragenter", mark(1));
  zone.addEventListener("dragleave", mark(-1));
  zone.addEventListener("dragover", (event) => event.preventDefault());
  zone.addEventListener("drop", async (event) => {
    mark(-depth)(event);
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const plain = [...event.dataTransfer.files];  // gone after the first await
    add(entries.some((entry) => entry.isDirectory) ? (await Promise.all(entries.map(filesOf))).flat() : plain);
  });
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((take, fail) => entry.file(take, fail))];
  const reader = entry.createReader();
  const inside = await new Promise((take, fail) => reader.readEntries(take, fail));
  return (await Promise.all(inside.filter((each) => each.isFile).map(filesOf))).flat();
}
