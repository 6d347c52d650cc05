// One task: what its aliases mean, its versions, its history.

import { call, taskPath } from "./api.js";
import { taskVars } from "./colours.js";
import { trainingFacts } from "./curves.js";
import { counted, field, h, options, percent, problem } from "./dom.js";
import { programFacts, template } from "./program.js";
import { fieldsOf } from "./snippets.js";
import { stateOf } from "./tasks.js";
import { inWords, uploadPanel } from "./upload.js";

const ACTIONS = { move: "moved", rollback: "rolled back", retire: "retired the task", restore: "restored the task" };

export function taskDetail(main, id) {
  const content = h("div", { class: "detail" }, h("p", { class: "muted" }, "Loading…"));
  const outcome = h("div", { class: "outcome", tabindex: "-1", "aria-live": "polite" });  // what the last change did; stays when the rest is drawn again
  main.append(h("nav", { "aria-label": "Back" }, h("a", { href: "#/tasks" }, "← All tasks")), outcome, content);

  async function load(news) {
    if (news) outcome.replaceChildren(h("p", { class: "notice good" }, news));
    try {
      const task = await call(taskPath(id));
      content.replaceChildren(...sections(task, change, load));
    } catch (error) {
      if (error.status !== 401) content.replaceChildren(h("h1", {}, id), problem(error, "The task couldn't be loaded"));
    }
  }

  async function change(path, request, news) {
    try {
      const answer = await call(taskPath(id, path), request);
      await load(news(answer));
    } catch (error) {
      if (error.status === 401) return;
      outcome.replaceChildren(problem(error, error.status === 409 ? "The alias was moved meanwhile" : undefined));
      if (error.status === 409) await load();
    }
    outcome.focus();  // what was pressed is gone, and this says what came of it
  }
  load();
}

function sections(task, change, load) {
  const aliases = Object.entries(task.aliases).sort(([one], [other]) => (other === "live") - (one === "live") || one.localeCompare(other));
  return [
    head(task, change),
    h("div", { class: "columns" },
      h("div", {},
        h("section", { class: "panel", "aria-labelledby": "aliases-title" }, h("div", { class: "panel-head" }, h("h2", { id: "aliases-title" }, "Aliases")),
          aliases.length ? aliases.map(([alias, meaning]) => aliasCard(task, alias, meaning, change)) : h("p", { class: "muted" }, "No alias points to a version yet."), newAlias(task, change)),
        h("section", { class: "panel", "aria-labelledby": "versions-title" }, h("div", { class: "panel-head" }, h("h2", { id: "versions-title" }, "Versions")), [...task.versions].reverse().map((version, index) => versionCard(task, version, index === 0)))),
      h("section", { class: "panel", "aria-labelledby": "history-title" }, h("div", { class: "panel-head" }, h("h2", { id: "history-title" }, "History"), h("small", { class: "muted" }, "nothing is ever rewritten")), timeline(task.releases))),
    uploadPanel({ task: task.id, onUploaded: (answer) => load(`Version ${answer.version} is stored.`) }),
  ];
}

function head(task, change) {
  const why = h("input", { maxlength: 1000, autocomplete: "off" });
  const dialog = h("dialog", { "aria-labelledby": "retire-title" }, h("form", { method: "dialog" }, h("h2", { id: "retire-title" }, `Retire ${task.id}?`),
    h("p", {}, "New requests for this task will be refused. Running requests finish; nothing is deleted."), field("Why", why, "kept in the history"),
    h("div", { class: "actions" }, h("button", { value: "yes", class: "danger" }, "Retire"), h("button", { value: "no" }, "Keep"))));
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "yes") change(`?why=${encodeURIComponent(why.value)}`, { method: "DELETE" }, () => `${task.id} is retired.`);
    dialog.returnValue = "";
  });
  const action = task.retired
    ? h("button", { type: "button", onclick: () => change("/restore", { method: "POST", body: { why: "" } }, () => `${task.id} is served again.`) }, "Restore")
    : h("button", { type: "button", onclick: () => dialog.showModal() }, "Retire…");
  return h("div", { class: "lead row", vars: taskVars(task.id) },
    h("div", {}, h("h1", {}, h("i", { class: "dot", "aria-hidden": "true" }), task.id), h("p", {}, task.retired ? h("span", { class: "badge bad" }, "retired") : null, `${counted(task.versions.length, "version")}, ${counted(task.releases.length, "release")}, ${counted(task.requests_served, "request")} served here`)),
    h("div", { class: "actions" }, task.retired ? null : h("a", { class: "button primary", href: `#/playground?task=${encodeURIComponent(task.id)}` }, "Try it"), task.retired || !decides(task) ? null : h("a", { class: "button", href: `#/decisions?model=${encodeURIComponent(task.id)}` }, "Decide"), task.retired ? null : h("a", { class: "button", href: `#/train?task=${encodeURIComponent(task.id)}` }, "Train"), action, dialog));
}

