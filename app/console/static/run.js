// One training run: how far it is, its curves, its result beside what is live, and the way to go live.

import { call, taskPath } from "./api.js";
import { taskVars } from "./colours.js";
import { Curves } from "./curves.js";
import { h, number, problem, setText, setVars } from "./dom.js";
import { meaningInWords } from "./task.js";
import { STATES, stateBadge } from "./training.js";

const PAUSE = 2000;  // milliseconds between two looks
const PHASES = { preparing: "reading the data and loading the base", training: "training", publishing: "measuring and publishing" };
const METRICS_SHOWN = 6;

export function trainingRun(main, task, id) {
  const path = taskPath(task, `/training-runs/${encodeURIComponent(id)}`);
  const [status, facts, bar] = [h("p", { role: "status" }, "Loading…"), h("p", { class: "muted" }), h("i")];
  const meter = h("div", { class: "meter", hidden: true }, bar);
  const cancel = h("button", { type: "button", hidden: true }, "Cancel the run");
  const [advice, result, outcome] = [h("ul", { class: "plain" }), h("div", { class: "detail" }), h("div", { class: "outcome", tabindex: "-1", "aria-live": "polite" })];
  const curves = new Curves();
  let [timer, isOver] = [null, false];

  async function look() {
    try {
      show(await call(path));
    } catch (error) {
      if (error.status === 401 || isOver) return;
      outcome.replaceChildren(problem(error, "The run couldn't be loaded"));
      if (!error.status) timer = setTimeout(look, PAUSE);  // the server may be back in a moment
    }
  }

  function show(run) {
    if (isOver) return;
    const goesOn = run.state === "queued" || run.state === "running";
    setText(status, inWords(run));
    setText(facts, [run.settings.method, run.tokens_per_second && goesOn ? `${number(run.tokens_per_second)} tokens/s` : null, bestInWords(run)].filter(Boolean).join(" · "));
    meter.hidden = !goesOn || !run.steps;
    setVars(bar, { share: run.steps ? run.step / run.steps : 0 });
    cancel.hidden = !goesOn;
    cancel.disabled = run.is_cancelling;
    curves.draw(run.curves);
    advice.replaceChildren(...run.advice.map((line) => h("li", {}, line)));
    if (goesOn) timer = setTimeout(look, PAUSE);
    else end(run);
  }

  function end(run) {
    outcome.replaceChildren(...(run.error ? [h("div", { class: "notice bad", role: "alert" }, h("strong", {}, "The run failed"), h("p", {}, run.error))] : []));
    result.replaceChildren(...(Object.keys(run.result?.test ?? {}).length ? [scores(run.result)] : []));
    if (run.published) compare(run);
  }

  async function compare(run, news) {
    try {
      const panel = comparison(await call(taskPath(task)), run, promote);
      result.querySelector(".comparison")?.remove();
      result.append(panel);
      if (news) outcome.replaceChildren(h("p", { class: "notice good" }, news));
    } catch (error) {
      if (error.status !== 401) outcome.replaceChildren(problem(error, "The task couldn't be loaded"));
    }
  }

  async function promote(run, release) {
    const body = { version: run.published.version, expected_release: release, why: `training run ${run.id}` };
    try {
      await call(taskPath(task, "/aliases/live"), { method: "PUT", body });
      await compare(run, `Version ${run.published.version} is live.`);
    } catch (error) {
      if (error.status === 401) return;
      if (error.status === 409) await compare(run);
      outcome.replaceChildren(problem(error, error.status === 409 ? "The alias was moved meanwhile" : "It isn't live"));
    }
    outcome.focus();
  }

  cancel.addEventListener("click", async () => {
    cancel.disabled = true;
    clearTimeout(timer);
    try {
      show(await call(path, { method: "DELETE" }));
    } catch (error) {
      if (error.status !== 401) outcome.replaceChildren(problem(error, "The run wasn't cancelled"));
    }
  });
  main.append(h("nav", { "aria-label": "Back" }, h("a", { href: `#/train?task=${encodeURIComponent(task)}` }, "← Train")),
    h("div", { class: "lead row", vars: taskVars(task) }, h("div", {}, h("h1", {}, h("i", { class: "dot", "aria-hidden": "true" }), `Training ${task}`), status), h("div", { class: "actions" }, cancel)),
    outcome, h("section", { class: "panel", "aria-label": "Progress" }, meter, facts, curves.element, advice), result);
  look();
  return () => { isOver = true; clearTimeout(timer); curves.close(); };
}

