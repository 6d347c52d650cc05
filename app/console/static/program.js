// What a version does beyond one completion, as facts in words.

import { counted, h } from "./dom.js";
import { inWords } from "./upload.js";

// By name; null where a version has none of it. Optional fields of a manifest may be absent.
export function programFacts({ reasoning, chain, vote, calibration, paraphrases, few_shot: shots }) {
  return {
    Reasoning: reasoning && reasoningFacts(reasoning),
    Chain: chain && chainFacts(chain),
    Vote: vote && `${vote.n} samples of each answer; the most frequent one wins`,
    Calibration: calibration && `log-probabilities of labels are divided by ${calibration.temperature}`,
    Paraphrases: paraphrases?.length ? h("ol", { class: "texts" }, paraphrases.map((each, index) => h("li", {}, h("small", {}, index), template(each)))) : null,
    "Worked examples": shots?.length ? shotList(shots) : null,
  };
}

function reasoningFacts({ answer_after: marker, steps_end: end, effort = {} }) {
  const budgets = Object.entries(effort).sort(([, one], [, other]) => one - other).map(([name, tokens]) => `${name} ${tokens}`);
  return [
    h("p", {}, "Steps first; the answer stands behind ", quoted(marker), end ? [", each step ends with ", quoted(end)] : null, "."),
    budgets.length ? h("p", {}, `Tokens to think, by effort: ${budgets.join(", ")}. Then the answer is due.`) : null,
  ];
}

function chainFacts({ template: source, step_ends: end, done, max_steps: most = 8, max_step_tokens: tokens, steps = [] }) {
  const whole = `At most ${counted(most, "step")}${tokens ? `, each of at most ${counted(tokens, "token")}` : ""}.`;
  return [
    template(source),
    h("p", {}, "A step ends ", end ? ["with ", quoted(end)] : "where the model ends it", "; ", done ? ["the answer stands behind ", quoted(done)] : "the last step is the answer", `. ${whole}`),
    steps.length ? h("p", {}, "Steps are made by ", steps.map(({ task }, index) => [index ? ", then " : "", h("a", { href: `#/tasks/${encodeURIComponent(task.split("@")[0])}` }, task)]), "; the last one goes on.") : null,
  ];
}

function shotList(shots) {
  return h("ul", { class: "plain" }, shots.map((each) => h("li", {}, inWords(each.inputs), " → ", h("strong", {}, each.output))));
}

export function template(text) {
  return h("pre", { class: "template" }, text);
}

// A marker, with its white space visible.
function quoted(text) {
  return h("code", {}, JSON.stringify(text));
}