export function meaningInWords(meaning) {
  if (typeof meaning === "number") return `version ${meaning}`;
  if (meaning.spread_paraphrases) return `version ${meaning.version}, its paraphrases spread over users`;
  if (meaning.ensemble) return `versions ${together(meaning.weights)} together`;
  const total = Object.values(meaning).reduce((sum, weight) => sum + weight, 0);
  return Object.entries(meaning).map(([version, weight]) => `version ${version}: ${percent(weight / total)}`).join(", ");
}

// Whether the task answers the questions of decisions.
function decides({ versions }) {
  const { choices, template: source, reasoning, chain } = versions.at(-1) ?? {};
  return !reasoning && !chain && Boolean(choices?.length || fieldsOf(source).includes("instructions"));
}

// Versions of an ensemble, with their weights where these differ.
function together(weights) {
  const isEqual = new Set(Object.values(weights)).size === 1;
  return Object.entries(weights).map(([version, weight]) => isEqual ? version : `${version} (weight ${weight})`).join(", ");
}

// What an alias points at, in an answer that says so in fields of its own.
function answered(answer) {
  return answer.ensemble || answer.spread_paraphrases ? answer : answer.version ?? answer.weights;
}

// Whether users get different versions.
function isSplit(meaning) {
  return typeof meaning === "object" && !meaning.ensemble && !meaning.spread_paraphrases;
}

function aliasCard(task, alias, meaning, change) {
  const why = h("input", { maxlength: 1000, autocomplete: "off" });
  const target = targetFields(task, meaning);
  const form = h("form", { class: "alias", "aria-label": `Alias ${alias}` },
    h("div", { class: "alias-head" }, h("h3", {}, alias), h("span", { class: "meaning" }, meaningInWords(meaning))),
    isSplit(meaning) || meaning.ensemble ? weightBar(meaning.weights ?? meaning) : null,
    h("div", { class: "fields" }, target.elements, field("Reason", why, "kept in the history")),
    h("div", { class: "actions" }, h("button", { class: "primary" }, "Move"),
      h("button", { type: "button", onclick: () => change("/rollback", { method: "POST", body: { alias, why: why.value } }, (answer) => `${alias} is rolled back to ${meaningInWords(answered(answer))}.`) }, "Roll back")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    move(task, alias, target, why.value, change);
  });
  return form;
}

function move(task, alias, target, why, change) {
  const body = { ...target.value(), expected_release: task.releases.at(-1)?.number ?? 0, why };
  change(`/aliases/${encodeURIComponent(alias)}`, { method: "PUT", body }, (answer) => `${alias} now points to ${meaningInWords(answered(answer))}.`);
}

// One version, or a weight for each: by which they share the users, or vote on every answer.
function targetFields(task, meaning) {
  const versions = task.versions.map((each) => each.version);
  const choice = h("select", {}, options(targets(task).reverse(), kindOf(meaning ?? versions.at(-1))));
  const weights = versions.map(() => h("input", { type: "number", min: 0, max: 1000000, inputmode: "numeric" }));
  const box = h("div", { class: "weights" }, versions.map((version, index) => field(`Version ${version}, weight`, weights[index])));
  const show = () => {
    box.hidden = !SEVERAL.includes(choice.value);
    const known = choice.value === kindOf(meaning) ? meaning.weights ?? meaning : suggested(choice.value, versions, meaning);
    if (!box.hidden) weights.forEach((input, index) => { input.value = known[versions[index]] ?? 0; });
  };
  choice.addEventListener("change", show);
  show();
  return {
    elements: [field("Points to", choice), box],
    value() {
      const [kind, version] = choice.value.split("-");
      if (kind === "spread") return { version: Number(version), spread_paraphrases: true };
      if (!SEVERAL.includes(kind)) return { version: Number(kind) };
      const given = Object.fromEntries(versions.map((version, index) => [version, Number(weights[index].value)]).filter(([, weight]) => weight > 0));
      return { weights: given, ...(kind === "ensemble" && { ensemble: true }) };
    },
  };
}

const SEVERAL = ["split", "ensemble"];

