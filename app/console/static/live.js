// The live view: what the engine does now, from /ops/stream.

import { allTasks, call, events, key, taskPath } from "./api.js";
import { taskVars } from "./colours.js";
import { bytes, code, h, milliseconds, number, percent, problem, setText, setVars } from "./dom.js";
import { Lanes } from "./lanes.js";
import { Plot } from "./plots.js";
import { bodyOf, snippetCurl } from "./snippets.js";

const QUIET = 10;  // seconds without a request until the page explains how to send one
const RETRY = [1, 2, 4, 8];  // seconds
const TIERS = { device: "Device", host: "Host memory", redis: "Redis", store: "Store" };
const BURST = 120;  // requests
const SENDERS = 4;  // at once: a browser has few connections to spare

export function live(main, tellServer) {
  const stopped = new AbortController();
  const view = build(stopped.signal);
  main.append(...view.elements);
  view.start();
  listen(view, tellServer, stopped.signal);
  return () => { stopped.abort(); view.close(); };
}

async function listen(view, tellServer, signal) {
  for (let failures = 0; !signal.aborted; failures += 1) {
    try {
      for await (const snapshot of events("ops/stream", { signal })) {
        failures = 0;
        tellServer(`${snapshot.model} · ${snapshot.phase}`, snapshot.phase === "ready" ? "up" : "waiting");
        view.show(snapshot);
      }
      tellServer("the stream ended", "waiting");
    } catch (error) {
      if (signal.aborted || error.status === 401) return;
      view.fail(error);
      tellServer(error.status === 0 ? "no answer" : "waiting", error.status === 0 ? "down" : "waiting");
      if (error.status === 403) return;
    }
    await new Promise((resume) => setTimeout(resume, 1000 * RETRY[Math.min(failures, RETRY.length - 1)]));
  }
}

function build(signal) {
  const stats = {
    running: stat("In the batch"), waiting: stat("Waiting"), tasks: stat("Distinct tasks"),
    rate: stat("Tokens per second"), first: stat("First token, p50"),
  };
  const lanes = new Lanes();
  const [status, empty, chips] = [h("div", {}), h("div", { class: "empty", hidden: true }), h("ul", { class: "chips", "aria-label": "Tasks in the batch" })];
  const encodes = h("span", { hidden: true }, h("i", { class: "swatch crossed" }), "encode: reads the source");
  const pause = h("button", { type: "button", class: "small", "aria-pressed": "false" }, "Pause");
  const [rateBox, firstBox] = [plotBox("Tokens per second, the last two minutes"), plotBox("Time to the first token, the last two minutes")];
  const memory = memoryPanel();
  const tiers = tierPanel();
  const plots = [];
  let [lastBusy, ticks, isPaused] = [-Infinity, 0, false];

  pause.addEventListener("click", () => {
    isPaused = !isPaused;
    lanes.paused = isPaused;
    pause.setAttribute("aria-pressed", String(isPaused));
    setText(pause, isPaused ? "Resume" : "Pause");
  });
  fillEmpty(empty, signal);

  const elements = [
    h("div", { class: "lead" }, h("h1", {}, "One frozen model, many tasks, one batch"),
      h("p", {}, "Each lane is a request, each colour a task with a small trained prompt of its own. All of them go through the same weights in every step.")),
    status,
    h("dl", { class: "stats" }, Object.values(stats).map((each) => each.element)),
    h("section", { class: "panel", "aria-labelledby": "batch-title" },
      h("div", { class: "panel-head" }, h("h2", { id: "batch-title" }, "The batch"),
        h("p", { class: "legend" }, encodes, h("span", {}, h("i", { class: "swatch hatched" }), "prefill: reads the prompt"), h("span", {}, h("i", { class: "swatch" }), "decode: a token a step")),
        pause),
      empty, lanes.element, chips),
    h("div", { class: "pair" },
      h("figure", { class: "panel" }, h("figcaption", {}, h("h2", {}, "Tokens per second")), rateBox),
      h("figure", { class: "panel" },
        h("figcaption", {}, h("h2", {}, "Time to the first token"), h("p", { class: "legend" }, h("span", {}, h("i", { class: "line" }), "p50"), h("span", {}, h("i", { class: "line dashed" }), "p95"))), firstBox)),
    h("div", { class: "pair" }, memory.element, tiers.element),
  ];

  return {
    elements,
    start() {
      plots.push(new Plot(rateBox, [{ label: "tokens/s", colour: "--accent", fill: "--accent-soft" }], number));
      plots.push(new Plot(firstBox, [{ label: "p50", colour: "--accent" }, { label: "p95", colour: "--warm", dash: [6, 4] }], milliseconds));
    },
    show(snapshot) {
      if (isPaused) return;
      ticks += 1;
      status.replaceChildren();
      encodes.hidden = !snapshot.has_encoder;
      lanes.add(snapshot.rows);
      plots[0].add([snapshot.tokens_per_second]);
      plots[1].add([snapshot.first_token_ms.p50, snapshot.first_token_ms.p95]);
      const now = performance.now() / 1000;
      if (snapshot.rows.length || snapshot.waiting) lastBusy = now;
      const quiet = now - lastBusy > QUIET;
      empty.hidden = !quiet;
      lanes.element.hidden = chips.hidden = quiet;
      if (ticks % 2 === 1) tell(stats, snapshot, rateBox, firstBox);
      if (ticks % 4 === 1) { lanes.describe(); showTasks(chips, snapshot.rows); memory.show(snapshot); tiers.show(snapshot); }
    },
    fail(error) {
      const title = error.code === "not_ready" ? "Not ready yet" : error.status === 403 ? "Not permitted with this key" : "The live stream stopped";
      status.replaceChildren(problem(error, title));
    },
    close() { lanes.close(); plots.forEach((plot) => plot.close()); },
  };
}

