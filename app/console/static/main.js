// The frame: which view is shown, whether a key is needed, what the server is.

import { call, key, setKey, whenKeyIsNeeded } from "./api.js";
import { decisions } from "./decisions.js";
import { field, h, setText } from "./dom.js";
import { live } from "./live.js";
import { playground } from "./playground.js";
import { trainingRun } from "./run.js";
import { taskDetail } from "./task.js";
import { taskList } from "./tasks.js";
import { train } from "./training.js";

const main = document.getElementById("main");
const server = document.getElementById("server");
const keyButton = document.getElementById("key");
let leave = () => {};  // what the view that is shown has running

// "#/tasks/sentiment?x=1" -> ["tasks", "sentiment"], and its query
function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  return [path.split("/").map(decodeURIComponent), new URLSearchParams(query)];
}

function show(focus) {
  const [[name, task, run], query] = place();
  leave();
  main.replaceChildren();
  const [title, view] = {
    tasks: task ? [task, () => taskDetail(main, task)] : ["Tasks", () => taskList(main)],
    train: run ? [`Training ${task}`, () => trainingRun(main, task, run)] : ["Train", () => train(main, query)],
    playground: ["Playground", () => playground(main, query)],
    decisions: ["Decisions", () => decisions(main, query)],
  }[name] ?? ["Live", () => live(main, tellServer)];
  document.title = `${title} · Promptplex`;
  for (const link of document.querySelectorAll("nav a")) {
    const isHere = link.getAttribute("href") === `#/${name || "live"}`;
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  leave = view() ?? (() => {});
  if (focus) main.focus({ preventScroll: true });
  scrollTo(0, 0);
}

function askForKey(error) {
  leave();
  leave = () => {};
  keyButton.hidden = false;
  setText(server, "needs a key");
  server.dataset.state = "waiting";
  const input = h("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true, placeholder: "ppx_…" });
  const form = h("form", { class: "panel key-form" },
    h("h1", {}, "This server needs a key"),
    h("p", {}, "Paste the key that your operator gave you. It is kept in this tab only, until you close it."),
    field("Key", input),
    key() ? h("p", { class: "notice bad", role: "alert" }, error.message) : null,
    h("button", { class: "primary" }, "Open the console"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(input.value.trim());
    start();
  });
  main.replaceChildren(form);
  input.focus();
}

function tellServer(text, state) {
  setText(server, text);
  server.dataset.state = state;
}

async function describe() {
  try {
    const health = await call("health");
    const model = health.model ? `${health.model} · ` : "";
    tellServer(`${model}${health.status}`, health.status === "ready" ? "up" : "waiting");
    return true;
  } catch (error) {
    if (error.status === 401) return false;
    tellServer(error.status ? "" : "no answer", error.status ? "up" : "down");
    return true;
  }
}

async function start() {
  keyButton.hidden = !key();
  if (await describe()) show(false);
}

keyButton.addEventListener("click", () => {
  setKey(null);
  askForKey({ message: "" });
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();  // the hash names the view
  main.focus();
});
whenKeyIsNeeded(askForKey);
addEventListener("hashchange", () => show(true));
start();
