// A vote: what each answer got, and the ballots one by one.

import { bars } from "./bars.js";
import { counted, h, percent, setText } from "./dom.js";
import { ENDS, stepList } from "./steps.js";

const SHOWN_OPEN = 5;  // ballots, at most

// Ballots as they come in. `ofVersions`: each is a version's, as in an ensemble. `areLabels`: each is a
// label that its version found most probable; what decides is the mean of the probabilities.
export class Ballots {
  constructor(ofVersions, areLabels = false) {
    this.ofVersions = ofVersions;
    this.areLabels = areLabels;
    this.ballots = [];
    this.head = h("p", { class: "votes-head", role: "status" });
    this.result = h("div", {});
    this.list = h("ol", {});
    this.summary = h("summary", {}, ofVersions ? "Each version's answer" : "Each ballot");
    this.details = h("details", { class: "ballots", open: ofVersions }, this.summary, this.list);
    this.element = h("div", { class: "votes" }, this.head, this.result, this.details);
  }

  get tokens() {
    return this.ballots.reduce((sum, ballot) => sum + ballot.generated_tokens, 0);
  }

  add(ballot) {
    this.ballots.push(ballot);
    const after = [...this.list.children].find((each) => Number(each.dataset.index) > ballot.index);
    this.list.insertBefore(this.item(ballot), after ?? null);
    this.draw(`${counted(this.ballots.length, this.noun)} so far`);
  }

  // The result; ballots that were not streamed come with it.
  finish(vote) {
    if (!this.ballots.length) vote.ballots.forEach((ballot) => this.add(ballot));
    const winner = normalized(vote.winner);
    const total = counted(this.ballots.length, this.noun);
    const share = `${percent(vote.share)} of the weight`;
    const words = this.areLabels ? `${total}: ${share} chose the same` : `${total}: the winner has ${share}`;
    this.draw(winner ? words : `${total}, and all abstained`, winner);
    this.details.open ||= this.ballots.length <= SHOWN_OPEN && this.ballots.some((ballot) => ballot.reasoning);
  }

  get noun() {
    return this.ofVersions ? "version" : "ballot";
  }

  draw(head, winner) {
    setText(this.head, head);
    const weights = new Map();
    for (const ballot of this.ballots) weights.set(normalized(ballot.answer), (weights.get(normalized(ballot.answer)) ?? 0) + ballot.weight);
    const total = [...weights.values()].reduce((sum, weight) => sum + weight, 0);
    const rows = [...weights].sort(([one, a], [other, b]) => !one - !other || b - a).map(([answer, weight]) => ({
      label: answer || h("em", {}, "abstained"), share: weight / total, said: `${weight} · ${percent(weight / total)}`,
      kind: answer ? answer === winner && "best" : "abstained",
    }));
    this.result.replaceChildren(bars(rows, "Answers, with the weight and share of each"));
  }

  item(ballot) {
    const facts = [
      ballot.weight !== 1 && `weight ${ballot.weight}`,
      !this.areLabels && `${counted(ballot.generated_tokens, "token")} · ${ENDS[ballot.finish_reason]}`,
      ballot.share !== undefined && `itself a vote, won with ${percent(ballot.share)}`,
    ];
    const steps = ballot.reasoning?.steps ?? [];
    return h("li", { "data-index": ballot.index }, this.ofVersions ? h("span", { class: "badge" }, `version ${ballot.version}`) : h("small", {}, `${ballot.index + 1}.`),
      h("span", { class: "said" }, ballot.answer || h("em", {}, "abstained")), h("small", {}, facts.filter(Boolean).join(" · ")),
      steps.length ? h("details", {}, h("summary", {}, counted(steps.length, "step")), stepList(...steps)) : null);
  }
}

// Answers are compared without regard to white space.
function normalized(answer) {
  return answer.trim().split(/\s+/).join(" ");
}