function tell(stats, snapshot, rateBox, firstBox) {
  const { p50, p95 } = snapshot.first_token_ms;
  stats.running.tell(number(snapshot.batch_size), `of ${number(snapshot.max_rows)} rows`);
  stats.waiting.tell(number(snapshot.waiting), snapshot.waiting ? "in the queue" : "queue empty");
  stats.tasks.tell(number(snapshot.distinct_tasks), "in one forward pass");
  stats.rate.tell(number(snapshot.tokens_per_second), `${number(snapshot.generated_tokens)} since the start`);
  stats.first.tell(milliseconds(p50), `p95 ${milliseconds(p95)}`);
  rateBox.setAttribute("aria-label", `Tokens per second: ${number(snapshot.tokens_per_second)} now`);
  firstBox.setAttribute("aria-label", `Time to the first token: p50 ${milliseconds(p50)}, p95 ${milliseconds(p95)}`);
}

function stat(name) {
  const [value, note] = [h("span", { class: "value" }, "–"), h("small", {}, "\u00a0")];
  return {
    element: h("div", {}, h("dt", {}, name), h("dd", {}, value, note)),
    tell(text, small) { setText(value, text); setText(note, small); },
  };
}

function plotBox(description) {
  return h("div", { class: "plot", role: "img", "aria-label": description });
}

function showTasks(list, rows) {
  const counts = new Map();
  for (const row of rows) counts.set(row.task ?? "", (counts.get(row.task ?? "") ?? 0) + 1);
  const names = [...counts.keys()].sort();
  list.replaceChildren(...names.map((name) => h("li", { vars: taskVars(name) },
    h("i", { class: "dot", "aria-hidden": "true" }),
    name ? h("a", { href: `#/tasks/${encodeURIComponent(name)}` }, name) : h("span", {}, "base model"),
    h("small", {}, `${counts.get(name)} ${counts.get(name) === 1 ? "row" : "rows"}`))));
}

function memoryPanel() {
  const text = h("span", { class: "value" }, "–");
  const facts = { count: fact("Resident prompts"), size: fact("Resident prompt memory"), steps: fact("Forward passes so far") };
  const bar = meter("K/V memory in use");
  return {
    element: h("section", { class: "panel", "aria-labelledby": "memory-title" },
      h("div", { class: "panel-head" }, h("h2", { id: "memory-title" }, "Keys and values"), text), bar.element,
      h("dl", { class: "trio" }, Object.values(facts).map((each) => each.element)),
      h("p", { class: "muted" }, "A task's prompt is kept as keys and values, once, and shared by all its requests.")),
    show(snapshot) {
      setText(text, `${percent(snapshot.kv_usage)} in use`);
      bar.tell(snapshot.kv_usage);
      setText(facts.count.value, number(snapshot.resident_prefixes));
      setText(facts.size.value, bytes(snapshot.resident_prefix_bytes));
      setText(facts.steps.value, number(snapshot.steps));
    },
  };
}