// All that an alias of the task may point at, as options of a select.
function targets(task) {
  const spread = task.versions.filter((each) => each.paraphrases?.length).map(({ version }) => [`spread-${version}`, `version ${version}, paraphrases spread`]);
  const several = [["ensemble", "several, which vote together"], ["split", "several, by weight"]];
  return [...spread, ...task.versions.map(({ version }) => [version, `version ${version}`]), ...(task.versions.length > 1 ? several : [])];
}

function kindOf(meaning) {
  if (typeof meaning !== "object") return String(meaning);
  if (meaning.spread_paraphrases) return `spread-${meaning.version}`;
  return meaning.ensemble ? "ensemble" : "split";
}

// Weights to begin with: all alike, or most of the users for the version that has them now.
function suggested(kind, versions, meaning) {
  if (kind === "ensemble") return Object.fromEntries(versions.map((version) => [version, 1]));
  return { [versions.at(-1)]: 10, [meaning?.version ?? meaning]: 90 };
}

function weightBar(weights) {
  const total = Object.values(weights).reduce((sum, weight) => sum + weight, 0);
  return h("div", { class: "weight-bar", "aria-hidden": "true" }, Object.entries(weights).map(([version, weight]) => h("span", { vars: { share: weight / total } }, `v${version}`)));
}

function newAlias(task, change) {
  const [name, why] = [h("input", { required: true, pattern: "[a-z0-9]+([._\\-][a-z0-9]+)*", maxlength: 64, placeholder: "canary", autocomplete: "off" }), h("input", { maxlength: 1000, autocomplete: "off" })];
  const target = targetFields(task, task.versions.at(-1)?.version);
  const form = h("form", { class: "alias" }, h("div", { class: "fields" }, field("Name", name), target.elements, field("Reason", why)), h("div", { class: "actions" }, h("button", { class: "primary" }, "Add")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    move(task, name.value, target, why.value, change);
  });
  return task.versions.length ? h("details", {}, h("summary", {}, "Another alias"), form) : null;
}

function versionCard(task, version, isOpen) {
  const aliases = Object.entries(task.aliases).filter(([, meaning]) => [meaning, meaning.version].includes(version.version) || (meaning.weights ?? meaning)[version.version]).map(([alias]) => h("span", { class: "badge" }, alias));
  const facts = {
    Kind: `${version.kind}${version.virtual_tokens ? `, ${version.virtual_tokens} virtual tokens` : ""}`,
    Version: h("code", {}, version.version_digest),
    Prompt: version.prompt_digest ? h("code", {}, version.prompt_digest) : "none",
    Template: version.template === null ? "none: the text as it is" : template(version.template),
    ...programFacts(version),
    Defaults: pairs(version.defaults),
    Choices: version.choices.length ? version.choices.map((choice) => choice.value ?? choice).join(", ") : null,
    Notes: version.notes || null,
    "Trained on": pairs(version.base),
    Training: trainingFacts(version.provenance),
    Provenance: Object.keys(version.provenance).length ? provenance(version.provenance) : null,
    Examples: version.examples.length ? h("ul", { class: "plain" }, version.examples.map((each) => h("li", {}, inWords(each.inputs), " → ", h("strong", {}, each.expected)))) : null,
  };
  return h("details", { class: "version", open: isOpen }, h("summary", {}, h("span", { class: "version-name" }, `Version ${version.version}`), aliases, stateOf(version)),
    h("dl", { class: "facts" }, Object.entries(facts).filter(([, value]) => value !== null).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
}

function pairs(values) {
  const given = Object.entries(values).filter(([, value]) => value !== null);
  return given.length ? given.map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ") : null;
}

function provenance(values) {
  return h("details", {}, h("summary", {}, "where it came from"), h("dl", { class: "facts small" }, Object.entries(values).filter(([, value]) => value !== null).map(([name, value]) =>
    name === "training" ? [] : [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, h("code", {}, typeof value === "object" ? JSON.stringify(value) : String(value)))])));
}

function timeline(releases) {
  return h("ol", { class: "timeline", reversed: true }, [...releases].reverse().map((release) => h("li", { class: release.action },
    h("p", {}, h("strong", {}, `Release ${release.number}`), " ", inSentence(release)),
    release.why ? h("blockquote", {}, release.why) : null,
    h("small", {}, `${release.who || "unknown"} · `, h("time", { datetime: release.at }, when(release.at))))));
}

function inSentence(release) {
  if (!release.alias) return ACTIONS[release.action] ?? release.action;
  return [h("em", {}, release.alias), ` ${ACTIONS[release.action] ?? release.action} to ${meaningInWords(release.aliases[release.alias])}`];
}

function when(at) {
  const time = new Date(at);
  return Number.isNaN(time.getTime()) ? at : time.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