function inWords(run) {
  if (run.is_cancelling) return "It is being cancelled.";
  if (run.state === "queued") return run.queue_position ? `It waits: number ${run.queue_position} in the queue.` : "It waits for its turn.";
  if (run.state !== "running") return `The run is ${STATES[run.state]}.`;
  return `${PHASES[run.phase] ?? "running"}${run.step ? `, step ${number(run.step)}${run.steps ? ` of ${number(run.steps)}` : ""}` : ""}`;
}

function bestInWords(run) {
  const [best] = Object.entries(run.best_scores ?? {});
  return best ? `best so far: ${best[0]} ${share(best[1])} after step ${number(run.best_step)}` : null;
}

function share(value) {
  return Number(value.toFixed(3)).toString();
}

const valueOf = (score) => score.share ?? score.value;

// `test`: {candidate: {metric: {share or value, interval_95}}}
function scores({ test, main_metric: main }) {
  const metrics = [...new Set(Object.values(test).flatMap(Object.keys))].slice(0, METRICS_SHOWN);
  const cell = (score) => h("td", {}, score ? share(valueOf(score)) : "–", score?.interval_95 ? h("small", {}, ` ${share(score.interval_95[0])} to ${share(score.interval_95[1])}`) : null);
  return h("section", { class: "panel", "aria-labelledby": "scores-title" }, h("div", { class: "panel-head" }, h("h2", { id: "scores-title" }, "On held-out examples"), h("small", { class: "muted" }, "with 95% intervals")),
    h("div", { class: "wide" }, h("table", { class: "tiers scores" }, h("thead", {}, h("tr", {}, h("td"), metrics.map((name) => h("th", { scope: "col" }, name === main ? h("strong", {}, name) : name)))),
      h("tbody", {}, Object.entries(test).map(([name, found]) => h("tr", {}, h("th", { scope: "row" }, name), metrics.map((metric) => cell(found[metric]))))))));
}

function comparison(task, run, promote) {
  const live = task.aliases.live;
  const candidate = task.versions.find((each) => each.version === run.published.version);
  const present = task.versions.find((each) => each.version === live);
  const isLive = live === run.published.version;
  const release = task.releases.at(-1)?.number ?? 0;
  const [mine, theirs] = [candidate, present].map((version) => version?.provenance.metrics ?? {});
  const names = Object.keys(mine).filter((name) => !name.includes(",")).slice(0, METRICS_SHOWN);  // "test exact, bare base" is another's
  const [data, other] = [candidate, present].map((version) => version?.provenance.training?.data_sha256);
  return h("section", { class: "panel comparison", "aria-labelledby": "compare-title" }, h("div", { class: "panel-head" }, h("h2", { id: "compare-title" }, `Version ${run.published.version}`), isLive ? h("span", { class: "badge good" }, "live") : h("span", { class: "badge" }, "candidate")),
    h("p", {}, isLive ? "It answers requests for the task now." : live === undefined ? "Nothing is live yet." : `Live is ${meaningInWords(live)}.`),
    present && !isLive ? h("div", { class: "wide" }, h("table", { class: "tiers scores" }, h("caption", { class: "muted" }, data && data === other ? "As measured when each was trained, on the same data" : "As measured when each was trained, each on its own data"),
      h("thead", {}, h("tr", {}, h("td"), names.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, [[`version ${candidate.version}`, mine], [`live: version ${present.version}`, theirs]].map(([name, found]) => h("tr", {}, h("th", { scope: "row" }, name), names.map((metric) => h("td", {}, found[metric] === undefined ? "not measured" : share(found[metric])))))))) : null,
    h("div", { class: "actions" }, isLive ? null : h("button", { type: "button", class: "primary", onclick: () => promote(run, release) }, "Make it live"),
      h("a", { class: "button", href: `#/playground?task=${encodeURIComponent(`${task.id}@${run.published.version}`)}${live === undefined || isLive ? "" : `&task=${encodeURIComponent(task.id)}`}` }, "Try it"),
      h("a", { class: "button", href: `#/tasks/${encodeURIComponent(task.id)}` }, "The task")));
}
