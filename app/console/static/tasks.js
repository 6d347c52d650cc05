// The list of tasks: search, sort, and a place to drop a new prompt.

import { allTasks } from "./api.js";
import { taskVars } from "./colours.js";
import { h, number, problem, setText } from "./dom.js";
import { uploadPanel } from "./upload.js";

const COLUMNS = [
  ["id", "Task"], ["kind", "Kind"], ["version", "Live"], ["virtual_tokens", "Virtual tokens"], ["servable", "State"], ["requests_served", "Requests"],
];
const SHOWN = 500;  // rows; a search finds the others
const KINDS = { soft: "soft prompt", prefix: "prefix", text: "text only", unknown: "unknown" };

export function taskList(main) {
  const search = h("input", { type: "search", id: "search", placeholder: "Search", autocomplete: "off", "aria-label": "Search tasks" });
  const [count, body] = [h("p", { class: "muted", role: "status" }, "Loading…"), h("tbody")];
  const state = { tasks: [], by: "id", down: false };
  const heads = COLUMNS.map(([name, label]) => sortHead(name, label, state, () => draw()));
  const table = h("table", { class: "tasks", hidden: true }, h("caption", { class: "off-screen" }, "Tasks; sort with the buttons in the header"), h("thead", {}, h("tr", {}, heads.map((each) => each.element))), body);
  const empty = h("div", { class: "empty", hidden: true });

  function draw() {
    const wanted = search.value.trim().toLowerCase();
    const rows = state.tasks.filter((task) => task.id.includes(wanted) || KINDS[task.kind]?.includes(wanted)).sort(order(state));
    heads.forEach((each) => each.tell());
    body.replaceChildren(...rows.slice(0, SHOWN).map(row));
    const found = rows.length === state.tasks.length ? `${number(rows.length)} tasks` : `${number(rows.length)} of ${number(state.tasks.length)} tasks`;
    setText(count, rows.length > SHOWN ? `${found}, showing the first ${SHOWN}` : found);
    table.hidden = !rows.length;
    empty.hidden = Boolean(rows.length);
    empty.replaceChildren(state.tasks.length ? h("p", {}, "No task matches the search.") : h("p", {}, "No tasks yet. Drop a prompt below to create one."));
  }

  async function load() {
    try {
      state.tasks = await allTasks();
      draw();
    } catch (error) {
      if (error.status === 401) return;
      setText(count, "");
      empty.hidden = false;
      empty.replaceChildren(problem(error, "The tasks couldn't be loaded"));
    }
  }

  search.addEventListener("input", draw);
  main.append(
    h("div", { class: "lead row" }, h("div", {}, h("h1", {}, "Tasks"), h("p", {}, "A task is a name for a small trained prompt, a template, or both. Its versions never change; an alias points to the version that answers.")), search),
    h("section", { class: "panel", "aria-label": "All tasks" }, count, h("div", { class: "wide" }, table), empty),
    uploadPanel({ onUploaded: load }));
  load();
}

function sortHead(name, label, state, draw) {
  const button = h("button", { type: "button" }, label);
  const element = h("th", { scope: "col", class: `col-${name}` }, button);
  button.addEventListener("click", () => {
    state.down = state.by === name ? !state.down : name === "requests_served";
    state.by = name;
    draw();
  });
  return {
    element,
    tell() {
      if (state.by === name) element.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else element.removeAttribute("aria-sort");
    },
  };
}

function order({ by, down }) {
  return (one, other) => {
    const [a, b] = [one[by], other[by]];
    const compared = typeof a === "string" && typeof b === "string" ? a.localeCompare(b) : Number(a) - Number(b);
    return (down ? -compared : compared) || one.id.localeCompare(other.id);
  };
}

function row(task) {
  return h("tr", { vars: taskVars(task.id) },
    h("th", { scope: "row", class: "col-id" }, h("i", { class: "dot", "aria-hidden": "true" }), h("a", { href: `#/tasks/${encodeURIComponent(task.id)}` }, task.id)),
    h("td", { class: "col-kind" }, KINDS[task.kind] ?? task.kind),
    h("td", { class: "col-version" }, task.version ? `v${task.version}` : "–"),
    h("td", { class: "col-virtual_tokens" }, number(task.virtual_tokens)),
    h("td", { class: "col-servable" }, stateOf(task)),
    h("td", { class: "col-requests_served" }, number(task.requests_served)));
}

export function stateOf(task) {
  if (!task.servable) return [h("span", { class: "badge bad" }, "not servable"), h("small", { class: "why" }, task.not_servable_because)];
  return [h("span", { class: "badge good" }, "servable"), task.resident ? h("span", { class: "badge" }, "on the device") : null];
}