function fact(name) {
  const value = h("dd", {}, "–");
  return { value, element: h("div", {}, h("dt", {}, name), value) };
}

function meter(name) {
  const element = h("div", { class: "meter", role: "meter", "aria-label": name, "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": "0" }, h("i"));
  return {
    element,
    tell(share) {
      setVars(element, { share });
      element.setAttribute("aria-valuenow", Math.round(100 * share));
    },
  };
}

function tierPanel() {
  const rows = Object.entries(TIERS).map(([tier, name]) => ({ tier, name: h("th", { scope: "row" }, name), hits: h("td"), misses: h("td"), share: h("td"), bar: meter(`Found in ${name}`) }));
  return {
    element: h("section", { class: "panel", "aria-labelledby": "tiers-title" },
      h("div", { class: "panel-head" }, h("h2", { id: "tiers-title" }, "Prompt cache"), h("small", {}, "a miss continues at the next tier")),
      h("table", { class: "tiers" }, h("caption", { class: "off-screen" }, "Hits and misses by tier since the start"),
        h("thead", {}, h("tr", {}, ["Tier", "Hits", "Misses"].map((each) => h("th", { scope: "col" }, each)), h("th", { scope: "col", colspan: 2 }, "Found"))),
        h("tbody", {}, rows.map((row) => h("tr", {}, row.name, row.hits, row.misses, h("td", { class: "bar" }, row.bar.element), row.share))))),
    show(snapshot) {
      for (const row of rows) {
        const { hits, misses } = snapshot.tiers[row.tier];
        const asked = hits + misses;
        setText(row.hits, number(hits));
        setText(row.misses, number(misses));
        setText(row.share, asked ? percent(hits / asked) : "–");
        row.bar.tell(asked ? hits / asked : 0);
        if (row.tier === "redis") setText(row.name, `Redis (${snapshot.redis})`);
      }
    },
  };
}

function fillEmpty(empty, signal) {
  const address = new URL(".", location.href.split("#")[0]).href;
  const [command, burst] = [h("div", {}), h("div", { class: "actions" })];
  const show = (task, inputs) => command.replaceChildren(code(snippetCurl(address, bodyOf(task, inputs, {}), Boolean(key()))));
  show(null, "Hello");
  burst.append(h("a", { class: "button", href: "#/playground" }, "Try a task"));
  empty.append(h("h3", {}, "Nothing is running"), h("p", {}, "Send a request and watch its lane appear:"), command, burst);
  offerBurst(burst, show, signal).catch(() => {});  // without tasks, or a key that may read them, the line above does
}

// A first request made of a task's own example, and a button that sends many of all tasks.
async function offerBurst(actions, show, signal) {
  const tasks = (await allTasks()).filter((task) => task.servable).slice(0, 12);
  const details = await Promise.all(tasks.map((task) => call(taskPath(task.id))));
  const asks = details.flatMap((detail, index) => {
    const examples = detail.versions.find((each) => each.version === tasks[index].version)?.examples ?? [];
    return examples.map((example) => ({ task_id: detail.id, inputs: example.inputs }));
  });
  if (!asks.length) return;
  show(asks[0].task_id, asks[0].inputs);
  const button = h("button", { type: "button", class: "primary" }, `Send ${BURST} requests of ${new Set(asks.map((ask) => ask.task_id)).size} tasks`);
  button.addEventListener("click", () => {
    let left = BURST;
    const sender = async () => {
      while (left-- > 0 && !signal.aborted) {
        const body = asks[Math.floor(Math.random() * asks.length)];
        await call("generate", { method: "POST", body }).catch(() => {});  // the lanes show what comes of it
      }
    };
    for (let count = 0; count < SENDERS; count += 1) sender();
  });
  actions.prepend(button);
}
